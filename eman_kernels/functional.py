"""The update as a function: of two networks, or of two lists of tensors."""

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from numbers import Real
from operator import is_
from typing import Literal, get_args
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from . import backends
from .pairing import Pair, Rule, Watch, check, named_tensors, pair_lists, pair_modules
from .plan import Call, Plan

Rounding = Literal["nearest", "stochastic"]
Nonfinite = Literal["propagate", "skip"]


@dataclass(slots=True)
class _Followed:
    """What is remembered of teachers and their student."""

    options: tuple[object, ...]
    watch: Watch
    tensors: list[Tensor]  # teacher, student, teacher, student ...
    plan: Plan

    def holds(self, options: tuple[object, ...]) -> bool:
        return self.options == options and not self.plan.moved(self.tensors) and not self.watch.changed()


# The first teacher -> student -> _Followed. Weak in both, so that a plan never keeps a network alive.
_followed: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, _Followed]] = WeakKeyDictionary()
# The first teacher tensor of a list -> weak references to all tensors of both lists, the options, and the plan.
_lists: WeakIdKeyDictionary = WeakIdKeyDictionary()


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
        RuntimeError: the backend that was asked for is not available, or a teacher tensor requires grad outside of
            torch.no_grad(). Nothing has been written when either is raised.

    Source: Cai et al., "Exponential Moving Average Normalization for Self-Supervised and Semi-Supervised Learning",
    CVPR 2021, equations 4 to 6.
    """
    check_modes(rounding, seed, step is not None, nonfinite)
    call = call_of([momentum], found_inf, seed, step, skipped)
    update_networks([teacher], student, call, (rules, buffers, backends.requested(backend), rounding, nonfinite))


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

    Floating-point tensors are averaged, all others copied. The plan is remembered for these tensor objects (not for
    other views of the same memory) as long as the first teacher tensor lives.

    Args:
        teacher_tensors: tensors that are written.
        student_tensors: as many tensors of the same shapes.
        momentum and all others: as in ``eman_update_``; so are the errors.
    """
    check_modes(rounding, seed, step is not None, nonfinite)
    call = call_of([momentum], found_inf, seed, step, skipped)
    options = (backends.requested(backend), rounding, nonfinite)
    if not teacher_tensors and not student_tensors:
        return
    tensors = list(chain.from_iterable(zip(teacher_tensors, student_tensors)))  # noqa: B905  pair_lists says so better
    known = _lists.get(teacher_tensors[0]) if teacher_tensors else None
    if (
        known is None
        or known[1] != options
        or len(known[0]) != len(teacher_tensors) + len(student_tensors)
        or not all(map(is_, (weak() for weak in known[0]), tensors))
        or known[2].moved(tensors)
    ):
        plan = _plan(pair_lists(list(teacher_tensors), list(student_tensors)), *options)
        known = _lists[teacher_tensors[0]] = ([ref(tensor) for tensor in tensors], options, plan)
    _run(known[2], teacher_tensors, call)


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
    followed = _followed.get(teacher, {}).get(student)
    return followed.plan if followed else None


def _stacked(momenta: list[float | Tensor]) -> Tensor:
    """In one tensor where those lie that are tensors. A copy from the host would wait."""
    device = next(momentum.device for momentum in momenta if isinstance(momentum, Tensor))
    like = {"dtype": torch.float64, "device": device}
    return torch.stack([m.double() if isinstance(m, Tensor) else torch.full((), m, **like) for m in momenta])


def update_networks(
    teachers: Sequence[nn.Module],
    student: nn.Module,
    call: Call,
    options: tuple,
    copies: Sequence[nn.Module] = (),
) -> None:
    """Let several networks follow one. options: rules, buffers, backend, rounding, nonfinite. copies: the teachers'
    low-precision copies."""
    options = (*options, *map(ref, teachers[1:]), *map(ref, copies))
    students = _followed.setdefault(teachers[0], WeakKeyDictionary())
    followed = students.get(student)
    if followed is None or not followed.holds(options):
        followed = students[student] = _follow(teachers, student, options, copies)
    _run(followed.plan, followed.tensors[::2], call)


