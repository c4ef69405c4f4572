"""The state of a teacher besides its network: what updates, swaps and loading read and write."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn

from ..backends.interface import WITHOUT_FLOAT64
from ..networks.names import iterate_names
from ..options import Options
from ..plan.cache import last_plan
from .caching import CacheGuard
from .locks import TeacherLock
from .low_precision import LowPrecisionCopy

Momentum = float | Tensor | Callable[[Any], float | Tensor]

Value = TypeVar("Value")


class StudentReference:
    """A weak reference to a student. A class of its own, because a graph of torch.compile that assigns a weakref to an
    attribute stores the object that it refers to instead."""

    def __init__(self, student: nn.Module) -> None:
        self._reference = ref(student)

    def __call__(self) -> nn.Module | None:
        return self._reference()


class TeacherState:
    """momentum, options, seed, cast and capturable are those of EMANTeacher; the rest changes with the updates."""

    def __init__(
        self, momentum: Momentum, options: Options, seed: int, cast: torch.dtype | None, capturable: bool
    ) -> None:
        self.momentum = momentum
        self.options = options
        self.seed = seed
        self.cast = cast
        self.capturable = capturable
        self.step: int | Tensor = 0  # the number of updates made
        self.step_is_given = False  # whether the step is set before each update, so that a loaded average needs none
        self.skipped: Tensor | None = None  # how many elements of the student nonfinite="skip" has skipped
        self.low_precision: LowPrecisionCopy | None = None
        self.caches: CacheGuard | None = None  # of the teacher's network, from its first forward on
        self.pending_norms: list[nn.Module] = []  # BatchNorms that update_bn may have reset
        self.optimizer_steps: int | Tensor | None = None  # the steps that follow(every=, start=) has counted
        self.student: StudentReference | None = None  # that of the last update, or of the constructor
        self.lock = TeacherLock()

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be pickled. A copied teacher has not seen the student, and makes its own copies.
        return self.__dict__ | {"student": None, "low_precision": None, "caches": None, "pending_norms": []}

    def shared_options(self) -> dict[str, object]:
        """What must be equal for teachers that are updated in one pass."""
        options = {name: getattr(self.options, name) for name in self.options.__dataclass_fields__}
        return options | {"seed": self.seed, "cast": self.cast, "capturable": self.capturable}

    def remember_student(self, student: nn.Module) -> None:
        if self.student is None or self.student() is not student:
            self.student = StudentReference(student)

    def find_student(self) -> nn.Module:
        """The remembered student. Raises RuntimeError if there is none."""
        student = self.student() if self.student is not None else None
        if student is None:
            raise RuntimeError(
                "no student has been seen yet (or it has been freed): call update(student) or swapped(student)"
            )
        return student

    def describe_plan(self, network: nn.Module) -> str:
        """The description of the plan that the last update of this network used, or an empty string."""
        student = self.student() if self.student is not None else None
        plan = last_plan(network, student) if student is not None else None
        return "" if plan is None else plan.describe()

    def refresh_low_precision(self, network: nn.Module) -> LowPrecisionCopy:
        """The low-precision copy of this network, up to date."""
        if self.low_precision is None or self.low_precision.dtype != self.cast:
            self.low_precision = LowPrecisionCopy(self.cast)
        self.low_precision.follow(network)
        return self.low_precision

    def renew_stale_caches(self, network: nn.Module) -> list[ref[nn.Module]]:
        """Returns the modules of this network that cache, whose caches are up to date."""
        if self.caches is None or self.caches.network() is not network:
            self.caches = CacheGuard(network)
        if self.caches.modules:
            self.caches.renew_if_stale()
        return self.caches.modules

    def set_step(self, step: int) -> None:
        """Raises ValueError unless it is a whole number from 0."""
        check_step_number(step)
        if isinstance(self.step, Tensor):
            self.step.fill_(step)  # in place, because a captured graph reads it
        else:
            self.step = int(step)

    def counts(self) -> dict[str, Tensor]:
        """What a checkpoint stores besides the network and the step, as tensors for tensor-only formats."""
        skipped = 0 if self.skipped is None and self.options.nonfinite == "skip" else self.skipped
        counts = {"_skipped": skipped, "_optimizer_steps": self.optimizer_steps}
        return {name: torch.tensor(int(n), device="cpu") for name, n in counts.items() if n is not None}

    def take_counts(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Remove the counts from a state_dict and set them. A file without a count leaves it as it is."""
        names = [name for name in ("_skipped", "_optimizer_steps") if prefix + name in state_dict]
        self.set_counts(self.counts() | {name: state_dict.pop(prefix + name) for name in names})

    def set_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Set what ``counts`` has returned."""
        for attribute in ("skipped", "optimizer_steps"):
            count, own = counts.get(f"_{attribute}"), getattr(self, attribute)
            if isinstance(own, Tensor):
                own.fill_(0 if count is None else int(count))  # in place, because a captured graph reads it
            else:
                setattr(self, attribute, None if count is None else counter_on_device(int(count), torch.device("cpu")))

    def count_step(self, found_inf: Tensor | None) -> None:
        """Count an update, unless found_inf says that it was skipped."""
        if isinstance(self.step, Tensor):
            self.step += 1 if found_inf is None else (found_inf == 0).to(self.step.device)
        elif found_inf is None or not found_inf:
            self.step += 1

    def known_step(self) -> int | Tensor:
        """The step as a number where the host has it. A compiled graph has put it into a tensor in CPU memory."""
        step = self.step
        return int(step) if isinstance(step, Tensor) and step.device.type == "cpu" and not self.capturable else step

    def current_momentum(self) -> float | Tensor:
        """The momentum of the next update."""
        if not callable(self.momentum):
            return self.momentum
        step = self.known_step()
        # In float64, because 1 - momentum would lose three digits in float32.
        return self.momentum(step.double() if isinstance(step, Tensor) else step)

    def prepare_counters(self, network: nn.Module, found_inf_on_device: bool) -> None:
        """Move the step, and the counter of skipped elements, to where the kernels read and write them."""
        on_device, counts = self.capturable or found_inf_on_device, self.options.nonfinite == "skip"
        by_step = callable(self.momentum) or self.options.rounding == "stochastic"
        if not (on_device or counts or by_step):
            return
        first = next(iterate_names(network), None)
        device = torch.device("cpu") if first is None else first[1].device
        # Schedules compute in float64. Without it the step stays on the host, and count_step waits for found_inf.
        on_device = on_device and device.type not in WITHOUT_FLOAT64
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and not self.capturable and by_step:
            raise RuntimeError(
                "a captured graph would replay the momentum and random bits of this step: EMANTeacher(capturable=True) "
                "stores the step on the device, where each replay increments it"
            )
        step = counter_on_device(self.step, device) if on_device else self.step
        skipped = counter_on_device(0 if self.skipped is None else self.skipped, device) if counts else None
        if capturing and (step is not self.step or skipped is not self.skipped):
            raise RuntimeError("call update() once, with the same arguments, before the capture: it allocates memory")
        self.step, self.skipped = step, skipped


class StateAttribute(Generic[Value]):
    """An attribute of a teacher that is stored in its state, which updates read without the module.

    check: called with a value before it is assigned.
    """

    def __init__(self, check: Callable[[Value], object] | None = None) -> None:
        self._check = check

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, teacher: Any, owner: type | None = None) -> Value:
        return self if teacher is None else getattr(teacher.state, self._name)

    def __set__(self, teacher: Any, value: Value) -> None:
        if self._check is not None:
            self._check(value)
        setattr(teacher.state, self._name, value)


class OptionAttribute(Generic[Value]):
    """One of a teacher's options. Assigning it replaces ``teacher.options``, so that it is checked."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, teacher: Any, owner: type | None = None) -> Value:
        return self if teacher is None else getattr(teacher.options, self._name)

    def __set__(self, teacher: Any, value: Value) -> None:
        teacher.options = replace(teacher.options, **{self._name: value})


def check_step_number(step: int) -> None:
    """Raises ValueError unless it is a whole number from 0."""
    if int(step) != step or step < 0:
        raise ValueError(f"the step is the number of updates made, a whole number from 0, but got {step}")


def counter_on_device(number: int | Tensor, device: torch.device) -> Tensor:
    """The number as an int64 tensor on this device; a tensor that is there already is returned as it is.

    A number is written by the device: a copy from the host would synchronize.
    """
    # In inference mode the new tensor could not be written after it has ended.
    with torch.inference_mode(False):
        if isinstance(number, Tensor):
            return number.to(device)
        return torch.full((), number, dtype=torch.int64, device=device)
