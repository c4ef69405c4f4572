"""The update as a function: of two networks, or of two lists of tensors."""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from numbers import Real
from typing import Literal, get_args
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from . import backends
from .low_precision import LowPrecision
from .pairing import Pair, Rule, check, check_lengths, pair_lists, pair_modules
from .plan import Call, Plan
from .watch import Roots, Watch, increment_versions, is_plain

Rounding = Literal["nearest", "stochastic"]
Nonfinite = Literal["propagate", "skip"]


# Of one pair of networks, or one kind of lists: option sets in turn, or a buffer that alternates, need one each.
_PLANS = 8
# Kinds of lists. Loops that update a tensor at a time need many; a plan is some kilobytes.
_LISTS = 1024


@dataclass(slots=True)
class _Followed:
    """A plan, and what it rests on."""

    options: tuple[object, ...]
    watch: Watch
    plan: Plan
    # For each low-precision copy, the numbers of the tensors that it is of, and which of its tensors the plan writes.
    masters: list[list[int]] = field(default_factory=list)
    along: list[list[int]] = field(default_factory=list)


class _Known:
    """The plans of one pair of networks, or one kind of lists, the last used first."""

    def __init__(self, *references: object) -> None:
        self.references = references
        self.plans: list[_Followed] = []

    def find(self, options: tuple[object, ...], roots: Roots) -> tuple[_Followed, list[Tensor]] | None:
        """The plan of these options that is true of what the roots hold, and the tensors that they hold."""
        for i, followed in enumerate(self.plans):
            if followed.options == options and (tensors := followed.watch.look(roots)) is not None:
                if i:
                    self.plans.insert(0, self.plans.pop(i))
                return followed, tensors
        return None

    def add(self, followed: _Followed) -> None:
        self.plans.insert(0, followed)
        del self.plans[_PLANS:]


# By the ids of the first teacher and the student. Nothing here keeps a network alive, and what belongs to one goes with
# it. That an id may come again is no harm: a watch looks at all there is.
_networks: dict[tuple[int, int], _Known] = {}
# By how many tensors there are and where the first ones lie; the last used last.
_lists: dict[tuple[object, ...], _Known] = {}


def _known_networks(teacher: nn.Module, student: nn.Module) -> _Known:
    key = id(teacher), id(student)
    known = _networks.get(key)
    if known is None:

        def forget(_: object, networks: dict = _networks) -> None:
            networks.pop(key, None)

        known = _networks[key] = _Known(ref(teacher, forget), ref(student, forget))
    return known


def _known_lists(teachers: list[Tensor], students: list[Tensor]) -> _Known:
    first = teachers[0]
    key = len(teachers), *(tensor.data_ptr() if is_plain(tensor) else 0 for tensor in (first, students[0]))
    known = _lists.pop(key, None)
    # Others may have come to lie where the dead ones were: they are warned anew.
    if known is None or any(reference.expired() for reference in known.references):
        for old in [old for old, its in _lists.items() if any(reference.expired() for reference in its.references)]:
            del _lists[old]
        if len(_lists) >= _LISTS:
            del _lists[next(iter(_lists))]
        known = _Known(*(StorageWeakRef(first.untyped_storage()) for _ in range(is_plain(first))))
    _lists[key] = known
    return known