def _follow(
    teachers: Sequence[nn.Module], student: nn.Module, options: tuple, copies: Sequence[nn.Module]
) -> _Followed:
    if any(teacher is student for teacher in teachers):
        raise ValueError("teacher and student are the same module; the teacher must be a copy.deepcopy of the student")
    rules, buffers, backend, rounding, nonfinite = options[:5]
    pairs = []
    for group, teacher in enumerate(teachers):
        low = named_tensors(copies[group]) if copies else {}
        for pair in pair_modules(teacher, student, rules, buffers):
            cast = low.get(pair.name)
            pairs.append(replace(pair, group=group, cast=None if cast is pair.teacher else cast))
    watch = Watch(*teachers, student)
    return _Followed(
        options=(dict(rules) if rules is not None else None, *options[1:]),
        watch=watch,
        tensors=[tensor for pair in pairs for tensor in (pair.teacher, pair.student)],
        plan=_plan(pairs, backend, rounding, nonfinite, also_read=watch.objects()),
    )


def _plan(pairs: list[Pair], backend: str | None, rounding: str, nonfinite: str, also_read: Sequence = ()) -> Plan:
    stochastic, skip_nonfinite = rounding == "stochastic", nonfinite == "skip"
    return Plan(pairs, backend, stochastic=stochastic, skip_nonfinite=skip_nonfinite, also_read=also_read)


@torch.compiler.disable
@torch.no_grad()
def _swap(teacher: nn.Module, student: nn.Module, rules: Mapping[str, Rule] | None, backend: str | None) -> None:
    pairs = [replace(pair, rule="swap") for pair in pair_modules(teacher, student, rules)]
    differing = [
        f"{pair.name}: the teacher is {pair.teacher.dtype}, the student {pair.student.dtype}"
        for pair in pairs
        if pair.teacher.dtype != pair.student.dtype
    ]
    if differing:
        remedy = "Evaluate the teacher itself, or give both the same dtype."
        check([], differing, remedy, head="what is exchanged would not come back as it was; nothing was written.")
    plan = Plan(pairs, backends.requested(backend))
    torch.autograd.graph.increment_version([t for pair in pairs for t in (pair.teacher, pair.student)])
    plan.swap()


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
    momenta = list(map(as_momentum, momenta))
    if not {float}.issuperset(map(type, momenta)):
        momenta = momenta[0] if len(momenta) == 1 else _stacked(momenta)
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


def _run(plan: Plan, teachers: Sequence[Tensor], call: Call) -> None:
    if torch.is_grad_enabled() and any(map(Tensor.requires_grad.__get__, teachers)):
        name = next(name for name, tensor in zip(plan.names, teachers, strict=True) if tensor.requires_grad)
        raise RuntimeError(
            f"{name}: the teacher requires grad and is updated in place: call teacher.requires_grad_(False) once, or "
            f"update under torch.no_grad(). Nothing was written."
        )
    if plan.stalls_below and not isinstance(call.momenta, Tensor):
        _warn_of_a_stall(plan, max(call.momenta))
    # Autograd does not see what a kernel writes. Untold, it would not notice a backward pass that needs the old values.
    # Told now, while the tensors are in the cache that the kernel will fill with elements.
    torch.autograd.graph.increment_version(teachers)
    plan.run(call)


def _warn_of_a_stall(plan: Plan, momentum: float) -> None:
    if 0 < 1 - momentum < plan.stalls_below:
        plan.stalls_below = 0.0  # once
        # Whose line it is stands above ours and those of torch's decorators.
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
            __package__,
            "torch",
        ):
            level, frame = level + 1, frame.f_back
        warnings.warn(
            f"at momentum {momentum} a half-precision teacher rounded to nearest stands still: elements within a tenth "
            "of the student's move by less than half an ulp. Take rounding='stochastic', or a float32 teacher "
            "(EMANTeacher(student, dtype=torch.float32)).",
            stacklevel=level,
        )
