"""EMANTeacher: the teacher as a module."""

import sys
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from inspect import unwrap as undecorated
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from .backends import requested
from .call import Nonfinite, Rounding, as_momentum, check_modes
from .copying import adopted, copied, to_dtype
from .distributed import SyncBuffers, check_sync
from .follow import follow
from .loading import all_or_nothing
from .low_precision import LowPrecision, check_cast, narrowed
from .pairing import Rule, check_rules, every_name
from .step import counter, update_locked
from .swap import Exchange, Swapped, Turn

# Its own code, under torch.no_grad's.
_UPDATE_BN = undecorated(update_bn).__code__

Momentum = float | Tensor | Callable[[Any], float | Tensor]


class EMANTeacher(nn.Module):
    """A teacher network that follows a student as an exponential moving average, BatchNorm statistics and all.

    A deep copy of the student: in eval mode (``train()`` does not change that), without gradients. Call it like the
    network; ``update(student)`` after the optimizer's step. ``teacher.module`` is the plain network.

    Args:
        student: the network to follow; DDP, DataParallel and torch.compile wrappers are looked through.
        module: a network to be the teacher's, in the place of a deep copy: a second instance of a student that cannot
            be copied, a key encoder that there is already, a sharded network. It takes the student's values first.
        keep_values: leave the values of ``module`` as they are. Default False.
        momentum: a number in [0, 1], a 0-d tensor on the teacher's device (read there by the kernel), or a schedule
            ``step -> momentum`` (see eman_kernels.schedules); step counts the updates made, from 0. Default 0.999.
        rules: name patterns (as in fnmatch) and "ema", "copy", "skip" or "share"; the first that matches a name counts.
            What is shared is the student's own tensor, in the teacher too: a frozen base under trained adapters. It
            takes no memory and no time, ``dtype`` leaves it as it is, and ``cast`` makes its half copy; state_dict()
            holds it, load_state_dict() and ``to()`` of a device change it for both. A teacher that was copied or
            unpickled has a base of its own, and its update says how to share again.
        buffers: "ema" (EMAN, default), "copy", "skip" or "share", for the buffers that no pattern names.
        backend: one of ``available_backends()``; default: EMAN_KERNELS_BACKEND, else the fastest for the device.
        dtype: the floating-point dtype of the teacher; default: the student's. ``torch.float32`` for a bf16 student:
            a bf16 teacher rounded to nearest hardly moves at a high momentum, its steps being less than half an ulp.
            It stays so in ``to(torch.bfloat16)`` of the teacher or of a module that holds it.
        rounding: "nearest" (default) or "stochastic", with which bf16 and fp16 teachers move all the same: up or down
            at random, so that the mean is the exact average. A run repeats itself for the same seed.
        seed: of stochastic rounding, in [0, 2^32); default 0.
        cast: ``torch.bfloat16`` or ``torch.float16``: ``teacher(x)`` runs the network in this type, on x cast likewise.
            From the first such call on, low-precision copies of a float32 teacher's tensors are written in the
            update's own pass. BatchNorm stays in float32, which torch's takes beside bf16 inputs. ``teacher.module``
            and state_dict() hold the float32 teacher; its own modules run, with the copies for the length of the call
            in place of their tensors. A write to the teacher that torch does not record wants ``refresh()``.
        nonfinite: "propagate" (default) NaNs and infinities of the student, or "skip" them: such an element keeps its
            teacher's value, and ``teacher.skipped`` counts how many there were. A finite one then takes the place of a
            teacher's that is not finite; at momentum 1 nothing changes.
        capturable: keep the step on the teacher's device, so that an update in a captured CUDA graph advances it, and
            with it the schedule (which then gets the step as a 0-d float64 tensor) and stochastic rounding.
        sync_buffers: of BatchNorm under DistributedDataParallel, where each process has statistics of its own: "mean",
            the teachers follow the mean over the processes; "rank0", those of the first; "none" (default), each its
            student's own. One collective operation an update, of some 200 kB for ResNet-50.

    Raises:
        ValueError: momentum or seed is out of range, or a rule, a backend, a mode or a dtype is not known or not fit.
        TypeError: the student is no network, or cannot be deep-copied; the message says what stands in the way.

    state_dict() holds the network under ``module.`` and the step; training resumes exactly from it.

    >>> student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    >>> teacher = EMANTeacher(student, momentum=0.99)
    >>> teacher.update(student)
    >>> teacher(torch.ones(1, 4)).requires_grad
    False
    """

    def __init__(
        self,
        student: nn.Module,
        momentum: Momentum = 0.999,
        *,
        module: nn.Module | None = None,
        keep_values: bool = False,
        rules: Mapping[str, Rule] | None = None,
        buffers: Rule = "ema",
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        rounding: Rounding = "nearest",
        seed: int = 0,
        cast: torch.dtype | None = None,
        nonfinite: Nonfinite = "propagate",
        capturable: bool = False,
        sync_buffers: SyncBuffers = "none",
    ) -> None:
        super().__init__()
        check_rules(rules or {}, buffers)
        check_modes(rounding, seed, True, nonfinite)
        check_sync(sync_buffers)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point dtype, and is {dtype}")
        if not callable(momentum):
            as_momentum(momentum)
        requested(backend)
        if module is None:
            self.module: nn.Module = copied(student, rules or {}, buffers)
        else:
            self.module = adopted(module, student, rules or {}, buffers, backend, keep_values)
        if dtype is not None:
            to_dtype(self.module, dtype, student)
        check_cast(self.module, cast)
        self.momentum = momentum
        self.rules: dict[str, Rule] = dict(rules or {})
        self.buffer_rule = buffers
        self.backend = backend
        self.rounding = rounding
        self.seed = seed
        self.cast = cast
        self.dtype = dtype
        self.nonfinite = nonfinite
        self.capturable = capturable
        self.sync_buffers = sync_buffers
        self.skipped: Tensor | None = None
        self._step: int | Tensor = 0
        self._copy: LowPrecision | None = None
        self._student: ref[nn.Module] | None = None
        self._turn = Turn()
        self.eval()

    def update(
        self,
        student: nn.Module | None = None,
        *,
        momentum: float | Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Follow the student by one step, in place and in one pass; see ``eman_update_`` for what is done and raised.

        Args:
            student: the network to follow; default: the one of the last update.
            momentum: for this update, instead of the teacher's own.
            found_inf: GradScaler's tensor, or any of one element: where it is not 0, the teacher and its step stay as
                they are. On a GPU nothing waits for it; the step then lies on the device as well.

        >>> student = nn.Linear(4, 4)
        >>> teacher = EMANTeacher(student)
        >>> teacher.update(student)
        >>> teacher.update(found_inf=torch.ones(1))  # GradScaler has left out the optimizer's step
        >>> teacher.step
        1
        """
        if torch.compiler.is_compiling():
            from . import in_graph

            return in_graph.update((self,), student, momentum, found_inf)
        update_locked((self,), student, momentum, found_inf)

    def follow(self, optimizer: Optimizer, student: nn.Module, *, every: int = 1, start: int = 0) -> RemovableHandle:
        """Call ``update(student)`` after each step that the optimizer really makes: with gradient accumulation, and
        with GradScaler, which leaves some out.

        A step that a fused optimizer leaves out on the device, its ``found_inf`` says, which goes to the kernel:
        nothing waits for it. An optimizer that accelerate, Lightning or Fabric has wrapped is looked through.

        Args:
            optimizer: the one whose steps count; where there are several, the one that is stepped last.
            student: as in ``update``.
            every: update after each of so many real steps; default 1.
            start: make no update after the first so many; default 0. The average then begins at what the teacher is,
                unless its momentum is ``schedules.CopyFirst``. Training that is resumed, with a teacher that has been
                updated before, does not wait again.

        Returns:
            A handle, whose ``remove()`` ends it.

        Raises:
            ValueError: every is below 1, or start below 0. TypeError: the optimizer is none.

        >>> student = nn.Linear(4, 4)
        >>> teacher = EMANTeacher(student)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> handle = teacher.follow(optimizer, student)
        >>> student(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> teacher.step
        1
        """
        return follow(self, optimizer, student, every, start)

    @property
    def step(self) -> int:
        """The updates made. Waits for the device where the step lies there."""
        return int(self._step)

    @step.setter
    def step(self, step: int) -> None:
        if int(step) != step or step < 0:
            raise ValueError(f"the step is the number of updates made, a whole number from 0, and is to be {step}")
        if isinstance(self._step, Tensor):
            self._step.fill_(step)  # in place: a captured graph reads it
        else:
            self._step = int(step)

    def swapped(self, student: nn.Module | None = None) -> Swapped:
        """A context within which the student holds the teacher's values, and the teacher the student's: see
        ``eman_kernels.swapped``. The teacher cannot be updated meanwhile; its ``state_dict()``, ``deepcopy`` and
        ``torch.save`` have its own values all the same.

        >>> student = nn.Linear(4, 4)
        >>> teacher = EMANTeacher(student)
        >>> with teacher.swapped(student):
        ...     averaged = student(torch.ones(1, 4))
        """
        return Swapped(partial(self._exchange_with, student))

    def swap(self, student: nn.Module | None = None) -> None:
        """Enter ``swapped`` without ``with``, until ``swap_back()``: for hooks that come in pairs.

        >>> student = nn.Linear(4, 4)
        >>> teacher = EMANTeacher(student)
        >>> teacher.swap(student)
        >>> averaged = student(torch.ones(1, 4))
        >>> teacher.swap_back()
        """
        self._exchange_with(student).enter()

    def swap_back(self) -> None:
        """Leave what ``swap`` has entered. Raises RuntimeError if nothing is swapped, or where something of another
        shape has taken the place of a tensor that was."""
        exchange = self._turn.exchange  # read once: another thread may leave it
        if exchange is None:
            raise RuntimeError("teacher and student are not swapped")
        if lost := exchange.leave():
            raise RuntimeError(lost)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, without gradients. For gradients to the input, call ``teacher.module``."""
        if self.cast is None:
            return self.module(*args, **kwargs)
        if torch.compiler.is_compiling():
            # A graph cannot ask whether the copy is true. It casts what it reads, and so is never wrong.
            low = {name: tensor.to(dtype) for name, tensor, dtype in narrowed(self.module, self.cast)}
        else:
            low = self._low_precision().tensors
        args, kwargs = tree_map_only(Tensor, self._as_cast, (args, kwargs))
        return functional_call(self.module, low, args, kwargs, tie_weights=False)

    def refresh(self) -> None:
        """Make the low-precision copy of ``cast`` anew.

        Needed after writes to the teacher that torch does not record: ``p.data.copy_()``, ``p.data.mul_()`` and the
        like, collective operations such as ``torch.distributed.broadcast(p, 0)``, NumPy views, kernels of your own.
        What torch records is noticed without it: in-place operations, ``load_state_dict``, ``.to()``, ``swapped``, new
        tensors and layers. Under ``torch.compile`` it is not needed at all: the graph casts the teacher itself.
        """
        if self._copy is not None:
            self._copy.forget()
            self._copy.follow(self.module)

    def train(self, mode: bool = True) -> "EMANTeacher":
        """Stays in eval mode whatever the mode: the teacher's BatchNorm never normalises with its own batch. But for
        ``torch.optim.swa_utils.update_bn(loader, teacher)``, which has just reset its statistics to take them anew."""
        return super().train(mode and sys._getframe(1).f_code is _UPDATE_BN)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "EMANTeacher":
        if self.dtype is None:
            return super()._apply(fn, *args, **kwargs)

        def but_for_the_dtype(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(but_for_the_dtype, *args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As any module's. While swapped with its student it has the teacher's own values, in copies."""
        state = super().state_dict(*args, **kwargs)
        if (exchange := self._turn.exchange) is not None:
            prefix = (args[1] if len(args) > 1 else kwargs.get("prefix", "")) + "module."
            for name, tensor in every_name(self.module):
                if prefix + name in state and (own := exchange.own(tensor)) is not None:
                    state[prefix + name] = own.clone()
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As any module's, but all or nothing: where it raises, the teacher and its step are as they were. With
        ``strict=False`` too something must match.

        Raises RuntimeError if nothing does, or while the teacher is swapped.
        """
        own = {f"module.{name}" for name, _ in every_name(self.module)}
        if own and not own & state_dict.keys():
            raise RuntimeError(
                f"nothing was loaded: no name of the teacher is in the state_dict, which has "
                f"{', '.join(list(state_dict)[:3]) or 'none'}; the teacher has {', '.join(sorted(own)[:3])}. A plain "
                "network's goes into teacher.module"
            )
        with all_or_nothing(self, [self]):
            return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._turn.exchange is not None:
            raise RuntimeError("the teacher is swapped with its student: load after the context has been left")
        # A file that knows no step (another library's, or one written before there was one) leaves it as it is.
        state_dict.setdefault(f"{prefix}_extra_state", self.get_extra_state())
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(name.startswith(prefix + "module.") for name in state_dict):
            self._turn.unrestored = ""

    def get_extra_state(self) -> Tensor:
        """The step, as a tensor: formats that know nothing else can store it."""
        return torch.tensor(self.step, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.step = int(state)

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference cannot be pickled, and a copy has not seen the student; the low-precision copy is made anew.
        state = self.__dict__ | {"_student": None, "_copy": None}
        if (exchange := self._turn.exchange) is not None:
            # The copy has the teacher's own values, and is swapped with nobody.
            module = deepcopy(self.module)
            for (_, tensor), (_, copy) in zip(every_name(self.module), every_name(module), strict=True):
                if (own := exchange.own(tensor)) is not None:
                    copy.detach().copy_(own)
            state["_modules"] = {**self._modules, "module": module}
        return state

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, step={self.step}, buffers={self.buffer_rule!r}" + (
            f", rules={self.rules}" if self.rules else ""
        )

    def _followed(self, student: nn.Module | None) -> nn.Module:
        if student is None:
            student = self._student() if self._student is not None else None
        if student is None:
            raise RuntimeError("no student has been seen yet (or it is gone): call update(student)")
        return student

    def _as_cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.cast) if tensor.is_floating_point() else tensor

    def _low_precision(self) -> LowPrecision:
        if self._copy is None or self._copy.dtype != self.cast:
            self._copy = LowPrecision(self.cast)
        self._copy.follow(self.module)
        return self._copy

    def _exchange_with(self, student: nn.Module | None) -> Exchange:
        student = self._followed(student)
        return Exchange(self.module, student, self.rules, self.buffer_rule, self.backend, self._turn)

    def _device(self) -> torch.device:
        first = next(every_name(self.module), None)
        return torch.device("cpu") if first is None else first[1].device

    def _prepare(self, found_inf_on_device: bool) -> None:
        """Bring the step, and the counter of skipped elements, to where the kernels read and write them."""
        on_device = self.capturable or found_inf_on_device
        counts = self.nonfinite == "skip"
        if not (on_device or counts or callable(self.momentum) or self.rounding == "stochastic"):
            return
        device = self._device()
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing and not self.capturable and (callable(self.momentum) or self.rounding == "stochastic"):
            raise RuntimeError(
                "a captured graph would replay this one step's momentum and random bits: EMANTeacher(capturable=True) "
                "keeps the step on the device, where each replay advances it"
            )
        step = counter(self._step, device) if on_device else self._step
        skipped = counter(0 if self.skipped is None else self.skipped, device) if counts else None
        if capturing and (step is not self._step or skipped is not self.skipped):
            raise RuntimeError("call update() once, with the same arguments, before the capture: it allocates")
        self._step, self.skipped = step, skipped