@torch.compiler.disable
def eman_update_(
    teacher: nn.Module,
    student: nn.Module,
    momentum: float | Tensor,
    *,
    rules: Mapping[str, Rule] | None = None,
    buffers: Rule = "ema",
    backend: str | None = None,
    found_inf: Tensor | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    step: int | Tensor | None = None,
    nonfinite: Nonfinite = "propagate",
    skipped: Tensor | None = None,
) -> None:
    """Let the teacher network follow the student: ``t <- t + (1 - m)(s - t)``, in place and in one pass.

    Floating-point parameters and buffers (BatchNorm's running statistics) are averaged, integer and bool buffers
    (num_batches_tracked) copied. Tensors are paired by name, through the prefixes of DDP and torch.compile; tied ones
    are updated once. The arithmetic is float32 (float64 where a tensor of the pair is), with one rounding into the
    teacher's dtype: the bits of ``torch.lerp(teacher, student, 1 - momentum)``; where both are equal, infinities too,
    the teacher stays as it is. The plan made in the first call is remembered as long as both networks live, and made
    anew when a tensor was replaced or has moved.

    Args:
        teacher: the network that is written. Shapes as the student's, dtypes as you like.
        student: the network that is read. Another object than the teacher, with its own memory.
        momentum: in [0, 1]; 0 copies the student, 1 leaves the teacher as it is, NaNs too. A 0-d tensor of float32 or
            float64 on the teacher's device is read there by the kernel, when it runs: nothing waits for the device, a
            captured CUDA graph replays with whatever the tensor then holds, and on a GPU its range is not checked.
        rules: name patterns (as in fnmatch) and "ema", "copy" or "skip"; the first that matches a name counts.
            Spectral norm's ``{"*.weight_u": "copy", "*.weight_v": "copy"}``, for example.
        buffers: "ema", "copy" or "skip" for the buffers that no pattern names.
        backend: one of ``available_backends()``; default: EMAN_KERNELS_BACKEND, else the fastest for the device.
        found_inf: a tensor of one element, on the teacher's device or the CPU; where it is not 0, nothing is written.
            GradScaler's is float32, which the kernel reads as it is; of another dtype it is converted first.
        rounding: of bfloat16 and float16 teachers: "nearest", or "stochastic", up or down at random so that the mean
            is the exact average: at a high momentum a teacher rounded to nearest stands still.
        seed, step: of stochastic rounding, which gives the same bits for the same pair of them on every backend; the
            seed in [0, 2^32), the step another for each update: a number, or a 0-d int64 tensor on the teacher's
            device.
        nonfinite: "propagate" NaNs and infinities of the student, or "skip" them: such an element keeps its teacher's
            value. A finite one then takes the place of a teacher's that is not finite. At momentum 1 nothing changes.
        skipped: a 0-d int64 tensor on the teacher's device, to which the number of skipped elements is added.

    Raises:
        ValueError: the networks differ (all differences are listed), share memory, an option is not known, or a tensor
            among the options lies on another device than the teacher.
        RuntimeError: the backend that was asked for is not available. Nothing has been written when either is raised.

    Like an optimizer's step it records no gradient, and autograd notices that the teacher was written.

    Source: Cai et al., "Exponential Moving Average Normalization for Self-Supervised and Semi-Supervised Learning",
    CVPR 2021, equations 4 to 6.
    """
    check_modes(rounding, seed, step is not None, nonfinite)
    call = call_of([momentum], found_inf, seed, step, skipped)
    update_networks([teacher], student, call, update_options(rules, buffers, backend, rounding, nonfinite))


@torch.compiler.disable
def ema_update_(
    teacher_tensors: Sequence[Tensor],
    student_tensors: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    backend: str | None = None,
    found_inf: Tensor | None = None,
    rounding: Rounding = "nearest",
    seed: int = 0,
    step: int | Tensor | None = None,
    nonfinite: Nonfinite = "propagate",
    skipped: Tensor | None = None,
) -> None:
    """Let teacher tensors follow student tensors, paired by position: ``eman_update_`` without modules and names.

    Floating-point tensors are averaged, all others copied. The plan is remembered for what the tensors are, not for the
    objects: the next call may bring other views of the same memory.

    Args:
        teacher_tensors: tensors that are written.
        student_tensors: as many tensors of the same shapes.
        momentum and all others: as in ``eman_update_``; so are the errors.
    """
    check_modes(rounding, seed, step is not None, nonfinite)
    call = call_of([momentum], found_inf, seed, step, skipped)
    options = (backends.requested(backend), rounding, nonfinite)
    teachers, students = list(teacher_tensors), list(student_tensors)
    if not teachers and not students:
        return
    check_lengths(teachers, students)
    known = _known_lists(teachers, students)
    roots = [teachers, students]
    found = known.find(options, roots)
    if found is None:
        watch = Watch(roots)
        tensors = watch.look(roots)
        found = _Followed(options, watch, _plan(pair_lists(teachers, students), tensors, *options)), tensors
        known.add(found[0])
    followed, tensors = found
    plan = followed.plan
    if plan.stalls_below:
        _warn_of_a_stall(plan, call.momenta)
    increment_versions(tensors, plan.written)
    plan.run(call, tensors)


@contextmanager
def swapped(
    teacher: nn.Module,
    student: nn.Module,
    *,
    rules: Mapping[str, Rule] | None = None,
    backend: str | None = None,
) -> Iterator[None]:
    """Within the context the student holds the teacher's values and the teacher the student's: to evaluate the average
    in the student's place. They are exchanged in one pass without a temporary, and back again on leaving, after an
    exception too. Evaluate in eval mode: BatchNorm in training mode would change the teacher's statistics.

    Args:
        teacher, student: as in ``eman_update_``, and of the same dtypes.
        rules: tensors whose rule is "skip" stay where they are.
        backend: as in ``eman_update_``.

    Raises:
        ValueError: as ``eman_update_``, or a dtype differs: it would not come back as it was.
    """
    _swap(teacher, student, rules, backend)
    try:
        yield
    finally:
        _swap(teacher, student, rules, backend)


