"""The update and the swap as functions: of two networks, or of two lists of tensors."""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from .networks.errors import explain_synonyms
from .networks.pairing import check_lengths
from .options import Nonfinite, Rounding, Rule, SyncBuffers, make_options
from .plan.cache import last_plan
from .plan.plan import Plan
from .update.arguments import check_step, make_arguments
from .update.dispatch import is_tracing
from .update.eager import check_tensors, pair_tensors, update_lists, update_networks
from .update.locks import TeacherLock
from .update.swapping import Exchange, Swapped


@explain_synonyms
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
    sync_buffers: SyncBuffers = "none",
) -> None:
    """Let the teacher network follow the student: ``t <- t + (1 - m)(s - t)``, in place and in one pass.

    Floating-point parameters and buffers (BatchNorm's running statistics) are averaged, integer and bool buffers
    (num_batches_tracked) copied. Tensors are paired by name, with the prefixes of DDP and torch.compile stripped; tied
    tensors are updated once. The arithmetic is float32 (float64 if a tensor of the pair is), with one rounding into the
    teacher's dtype: the bits of ``torch.lerp(teacher, student, 1 - momentum)``. Where both are equal, infinities
    included, the teacher keeps its value. The plan made in the first call is cached as long as both networks live, and
    made again when a tensor has been replaced or has moved.

    Args:
        teacher: the network that is written: same shapes as the student's, any dtypes.
        student: the network that is read: another object than the teacher, with its own memory.
        momentum: in [0, 1]; 0 copies the student, 1 leaves the teacher unchanged, NaNs included. The kernel reads a 0-d
            tensor, float32 or float64 on the teacher's device, when it runs: without a device synchronization, and a
            captured CUDA graph replays with its current value. On a GPU its range is not checked.
        rules, buffers, backend, rounding, nonfinite, sync_buffers: see ``Options``.
        found_inf: a tensor of one element, on the teacher's device or the CPU, or on the student's if the teacher is in
            CPU memory. If it is not 0, nothing is written. GradScaler's float32 tensor is read by the kernel as it is;
            other dtypes are converted first.
        seed, step: of stochastic rounding. The seed is in [0, 2^32); the step must differ in each update: a number, or
            a 0-d int64 tensor on the teacher's device.
        skipped: a 0-d int64 tensor on the teacher's device, to which ``nonfinite="skip"`` adds the number of skipped
            elements.

    Raises:
        ValueError: the networks differ (all differences are listed), share memory, an option is unknown, or a tensor
            among the arguments is on another device than the teacher.
        RuntimeError: the requested backend is not available. Both are raised before anything is written.

    Like an optimizer step it records no gradient, and autograd knows that the teacher has been written.

    Source: Cai et al., "Exponential Moving Average Normalization for Self-Supervised and Semi-Supervised Learning",
    CVPR 2021, equations 4 to 6.

    >>> teacher, student = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    >>> _ = student.running_mean.fill_(1.0), student.num_batches_tracked.fill_(7)
    >>> eman_update_(teacher, student, momentum=0.75)
    >>> teacher.running_mean, teacher.num_batches_tracked
    (tensor([0.2500, 0.2500]), tensor(7))
    """
    if is_tracing():
        from .update import traced

        options = traced.trace_options(rules, buffers, backend, rounding, nonfinite, sync_buffers)
        given = {"found_inf": found_inf, "seed": seed, "step": step, "skipped": skipped}
        return traced.trace_networks(teacher, student, momentum, options, **given)
    options = make_options(rules, buffers, backend, rounding, nonfinite, sync_buffers)
    check_step(rounding, step)
    update_networks([teacher], student, make_arguments([momentum], found_inf, seed, step, skipped), options)


