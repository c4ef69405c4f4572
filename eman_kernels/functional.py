"""The update as a function: of two networks, or of two lists of tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Real
from operator import is_
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from . import backends
from .pairing import Rule, Watch, pair_lists, pair_modules
from .plan import Plan


@dataclass(slots=True)
class _Followed:
    """What is remembered of a pair of networks."""

    options: tuple[object, ...]
    watch: Watch
    tensors: list[Tensor]  # teacher, student, teacher, student ...
    plan: Plan

    def holds(self, options: tuple[object, ...]) -> bool:
        return self.options == options and not self.plan.moved(self.tensors) and not self.watch.changed()


# teacher -> student -> _Followed. Weak in both, so that a plan never keeps a network alive.
_followed: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, _Followed]] = WeakKeyDictionary()
# The first teacher tensor of a list -> weak references to all tensors of both lists, the backend, and the plan.
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
) -> None:
    """Let the teacher network follow the student: ``t <- t + (1 - m)(s - t)``, in place and in one pass.

    Floating-point parameters and buffers (BatchNorm's running statistics) are averaged, integer and bool buffers
    (num_batches_tracked) copied. Tensors are paired by name, through the prefixes of DDP and torch.compile; tied ones
    are updated once. The arithmetic is float32 (float64 where a tensor of the pair is), with one rounding into the
    teacher's dtype: the bits of ``torch.lerp(teacher, student, 1 - momentum)``. The plan made in the first call is
    remembered as long as both networks live, and made anew when a tensor was replaced or has moved.

    Args:
        teacher: the network that is written. Shapes as the student's, dtypes as you like.
        student: the network that is read. Another object than the teacher, with its own memory.
        momentum: in [0, 1]; 0 copies the student, 1 leaves the teacher as it is. A 0-d tensor of float32 or float64 on
            the teacher's device is read there by the kernel, when it runs: nothing waits for the device, a captured
            CUDA graph replays with whatever the tensor then holds, and on a GPU its range is not checked.
        rules: name patterns (as in fnmatch) and "ema", "copy" or "skip"; the first that matches a name counts.
            Spectral norm's ``{"*.weight_u": "copy", "*.weight_v": "copy"}``, for example.
        buffers: "ema", "copy" or "skip" for the buffers that no pattern names.
        backend: one of ``available_backends()``; default: EMAN_KERNELS_BACKEND, else the fastest for the device.

    Raises:
        ValueError: the networks differ (all differences are listed), share memory, or an option is not known.
        RuntimeError: the backend that was asked for is not available, or a teacher tensor requires grad outside of
            torch.no_grad(). Nothing has been written when either is raised.

    Source: Cai et al., "Exponential Moving Average Normalization for Self-Supervised and Semi-Supervised Learning",
    CVPR 2021, equations 4 to 6.
    """
    momentum = as_momentum(momentum)
    options = (rules, buffers, backends.requested(backend))
    students = _followed.setdefault(teacher, WeakKeyDictionary())
    followed = students.get(student)
    if followed is None or not followed.holds(options):
        followed = students[student] = _follow(teacher, student, options)
    _run(followed.plan, followed.tensors[::2], momentum)


@torch.compiler.disable
def ema_update_(
    teacher_tensors: Sequence[Tensor],
    student_tensors: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Let teacher tensors follow student tensors, paired by position: ``eman_update_`` without modules and names.

    Floating-point tensors are averaged, all others copied. The plan is remembered for these tensor objects (not for
    other views of the same memory) as long as the first teacher tensor lives.

    Args:
        teacher_tensors: tensors that are written.
        student_tensors: as many tensors of the same shapes.
        momentum, backend: as in ``eman_update_``; so are the errors.
    """
    momentum = as_momentum(momentum)
    backend = backends.requested(backend)
    if not teacher_tensors and not student_tensors:
        return
    tensors = list(chain.from_iterable(zip(teacher_tensors, student_tensors)))  # noqa: B905  pair_lists says so better
    known = _lists.get(teacher_tensors[0]) if teacher_tensors else None
    if (
        known is None
        or known[1] != backend
        or len(known[0]) != len(teacher_tensors) + len(student_tensors)
        or not all(map(is_, (weak() for weak in known[0]), tensors))
        or known[2].moved(tensors)
    ):
        pairs = pair_lists(list(teacher_tensors), list(student_tensors))
        known = _lists[teacher_tensors[0]] = ([ref(tensor) for tensor in tensors], backend, Plan(pairs, backend))
    _run(known[2], teacher_tensors, momentum)


def plan_for(teacher: nn.Module, student: nn.Module) -> Plan | None:
    """The plan that the last update of this pair of networks used; ``print(plan_for(...).describe())``."""
    followed = _followed.get(teacher, {}).get(student)
    return followed.plan if followed else None


def _follow(teacher: nn.Module, student: nn.Module, options: tuple) -> _Followed:
    if teacher is student:
        raise ValueError("teacher and student are the same module; the teacher must be a copy.deepcopy of the student")
    rules, buffers, backend = options
    pairs = pair_modules(teacher, student, rules, buffers)
    watch = Watch(teacher, student)
    return _Followed(
        options=(dict(rules) if rules is not None else None, buffers, backend),
        watch=watch,
        tensors=[tensor for pair in pairs for tensor in (pair.teacher, pair.student)],
        plan=Plan(pairs, backend, also_read=watch.objects()),
    )


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


def _run(plan: Plan, teachers: Sequence[Tensor], momentum: float | Tensor) -> None:
    if torch.is_grad_enabled() and any(map(Tensor.requires_grad.__get__, teachers)):
        name = next(name for name, tensor in zip(plan.names, teachers, strict=True) if tensor.requires_grad)
        raise RuntimeError(
            f"{name}: the teacher requires grad and is updated in place: call teacher.requires_grad_(False) once, or "
            f"update under torch.no_grad(). Nothing was written."
        )
    # Autograd does not see what a kernel writes. Untold, it would not notice a backward pass that needs the old values.
    # Told now, while the tensors are in the cache that the kernel will fill with elements.
    torch.autograd.graph.increment_version(teachers)
    plan.run(momentum)