def plan_for(teacher: nn.Module, student: nn.Module) -> Plan | None:
    """The plan that the last update of this pair of networks used; ``print(plan_for(...).describe())``."""
    known = _networks.get((id(teacher), id(student)))
    plans = known.plans if known is not None else []
    return next((followed.plan for followed in plans if followed.options[0] == "update"), None)


def _stacked(momenta: list[float | Tensor]) -> Tensor:
    """In one tensor where those lie that are tensors. A copy from the host would wait."""
    device = next(momentum.device for momentum in momenta if isinstance(momentum, Tensor))
    like = {"dtype": torch.float64, "device": device}
    return torch.stack([m.double() if isinstance(m, Tensor) else torch.full((), m, **like) for m in momenta])


def update_options(
    rules: Mapping[str, Rule] | None, buffers: Rule, backend: str | None, rounding: Rounding, nonfinite: Nonfinite
) -> tuple[object, ...]:
    """What a plan of an update is for, besides the networks; the rules in their order."""
    return "update", tuple(rules.items()) if rules else (), buffers, backends.requested(backend), rounding, nonfinite


def update_networks(
    teachers: Sequence[nn.Module],
    student: nn.Module,
    call: Call,
    options: tuple[object, ...],
    copies: Sequence[LowPrecision] = (),
) -> None:
    """Let several networks follow one. options: those of update_options. copies: the teachers' low-precision copies."""
    known = _known_networks(teachers[0], student)
    roots = [*teachers, student]
    for copy in copies:
        roots.append(copy.copies)
    found = known.find(options, roots)
    if found is None:
        found = _follow(teachers, student, options, copies)
        known.add(found[0])
    followed, tensors = found
    plan = followed.plan
    if plan.stalls_below:
        _warn_of_a_stall(plan, call.momenta)
    for copy, numbers in zip(copies, followed.masters, strict=True):
        copy.refresh([tensors[i] for i in numbers])
    increment_versions(tensors, plan.written)
    _note_copies(copies, followed, tensors)
    plan.run(call, tensors)
    if copies and any(work.table is None for work in plan.works):
        _note_copies(copies, followed, tensors)  # torch's own operations have counted their writes themselves


def _note_copies(copies: Sequence[LowPrecision], followed: _Followed, tensors: list[Tensor]) -> None:
    for copy, numbers, which in zip(copies, followed.masters, followed.along, strict=True):
        copy.written([tensors[i] for i in numbers], which)


def _follow(
    teachers: Sequence[nn.Module], student: nn.Module, options: tuple, copies: Sequence[LowPrecision]
) -> tuple[_Followed, list[Tensor]]:
    if any(teacher is student for teacher in teachers):
        raise ValueError("teacher and student are the same module; the teacher must be a copy.deepcopy of the student")
    _, rules, buffers, backend, rounding, nonfinite = options
    pairs = [
        replace(pair, group=group)
        for group, teacher in enumerate(teachers)
        for pair in pair_modules(teacher, student, dict(rules), buffers)
    ]
    masters = [copy.follow(teacher) for teacher, copy in zip(teachers, copies, strict=False)]  # there may be none
    # What is not float32 no kernel writes along: it is copied when it is to be read.
    low = {
        id(master): cast
        for copy, its in zip(copies, masters, strict=True)
        for master, cast in zip(its, copy.copies, strict=True)
        if master.dtype == torch.float32
    }
    pairs = [replace(pair, cast=low.get(id(pair.teacher))) for pair in pairs]
    roots = [*teachers, student, *(copy.copies for copy in copies)]
    watch = Watch(roots)
    tensors = watch.look(roots)
    written = {id(pair.teacher) for pair in pairs if pair.cast is not None}
    number = {id(tensor): i for i, tensor in enumerate(tensors)}
    return _Followed(
        options=options,
        watch=watch,
        plan=_plan(pairs, tensors, backend, rounding, nonfinite),
        masters=[[number[id(master)] for master in its] for its in masters],
        along=[[i for i, master in enumerate(its) if id(master) in written] for its in masters],
    ), tensors


def _plan(
    pairs: list[Pair], tensors: list[Tensor], backend: str | None, rounding: Rounding, nonfinite: Nonfinite
) -> Plan:
    return Plan(pairs, tensors, backend, stochastic=rounding == "stochastic", skip_nonfinite=nonfinite == "skip")


@torch.compiler.disable
def _swap(teacher: nn.Module, student: nn.Module, rules: Mapping[str, Rule] | None, backend: str | None) -> None:
    options = "swap", tuple(rules.items()) if rules else (), backends.requested(backend)
    known = _known_networks(teacher, student)
    found = known.find(options, [teacher, student])
    if found is None:
        found = _follow_to_swap(teacher, student, options)
        known.add(found[0])
    followed, tensors = found
    increment_versions(tensors, followed.plan.written)
    followed.plan.swap(tensors)