@explain_synonyms
def ema_update_(
    teacher_tensors: Iterable[Tensor] | Mapping[str, Any],
    student_tensors: Iterable[Tensor] | Mapping[str, Any],
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
    """Let teacher tensors follow student tensors: ``eman_update_`` without modules. Lists are paired by position, dicts
    and other mappings (TensorDicts, ``state_dict()``) by key.

    Floating-point tensors are averaged, all others copied. The plan is cached for what the tensors are and not for the
    objects: the next call may pass other views of the same memory.

    Args:
        teacher_tensors: the tensors that are written: a list, or a mapping, whose values may be mappings again.
        student_tensors: as many tensors, of the same shapes; of a mapping those with the same keys, in any order.
        momentum and all others: as in ``eman_update_``, with the same errors.

    Raises:
        ValueError: a key is missing from one of the mappings; the message names it. Nothing was written.

    >>> import torch
    >>> teacher, other = torch.zeros(2), torch.zeros(2)
    >>> ema_update_([teacher], [torch.ones(2)], momentum=0.75)
    >>> ema_update_({"a": teacher, "b": other}, {"b": torch.ones(2), "a": torch.zeros(2)}, momentum=0.5)
    >>> teacher, other
    (tensor([0.1250, 0.1250]), tensor([0.5000, 0.5000]))
    """
    if is_tracing():
        from .update import traced

        options = traced.trace_options(None, "ema", backend, rounding, nonfinite)
        given = {"found_inf": found_inf, "seed": seed, "step": step, "skipped": skipped}
        return traced.trace_lists(teacher_tensors, student_tensors, momentum, options, **given)
    options = make_options(None, "ema", backend, rounding, nonfinite)
    check_step(rounding, step)
    arguments = make_arguments([momentum], found_inf, seed, step, skipped)
    teachers, students, names = pair_tensors(teacher_tensors, student_tensors)
    update_lists(teachers, students, arguments, options, names=names)


def swapped(
    teacher: nn.Module | Iterable[Tensor] | Mapping[str, Any],
    student: nn.Module | Iterable[Tensor] | Mapping[str, Any],
    *,
    rules: Mapping[str, Rule] | None = None,
    buffers: Rule = "ema",
    backend: str | None = None,
) -> Swapped:
    """A context in which the student holds the teacher's values and the teacher the student's: to evaluate the average
    in the student's place.

    Values are exchanged in one pass without a temporary, and back again on leaving, also after an exception or an
    interrupt. Evaluate in eval mode: BatchNorm in training mode would change the teacher's statistics. A tensor that is
    replaced or converted in the meantime (``student.half()``) gets its network's own value back too.

    ``student.state_dict()`` holds references, which have the student's values again afterwards: save it inside, or keep
    ``{name: tensor.clone() for name, tensor in student.state_dict().items()}``.

    Args:
        teacher, student: as in ``eman_update_``, with equal dtypes; or two lists or mappings of tensors, paired as in
            ``ema_update_``, such as an average that is not a network and ``list(network.parameters())``.
        rules, buffers: tensors with the rule "skip" or "share" are not exchanged. The names of a mapping's tensors are
            its keys, and none of them counts as a buffer.
        backend: as in ``eman_update_``.

    Raises:
        ValueError: as ``eman_update_``, or dtypes differ: values would not come back unchanged.
        RuntimeError: on leaving, if an exchanged tensor has been replaced by one of another shape.

    >>> teacher, student = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(teacher.weight), nn.init.ones_(student.weight)
    >>> with swapped(teacher, student):
    ...     student.weight.item()
    0.0
    >>> student.weight.item()
    1.0
    """
    if isinstance(teacher, nn.Module) or isinstance(student, nn.Module):
        return Swapped(partial(_make_exchange, teacher, student, rules, buffers, backend))
    tensors = pair_tensors(teacher, student)
    return Swapped(partial(_make_exchange_of_tensors, *tensors, rules, backend))


def _make_exchange_of_tensors(
    teachers: list[Tensor],
    students: list[Tensor],
    names: list[str],
    rules: Mapping[str, Rule] | None,
    backend: str | None,
) -> Exchange:
    """The tensors become parameters of two networks, whose values are exchanged."""
    check_lengths(teachers, students)
    networks = []
    for argument, tensors in (("teacher", teachers), ("student", students)):
        check_tensors(argument, tensors, names)
        networks.append(nn.Module())
        networks[-1]._parameters.update(zip(names or map(str, range(len(tensors))), tensors, strict=True))
    return _make_exchange(*networks, rules, "ema", backend)


def _make_exchange(
    teacher: nn.Module, student: nn.Module, rules: Mapping[str, Rule] | None, buffers: Rule, backend: str | None
) -> Exchange:
    return Exchange(teacher, student, make_options(rules, buffers=buffers, backend=backend), TeacherLock())


def plan_for(teacher: nn.Module, student: nn.Module) -> Plan | None:
    """The plan that the last update of this pair of networks used, or None: which tensors are updated how and by which
    backend, which do not take the fast path, with the reason, and how many bytes an update reads and writes.
    ``print(teacher)`` of an EMANTeacher shows the same.

    >>> teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    >>> eman_update_(teacher, student, 0.999, backend="reference")
    >>> print(plan_for(teacher, student).describe())
    cpu: reference updates 2 tensors, 8 elements (2 ema float32 <- float32); reads 64 bytes, writes 32 bytes
    """
    return last_plan(teacher, student)
