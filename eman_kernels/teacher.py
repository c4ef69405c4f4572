"""EMANTeacher, the teacher as a module, and EMANTeachers, several teachers of one student."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import Unpack

from .networks.errors import explain_synonyms
from .options import Nonfinite, Options, Rounding, Rule, SyncBuffers, TeacherOptions, make_options
from .plan.chunks import MAX_TEACHERS
from .update.arguments import check_momentum, check_seed
from .update.caching import separate_caches
from .update.copying import adopt_module, apply_keeping_dtype, convert_dtype, copy_student
from .update.dispatch import update_teachers
from .update.following import follow_optimizer
from .update.loading import all_or_nothing, fill_in_step, keep_dtypes, renew_caches_after_load
from .update.low_precision import check_cast, forward_in_low_precision
from .update.state import Momentum, OptionAttribute, StateAttribute, TeacherState
from .update.statistics import find_pending_norms, will_estimate
from .update.swapping import Exchange, Swapped


class EMANTeacher(nn.Module):
    """A teacher network that follows a student as an exponential moving average, BatchNorm statistics included.

    It is a deep copy of the student, always in eval mode (``train()`` does not change that) and without gradients. Call
    it like the network, and call ``update(student)`` after the optimizer step. ``teacher.module`` is the plain network.

    Args:
        student: the network to follow; the wrappers of DDP, DataParallel and torch.compile are stripped.
        momentum: a number in [0, 1], a 0-d tensor on the teacher's device (which the kernel reads), or a schedule
            ``step -> momentum`` (see ``eman_kernels.schedules``), where step is the number of updates made. Default
            0.999.
        module: network to use as the teacher instead of a deep copy: an existing key encoder, a sharded network, a
            second instance of a student that cannot be copied. It takes over the student's values first.
        keep_values: leave the values of ``module`` as they are. Default False.
        rules, buffers, backend, rounding, nonfinite, sync_buffers: see ``Options``. They are attributes of the teacher
            (``buffers`` is ``buffer_rule``) and can be assigned; ``teacher.options`` holds all of them.
        dtype: the floating-point dtype of the teacher; default: the student's. Use ``torch.float32`` for a bfloat16
            student: rounded to nearest, a bfloat16 teacher barely moves at high momentum. ``to(torch.bfloat16)`` of the
            teacher, or of a module that contains it, does not change the dtype.
        seed: of stochastic rounding, in [0, 2^32); default 0.
        cast: ``torch.bfloat16`` or ``torch.float16``: ``teacher(x)`` runs the network in this dtype, on inputs cast to
            it. From the first such call on, updates write low-precision copies of the float32 teacher's tensors in the
            same pass. BatchNorm stays in float32, which torch accepts beside bfloat16 inputs. ``teacher.module`` and
            state_dict() hold the float32 teacher. The forward runs the teacher's own modules, with the copies
            substituted for the duration of the call. After a write that torch does not track, call ``refresh()``.
        capturable: store the step on the teacher's device, so that each replay of a captured CUDA graph increments it,
            and with it the schedule (which then gets the step as a 0-d float64 tensor) and stochastic rounding.

    With ``nonfinite="skip"``, ``teacher.skipped`` counts the skipped elements (int64; None before the first update).

    Raises:
        ValueError: an option is unknown or out of range, or ``module`` differs from the student.
        TypeError: the student cannot be deep-copied; the message names the cause.

    state_dict() holds the network under ``module.`` and the counts; training resumes exactly from it.

    >>> student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    >>> teacher = EMANTeacher(student, momentum=0.99)
    >>> teacher.update(student)
    >>> teacher(torch.ones(1, 4)).requires_grad
    False
    """

    momentum = StateAttribute[Momentum]()
    seed = StateAttribute[int](check_seed)
    cast = StateAttribute[torch.dtype | None]()
    capturable = StateAttribute[bool]()
    skipped = StateAttribute[Tensor | None]()
    options = StateAttribute[Options]()
    buffer_rule = OptionAttribute[Rule]("buffers")
    backend = OptionAttribute[str | None]("backend")
    rounding = OptionAttribute[Rounding]("rounding")
    nonfinite = OptionAttribute[Nonfinite]("nonfinite")
    sync_buffers = OptionAttribute[SyncBuffers]("sync_buffers")

    @explain_synonyms
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
        options = make_options(rules, buffers, backend, rounding, nonfinite, sync_buffers)
        check_seed(seed)
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating-point dtype, but is {dtype}")
        if not callable(momentum):
            check_momentum(momentum)
        if module is None:
            self.module: nn.Module = copy_student(student, options)
        else:
            self.module = adopt_module(module, student, options, keep_values)
        if dtype is not None:
            convert_dtype(self.module, dtype, student)
        check_cast(self.module, cast)
        self.dtype = dtype
        self.state = TeacherState(momentum, options, seed, cast, capturable)
        self.register_load_state_dict_post_hook(renew_caches_after_load)
        self.state.remember_student(student)
        self.eval()

    @property
    def rules(self) -> Mapping[str, Rule]:
        """The rules by name pattern, read-only. Assign a new mapping to change them."""
        return MappingProxyType(dict(self.options.rules))

    @rules.setter
    def rules(self, rules: Mapping[str, Rule] | None) -> None:
        self.options = replace(self.options, rules=rules or {})

    @property
    def step(self) -> int:
        """The number of updates made. Synchronizes with the device if the step is stored there."""
        return int(self.state.step)

    @step.setter
    def step(self, step: int) -> None:
        self.state.set_step(step)

    @property
    def is_swapped(self) -> bool:
        """Whether the teacher holds the student's values: see ``swapped``."""
        return self.state.lock.exchange is not None

    @explain_synonyms
    def update(
        self,
        student: nn.Module | None = None,
        *,
        momentum: float | Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Follow the student by one step, in place and in one pass; see ``eman_update_`` for the arithmetic and errors.

        Args:
            student: the network to follow; default: that of the last update, or of the constructor.
            momentum: for this update, instead of the teacher's own.
            found_inf: GradScaler's tensor, or any tensor of one element: if it is not 0, the teacher and its step stay
                unchanged. On a GPU this needs no synchronization; the step is then stored on the device as well.

        >>> student = nn.Linear(4, 4)
        >>> teacher = EMANTeacher(student)
        >>> teacher.update(student)
        >>> teacher.update(found_inf=torch.ones(1))  # GradScaler has skipped the optimizer step
        >>> teacher.step
        1
        """
        update_teachers((self.module,), (self.state,), student, momentum, found_inf)

    def follow(self, optimizer: Optimizer, student: nn.Module, *, every: int = 1, start: int = 0) -> RemovableHandle:
        """Call ``update(student)`` after each optimizer step that is actually taken: once per step with gradient
        accumulation, and not for steps that GradScaler skips (no synchronization if a fused optimizer skips them).

        The wrappers of accelerate, Lightning and Fabric are stripped; others (Lookahead) are followed themselves. A
        second call with the same optimizer replaces the first.

        Args:
            optimizer: the optimizer whose steps count; if there are several, the one that is stepped last.
            student: as in ``update``.
            every: update after every so many steps; default 1. ``state_dict()`` stores how many have been counted.
            start: skip the updates of the first so many steps; default 0. The average then starts from the teacher's
                own values, unless its momentum is ``schedules.CopyFirst``. Resumed training, whose teacher has been
                updated before, does not wait again.

        Returns:
            A handle, whose ``remove()`` ends it.

        Raises:
            ValueError: every is below 1, or start below 0. TypeError: torch runs no hooks after its steps (as for SAM).

        >>> student = nn.Linear(4, 4)
        >>> teacher = EMANTeacher(student)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> handle = teacher.follow(optimizer, student)
        >>> student(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> teacher.step
        1
        """
        return follow_optimizer(self.update, self.state, optimizer, student, every, start)

    def swapped(self, student: nn.Module | None = None) -> Swapped:
        """A context in which the student holds the teacher's values, and the teacher the student's: see
        ``eman_kernels.swapped``. The teacher cannot be updated in the meantime; ``state_dict()``, ``deepcopy`` and
        ``torch.save`` of the teacher still contain its own values. Save the student's ``state_dict()`` before the end.

        >>> student = nn.Linear(4, 4)
        >>> teacher = EMANTeacher(student)
        >>> with teacher.swapped(student):
        ...     averaged = student(torch.ones(1, 4))
        """
        return Swapped(partial(self._make_exchange, student))

    def swap(self, student: nn.Module | None = None) -> None:
        """Enter ``swapped`` without ``with``, until ``swap_back()``: for hooks that come in pairs.

        >>> student = nn.Linear(4, 4)
        >>> teacher = EMANTeacher(student)
        >>> teacher.swap(student)
        >>> averaged = student(torch.ones(1, 4))
        >>> teacher.swap_back()
        """
        self._make_exchange(student).enter()

    def swap_back(self) -> None:
        """End what ``swap`` has begun. Raises RuntimeError if nothing is swapped, or if a swapped tensor has been
        replaced by one of another shape."""
        exchange = self.state.lock.exchange  # read once, because another thread may end it
        if exchange is None:
            raise RuntimeError("teacher and student are not swapped")
        if lost := exchange.leave():
            raise RuntimeError(lost)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output, without gradients. For gradients to the input, call ``teacher.module``."""
        state = self.state
        if state.pending_norms and (estimates := will_estimate(state.pending_norms)) != self.training:
            super().train(estimates)
        traced = torch.compiler.is_compiling()
        caching = [] if traced else state.renew_stale_caches(self.module)
        if state.cast is None:
            return self.module(*args, **kwargs)
        if traced:  # not within a `with`, in which a graph break would make the whole call eager
            return forward_in_low_precision(self.module, None, state.cast, (args, kwargs))
        copy = state.refresh_low_precision(self.module)
        with separate_caches(self.module, caching):
            return forward_in_low_precision(self.module, copy, state.cast, (args, kwargs))

    def refresh(self) -> None:
        """Refresh the low-precision copy of ``cast``, and what modules have cached.

        Needed only after writes to the teacher that torch does not track: ``p.data.copy_()``, ``p.data.mul_()`` and the
        like, collectives such as ``torch.distributed.broadcast(p, 0)``, NumPy views, custom kernels. In-place
        operations, ``load_state_dict``, ``.to()``, ``swapped``, new tensors and new layers are tracked. Never needed
        under ``torch.compile``, where the graph casts the teacher itself.
        """
        self.state.caches = None
        if self.state.low_precision is not None:
            self.state.low_precision.mark_stale()
            self.state.low_precision.follow(self.module)

    def train(self, mode: bool = True) -> "EMANTeacher":
        """Stays in eval mode whatever the mode: the teacher's BatchNorm never normalizes with its own batch. The
        exception is ``torch.optim.swa_utils.update_bn`` of the teacher or a wrapper around it: calls of the teacher
        are in training mode while its statistics are being estimated again."""
        self.state.pending_norms = find_pending_norms(self.module, self.state.step) if mode else []
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "EMANTeacher":
        return super()._apply(fn if self.dtype is None else partial(apply_keeping_dtype, fn), *args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Like that of any module. While swapped it contains copies of the teacher's own values."""
        save = partial(super().state_dict, *args, **kwargs)
        exchange = self.state.lock.exchange  # read once, because another thread may end it
        state = save() if exchange is None else exchange.save_own_values(save)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        state.update((prefix + name, count) for name, count in self.state.counts().items())
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Like that of any module, but all or nothing: if it raises, the teacher and its step are unchanged. With
        ``assign=True`` a teacher with ``dtype`` keeps that dtype.

        Raises RuntimeError if no name matches, even with ``strict=False``, or while the teacher is swapped.
        """
        with all_or_nothing(self, [self.state], state_dict):
            return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: dict[str, Any], *args: Any
    ) -> None:
        if self.is_swapped:
            raise RuntimeError("the teacher is swapped with its student: load after the swap has ended")
        fill_in_step(state_dict, prefix, self.state)
        self.state.take_counts(state_dict, prefix)
        if self.dtype is not None and metadata.get("assign_to_params_buffers"):
            keep_dtypes(self.module, self.dtype, state_dict, prefix + "module.")
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)
        if any(name.startswith(prefix + "module.") for name in state_dict):
            self.state.lock.unrestored = ""

    def get_extra_state(self) -> Tensor:
        """The step as a tensor, so that tensor-only formats can store it."""
        return torch.tensor(self.step, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Set the step from a checkpoint."""
        self.step = int(state)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if (exchange := self.state.lock.exchange) is not None:
            # The copy has the teacher's own values, and is not swapped.
            state["_modules"] = {**self._modules, "module": exchange.copy_teacher()}
        return state

    def extra_repr(self) -> str:
        rules = f", rules={dict(self.rules)}" if self.rules else ""
        options = f"momentum={self.momentum}, step={self.step}, buffers={self.buffer_rule!r}{rules}"
        return "\n".join(filter(None, (options, self.state.describe_plan(self.module))))

    def _make_exchange(self, student: nn.Module | None) -> Exchange:
        student = self.state.find_student() if student is None else student
        return Exchange(self.module, student, self.options, self.state.lock)


class EMANTeachers(nn.Module):
    """Several teachers of one student, each with its own momentum, updated in one pass that reads the student once.

    ``teachers[i]`` is an EMANTeacher; ``teachers(x)`` is the list of their outputs.

    Args:
        student: the network to follow.
        momenta: a momentum or a schedule for each teacher; 1 to 8 of them.
        options: those of EMANTeacher from ``rules`` on, for all teachers.

    Raises:
        ValueError: as EMANTeacher, or the number of momenta is not 1 to 8.

    >>> student = nn.Linear(4, 4)
    >>> teachers = EMANTeachers(student, momenta=[0.99, 0.999, 0.9999])
    >>> teachers.update(student)
    >>> [teacher.step for teacher in teachers]
    [1, 1, 1]
    """

    def __init__(self, student: nn.Module, momenta: Sequence[Momentum], **options: Unpack[TeacherOptions]) -> None:
        super().__init__()
        if not 1 <= len(momenta) <= MAX_TEACHERS:
            raise ValueError(f"momenta must be 1 to {MAX_TEACHERS}, but there are {len(momenta)}")
        self.teachers = nn.ModuleList(EMANTeacher(student, momentum, **options) for momentum in momenta)

    @explain_synonyms
    def update(
        self,
        student: nn.Module | None = None,
        *,
        momentum: float | Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Let all teachers follow the student by one step: ``EMANTeacher.update`` in one pass. momentum: for all."""
        update_teachers([t.module for t in self], [t.state for t in self], student, momentum, found_inf)

    def follow(self, optimizer: Optimizer, student: nn.Module, *, every: int = 1, start: int = 0) -> RemovableHandle:
        """``EMANTeacher.follow`` for all teachers."""
        return follow_optimizer(self.update, self[0].state, optimizer, student, every, start)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Like that of any module, but all or nothing, as for EMANTeacher."""
        with all_or_nothing(self, [teacher.state for teacher in self], state_dict):
            return super().load_state_dict(state_dict, strict, assign)

    @property
    def skipped(self) -> Tensor | None:
        """With nonfinite="skip": how many elements of the student have been skipped."""
        return self[0].skipped

    def swapped(self, index: int, student: nn.Module | None = None) -> Swapped:
        """``teachers[index].swapped(student)``."""
        return self[index].swapped(student)

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Each teacher's output."""
        return [teacher(*args, **kwargs) for teacher in self]

    def __getitem__(self, index: int) -> EMANTeacher:
        return self.teachers[index]

    def __len__(self) -> int:
        return len(self.teachers)

    def __iter__(self) -> Iterator[EMANTeacher]:
        return iter(self.teachers)