def _follow_to_swap(teacher: nn.Module, student: nn.Module, options: tuple) -> tuple[_Followed, list[Tensor]]:
    _, rules, backend = options
    watch = Watch([teacher, student])
    tensors = watch.look([teacher, student])
    pairs = [replace(pair, rule="swap") for pair in pair_modules(teacher, student, dict(rules))]
    differing = [
        f"{pair.name}: the teacher is {pair.teacher.dtype}, the student {pair.student.dtype}"
        for pair in pairs
        if pair.teacher.dtype != pair.student.dtype
    ]
    if differing:
        remedy = "Evaluate the teacher itself, or give both the same dtype."
        check([], differing, remedy, head="what is exchanged would not come back as it was; nothing was written.")
    return _Followed(options, watch, Plan(pairs, tensors, backend)), tensors


@lru_cache  # bounded: a seed may be another in each step
def check_modes(rounding: str, seed: int, has_step: bool, nonfinite: str) -> None:
    """Raises ValueError for a rounding or a nonfinite mode that is none, or one that lacks its seed or step."""
    for name, value, known in (("rounding", rounding, Rounding), ("nonfinite", nonfinite, Nonfinite)):
        if value not in get_args(known):
            raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, get_args(known)))}")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must be in [0, 2^32), and is {seed}")
    if rounding == "stochastic" and not has_step:
        raise ValueError("rounding='stochastic' needs step=, the number of this update: each must draw its own bits")


def call_of(
    momenta: Sequence[float | Tensor],
    found_inf: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor | None = None,
    skipped: Tensor | None = None,
) -> Call:
    """The call, with what it was given checked as far as can be without waiting for a device.

    Raises TypeError or ValueError for a momentum that is none, or a tensor of another shape or dtype.
    """
    momenta = [as_momentum(momentum) for momentum in momenta]
    for momentum in momenta:
        if type(momentum) is not float:
            momenta = momenta[0] if len(momenta) == 1 else _stacked(momenta)
            break
    if found_inf is not None:
        if found_inf.numel() != 1:
            raise ValueError(f"found_inf must be one number, and is of shape {tuple(found_inf.shape)}")
        found_inf = found_inf.detach().reshape(()).to(torch.float32)
    if step is None:
        step = 0
    elif isinstance(step, Tensor):
        _check_counter("step", step)
    if skipped is not None:
        _check_counter("skipped", skipped)
    return Call(momenta, found_inf, seed, step, skipped)


def _check_counter(name: str, counter: Tensor) -> None:
    if counter.dim() or counter.dtype != torch.int64:
        what = f"{counter.dtype} of shape {tuple(counter.shape)}"
        raise TypeError(f"{name} in a tensor must be 0-d and of int64, and is {what}")


def as_momentum(momentum: float | Tensor) -> float | Tensor:
    """A float in [0, 1], or the tensor that may hold one. Raises TypeError or ValueError for anything else."""
    if type(momentum) is float and 0.0 <= momentum <= 1.0:
        return momentum
    if isinstance(momentum, Tensor):
        if momentum.dim() or momentum.dtype not in (torch.float32, torch.float64):
            what = f"{momentum.dtype} of shape {tuple(momentum.shape)}"
            raise TypeError(f"a momentum in a tensor must be 0-d and of float32 or float64, and is {what}")
        if momentum.device.type != "cpu":
            return momentum  # to look at it would be to wait for the device
    elif not isinstance(momentum, Real):
        raise TypeError(f"momentum must be a number in [0, 1] or a 0-d tensor, not a {type(momentum).__name__}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], and is {float(momentum)}")
    return momentum if isinstance(momentum, Tensor) else float(momentum)


def _warn_of_a_stall(plan: Plan, momenta: list[float] | Tensor) -> None:
    """Once, where the teacher will hardly move."""
    if not isinstance(momenta, Tensor) and 0 < 1 - max(momenta) < plan.stalls_below:
        plan.stalls_below = 0.0
        # Whose line it is stands above ours and those of torch's decorators.
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
            __package__,
            "torch",
        ):
            level, frame = level + 1, frame.f_back
        warnings.warn(
            f"at momentum {max(momenta)} a half-precision teacher rounded to nearest stands still: elements within a "
            "tenth of the student's move by less than half an ulp. Take rounding='stochastic', or a float32 teacher "
            "(EMANTeacher(student, dtype=torch.float32)).",
            stacklevel=level,
        )
