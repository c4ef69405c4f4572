"""The update as a function: of two networks, or of two lists of tensors."""

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import backends, distributed
from .caches import caching_modules, renew
from .call import Call, Nonfinite, Rounding, call_of, check_modes
from .distributed import SyncBuffers, check_sync
from .known import Followed, known_lists, known_networks, networks_plan
from .low_precision import LowPrecision
from .pairing import Pair, Rule, check_lengths, check_order, named_tensors, pair_lists, pair_modules
from .plan import Plan
from .staging import StagedPlan, is_elsewhere
from .watch import Watch, increment_versions


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
        rules: name patterns (as in fnmatch) and "ema", "copy", "skip" or "share"; the first that matches a name counts.
            ``{"predictor.*": "skip"}``, for example. "share" is for what both networks hold as one tensor.
        buffers: "ema", "copy", "skip" or "share" for the buffers that no pattern names. With "ema", those whose average
            means nothing are copied all the same: spectral norm's vectors, prune's masks, quantisation observers'
            ranges.
        backend: one of ``available_backends()``; default: EMAN_KERNELS_BACKEND, else the fastest for the device.
        found_inf: a tensor of one element, on the teacher's device or the CPU, and of a teacher in CPU memory on the
            student's; where it is not 0, nothing is written. GradScaler's is float32, which the kernel reads as it is;
            of another dtype it is converted first.
        rounding: of bfloat16 and float16 teachers: "nearest", or "stochastic", up or down at random so that the mean
            is the exact average: at a high momentum a teacher rounded to nearest does not move.
        seed, step: of stochastic rounding, which gives the same bits for the same pair of them on every backend; the
            seed in [0, 2^32), the step another for each update: a number, or a 0-d int64 tensor on the teacher's
            device.
        nonfinite: "propagate" NaNs and infinities of the student, or "skip" them: such an element keeps its teacher's
            value. A finite one then takes the place of a teacher's that is not finite. At momentum 1 nothing changes.
        skipped: a 0-d int64 tensor on the teacher's device, to which the number of skipped elements is added.
        sync_buffers: "none", or, over all processes (of the student's DistributedDataParallel, if it is one), "mean":
            the teacher follows the mean of the student's floating-point buffers; "rank0": those of the first process.
            One collective operation of the buffers' size, in which all processes must take part; the student is read.

    Raises:
        ValueError: the networks differ (all differences are listed), share memory, an option is not known, or a tensor
            among the options lies on another device than the teacher.
        RuntimeError: the backend that was asked for is not available. Nothing has been written when either is raised.

    Like an optimizer's step it records no gradient, and autograd notices that the teacher was written.

    Source: Cai et al., "Exponential Moving Average Normalization for Self-Supervised and Semi-Supervised Learning",
    CVPR 2021, equations 4 to 6.

    >>> teacher, student = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    >>> _ = student.running_mean.fill_(1.0), student.num_batches_tracked.fill_(7)
    >>> eman_update_(teacher, student, momentum=0.75)
    >>> teacher.running_mean, teacher.num_batches_tracked
    (tensor([0.2500, 0.2500]), tensor(7))
    """
    if torch.compiler.is_compiling():
        from . import in_graph

        modes = {"backend": backend, "rounding": rounding, "seed": seed, "nonfinite": nonfinite}
        tensors = {"found_inf": found_inf, "step": step, "skipped": skipped}
        if sync_buffers != "none":
            sync = {"rules": rules, "buffers": buffers, "sync_buffers": sync_buffers}
            return in_graph.outside(eman_update_, teacher, student, momentum, **sync, **tensors, **modes)
        return in_graph.eman_update_(teacher, student, momentum, rules or {}, buffers, **tensors, **modes)
    check_modes(rounding, seed, step is not None, nonfinite)
    check_sync(sync_buffers)
    call = call_of([momentum], found_inf, seed, step, skipped)
    options = update_options(rules, buffers, backend, rounding, nonfinite, sync_buffers)
    update_networks([teacher], student, call, options)


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

    >>> teacher = torch.zeros(2)
    >>> ema_update_([teacher], [torch.ones(2)], momentum=0.75)
    >>> teacher
    tensor([0.2500, 0.2500])
    """
    if torch.compiler.is_compiling():
        from . import in_graph

        modes = {"backend": backend, "rounding": rounding, "seed": seed, "nonfinite": nonfinite}
        tensors = {"found_inf": found_inf, "step": step, "skipped": skipped}
        return in_graph.ema_update_(teacher_tensors, student_tensors, momentum, **tensors, **modes)
    check_modes(rounding, seed, step is not None, nonfinite)
    call = call_of([momentum], found_inf, seed, step, skipped)
    teachers = _listed("teacher_tensors", teacher_tensors)
    students = _listed("student_tensors", student_tensors)
    update_lists(teachers, students, call, backend, rounding, nonfinite)


def update_lists(
    teachers: list[Tensor],
    students: list[Tensor],
    call: Call,
    backend: str | None,
    rounding: Rounding,
    nonfinite: Nonfinite,
    copied: Sequence[bool] | None = None,
) -> None:
    """Let tensors follow others by position. copied: which are copied that could be averaged; default: none."""
    if not teachers and not students:
        return
    options = (backends.requested(backend), rounding, nonfinite)
    copied = tuple(copied) if copied is not None and any(copied) else ()
    check_lengths(teachers, students)
    known = known_lists(teachers, students)
    roots = [teachers, students]
    found = known.find((*options, copied), roots)
    if found is None:
        _check_tensors("teacher_tensors", teachers)
        _check_tensors("student_tensors", students)
        watch = Watch(roots)
        tensors = watch.look(roots)
        plan = _plan(pair_lists(teachers, students, copied), tensors, *options)
        found = Followed((*options, copied), watch, plan), tensors
        known.add(found[0])
    followed, tensors = found
    plan = followed.plan
    if plan.stalls_below:
        _warn_of_a_stall(plan, call.momenta)
    increment_versions(tensors, plan.written)
    plan.run(call, tensors)


def plan_for(teacher: nn.Module, student: nn.Module) -> Plan | None:
    """The plan that the last update of this pair of networks used, or None: which tensors are updated how, by which
    backend, and which not by a kernel and why.

    >>> teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)
    >>> eman_update_(teacher, student, 0.999, backend="reference")
    >>> print(plan_for(teacher, student).describe())
    cpu: reference updates 2 tensors, 8 elements (2 ema float32 <- float32)
    """
    return networks_plan(teacher, student)


def update_options(
    rules: Mapping[str, Rule] | None,
    buffers: Rule,
    backend: str | None,
    rounding: Rounding,
    nonfinite: Nonfinite,
    sync_buffers: SyncBuffers,
) -> tuple[object, ...]:
    """What a plan of an update is for, besides the networks; the rules in their order."""
    own = tuple(rules.items()) if rules else ()
    return "update", own, buffers, backends.requested(backend), rounding, nonfinite, sync_buffers


def update_networks(
    teachers: Sequence[nn.Module],
    student: nn.Module,
    call: Call,
    options: tuple[object, ...],
    copies: Sequence[LowPrecision] = (),
) -> None:
    """Let several networks follow one. options: those of update_options. copies: the teachers' low-precision copies."""
    known = known_networks(teachers[0], student)
    roots = [*teachers, student]
    for copy in copies:
        roots.append(copy.copies)
    known.statistics = statistics = distributed.statistics(known.statistics, options[-1], student)
    if statistics is not None:
        roots.append(statistics.means)
    try:
        found = known.find(options, roots) or known.find_sharded(options, roots)
        if found is None:
            found = _follow(teachers, student, options, copies, statistics)
            known.add(found[0])
    except Exception as error:
        if statistics is not None:
            statistics.exchange([], error)
        raise
    followed, tensors = found
    if statistics is not None:
        statistics.exchange([tensors[i] for i in followed.buffers])
    plan = followed.plan
    if plan.stalls_below:
        _warn_of_a_stall(plan, call.momenta)
    for copy, numbers in zip(copies, followed.masters, strict=True):
        copy.refresh([tensors[i] for i in numbers])
    increment_versions(tensors, plan.written)
    _note_copies(copies, followed, tensors)
    try:
        plan.run(call, tensors)
        if copies and any(work.table is None for work in plan.works):
            _note_copies(copies, followed, tensors)  # torch's own operations have counted their writes themselves
        renew(followed.caching)
    except BaseException:  # an interrupt, when all is written
        renew(followed.caching)
        raise


def _note_copies(copies: Sequence[LowPrecision], followed: Followed, tensors: list[Tensor]) -> None:
    for copy, numbers, which in zip(copies, followed.masters, followed.along, strict=True):
        copy.written([tensors[i] for i in numbers], which)


def _follow(
    teachers: Sequence[nn.Module],
    student: nn.Module,
    options: tuple,
    copies: Sequence[LowPrecision],
    statistics: distributed.Statistics | None,
) -> tuple[Followed, list[Tensor]]:
    for teacher in teachers:
        if teacher is student:
            raise ValueError("teacher and student are the same module; the teacher must be its copy.deepcopy")
        check_order([*teacher.parameters()], [*student.parameters()], "eman_update_(teacher, student, momentum)")
    _, rules, buffers, backend, rounding, nonfinite, _ = options
    pairs = [
        replace(pair, group=group)
        for group, teacher in enumerate(teachers)
        for pair in pair_modules(teacher, student, dict(rules), buffers)
    ]
    if not pairs and named_tensors(student):
        _warn("the rules skip every tensor of the teacher: update() changes nothing")
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
    means_of = []
    if statistics is not None:
        pairs, means_of = statistics.replace(pairs, student)
        roots.append(statistics.means)
    watch = Watch(roots)
    tensors = watch.look(roots)
    written = {id(pair.teacher) for pair in pairs if pair.cast is not None}
    number = {id(tensor): i for i, tensor in enumerate(tensors)}
    return Followed(
        options=options,
        watch=watch,
        plan=_plan(pairs, tensors, backend, rounding, nonfinite),
        masters=[[number[id(master)] for master in its] for its in masters],
        along=[[i for i, master in enumerate(its) if id(master) in written] for its in masters],
        buffers=[number[id(buffer)] for buffer in means_of],
        caching=[module for teacher in teachers for module in caching_modules(teacher)],
    ), tensors


def _plan(
    pairs: list[Pair], tensors: list[Tensor], backend: str | None, rounding: Rounding, nonfinite: Nonfinite
) -> Plan:
    kind = StagedPlan if any(map(is_elsewhere, pairs)) else Plan
    return kind(pairs, tensors, backend, stochastic=rounding == "stochastic", skip_nonfinite=nonfinite == "skip")


def _listed(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(tensors, nn.Module):
        raise TypeError(f"{name} must be a list of tensors, and is a network: take eman_update_(teacher, student, ...)")
    if isinstance(tensors, Tensor | Mapping | str | bytes) or not isinstance(tensors, Iterable):
        remedy = "tensors are paired by position: list(state.values()), where both have the same order"
        remedy = remedy if isinstance(tensors, Mapping) else "a single tensor goes into a list"
        raise TypeError(f"{name} must be a list of tensors, and is a {type(tensors).__name__}; {remedy}")
    return list(tensors)


def _check_tensors(name: str, tensors: list[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
            raise TypeError(f"{name}[{i}] must be a tensor, and is a {kind}; NumPy's arrays by torch.from_numpy(array)")


def _warn_of_a_stall(plan: Plan, momenta: list[float] | Tensor) -> None:
    """Once, where the teacher will hardly move."""
    if not isinstance(momenta, Tensor) and 0 < 1 - max(momenta) < plan.stalls_below:
        plan.stalls_below = 0.0
        _warn(
            f"at momentum {max(momenta)} a half-precision teacher rounded to nearest does not move: elements within a "
            "tenth of the student's move by less than half an ulp. Take rounding='stochastic', or a float32 teacher "
            "(EMANTeacher(student, dtype=torch.float32))."
        )


def _warn(message: str) -> None:
    """In the name of the line that called us: it stands above ours and those of torch's decorators."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (__package__, "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
