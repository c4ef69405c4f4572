"""The eager update: find a plan whose guards hold, or make one, and run it."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.interface import Arguments
from ..networks.errors import raise_differences, warn_user
from ..networks.guards import Guards, increment_versions
from ..networks.names import named_tensors
from ..networks.pairing import Pair, check_lengths, check_order, count_left_out, pair_lists, pair_modules
from ..options import Options
from ..plan.cache import CachedPlan, Found, PlanCache, cache_of_lists, cache_of_networks
from ..plan.plan import Plan
from ..plan.work import differ_in_strides
from .buffer_sync import BufferSync, find_buffer_sync
from .caching import find_caching_modules, renew_caches
from .low_precision import LowPrecisionCopy

# The reference updates this much in a few milliseconds on a CPU: less is not worth a warning.
_NOTICEABLE_BYTES = 1 << 20


def update_lists(
    teachers: list[Tensor],
    students: list[Tensor],
    arguments: Arguments,
    options: Options,
    copied: Sequence[bool] | None = None,
    names: Sequence[str] = (),
) -> None:
    """Let tensors follow others by position. copied: which tensors are copied instead of averaged; default: none.
    names: what error messages call the tensors, if they have keys."""
    if not teachers and not students:
        return
    check_lengths(teachers, students)
    copied = tuple(copied) if copied is not None and any(copied) else ()
    cached, tensors = cache_of_lists(teachers, students).find_or_make(
        ("lists", options, copied), [teachers, students], _plan_lists, teachers, students, options, copied, names
    )
    if cached.plan.stalls_below:
        _warn_if_stalled(cached.plan, arguments)
    increment_versions(tensors, cached.plan.written)
    cached.plan.run(arguments, tensors)


def update_networks(
    teachers: Sequence[nn.Module],
    student: nn.Module,
    arguments: Arguments,
    options: Options,
    copies: Sequence[LowPrecisionCopy] = (),
) -> None:
    """Let networks follow one student. copies: the teachers' low-precision copies, which are written in the same pass,
    one per teacher, or none."""
    cache = cache_of_networks(teachers[0], student)
    cache.buffer_sync = buffer_sync = find_buffer_sync(cache.buffer_sync, options.sync_buffers, student)
    roots = _collect_roots(teachers, student, copies, buffer_sync)
    try:
        cached, tensors = cache.find_or_make(
            ("update", options), roots, _plan_networks, teachers, student, options, copies, buffer_sync
        )
    except Exception as error:
        if buffer_sync is not None:
            buffer_sync.synchronize([], error)
        raise
    if buffer_sync is not None:
        buffer_sync.synchronize([tensors[i] for i in cached.synced_buffers])
    plan = cached.plan
    if plan.stalls_below:
        _warn_if_stalled(plan, arguments)
    for copy, masters in zip(copies, cached.masters, strict=True):
        copy.refresh([tensors[i] for i in masters])
    increment_versions(tensors, plan.written)
    if copies:
        _mark_copies_written(copies, cached, tensors)
    try:
        plan.run(arguments, tensors)
        if copies and any(work.table is None for _, work in plan.works):
            _mark_copies_written(copies, cached, tensors)  # torch's own operations increment versions again
        renew_caches(cached.caching)
    except BaseException:  # an interrupt after the write
        renew_caches(cached.caching)
        raise


def pair_tensors(
    teachers: Iterable[Tensor] | Mapping[Any, Any], students: Iterable[Tensor] | Mapping[Any, Any]
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Both arguments as lists in one order, and the names of the tensors if they are mappings, which may be nested.

    Raises ValueError if a key is missing from one of two mappings, or TypeError for what is neither two mappings nor
    two iterables that have an order.
    """
    if type(teachers) is list and type(students) is list:
        return list(teachers), list(students), []
    if isinstance(teachers, Mapping) and isinstance(students, Mapping):
        mine, theirs = dict(_iterate_leaves(teachers)), dict(_iterate_leaves(students))
        differences = [f"{name}: the teacher has none" for name in theirs if name not in mine]
        differences += [f"{name}: the student has none" for name in mine if name not in theirs]
        raise_differences(differences, "Both mappings must have the same keys: leave out those that only one has.")
        return list(mine.values()), [theirs[name] for name in mine], list(mine)
    return _list_tensors("teacher_tensors", teachers), _list_tensors("student_tensors", students), []


def check_tensors(argument: str, tensors: list[Tensor], names: Sequence[str] = ()) -> None:
    """Raises TypeError unless all of them are tensors."""
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
            place = repr(names[i]) if names else i
            raise TypeError(
                f"{argument}[{place}] must be a tensor, not a {kind}; convert NumPy arrays by torch.from_numpy"
            )


def _iterate_leaves(mapping: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _iterate_leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _list_tensors(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """The argument as a list. Raises TypeError unless it is an iterable of tensors that has an order."""
    if isinstance(tensors, nn.Module):
        raise TypeError(f"{name} must be a list of tensors, not a network: use eman_update_(teacher, student, ...)")
    if isinstance(tensors, Tensor | Mapping | str | bytes) or not isinstance(tensors, Iterable):
        remedy = "tensors are paired by position, or by key if both arguments are mappings"
        remedy = remedy if isinstance(tensors, Mapping) else "put a single tensor into a list"
        raise TypeError(f"{name} must be a list of tensors, not a {type(tensors).__name__}; {remedy}")
    return list(tensors)


def _collect_roots(
    teachers: Sequence[nn.Module],
    student: nn.Module,
    copies: Sequence[LowPrecisionCopy],
    buffer_sync: BufferSync | None,
) -> list[nn.Module | list[Tensor]]:
    """Everything that an update reads or writes, which its guards compare."""
    roots: list[nn.Module | list[Tensor]] = [*teachers, student]
    for copy in copies:
        roots.append(copy.copies)
    if buffer_sync is not None:
        roots.append(buffer_sync.means)
    return roots


def _plan_lists(
    teachers: list[Tensor], students: list[Tensor], options: Options, copied: tuple[bool, ...], names: Sequence[str]
) -> Found:
    check_tensors("teacher_tensors", teachers, names)
    check_tensors("student_tensors", students, names)
    roots = [teachers, students]
    guards = Guards(roots)
    tensors = guards.check(roots)
    plan = Plan(pair_lists(teachers, students, copied, names), tensors, options)
    return CachedPlan(("lists", options, copied), guards, plan), tensors


def _plan_networks(
    teachers: Sequence[nn.Module],
    student: nn.Module,
    options: Options,
    copies: Sequence[LowPrecisionCopy],
    buffer_sync: BufferSync | None,
) -> Found:
    for teacher in teachers:
        if teacher is student:
            raise ValueError("teacher and student are the same module; the teacher must be its copy.deepcopy")
        check_order([*teacher.parameters()], [*student.parameters()], "eman_update_(teacher, student, momentum)")
    pairs = [
        replace(pair, group=group)
        for group, teacher in enumerate(teachers)
        for pair in pair_modules(teacher, student, options)
    ]
    if not pairs and named_tensors(student):
        warn_user("the rules skip every tensor of the teacher: update() changes nothing")
    masters = [copy.follow(teacher) for teacher, copy in zip(teachers, copies, strict=False)]  # there may be no copies
    # Kernels write copies of float32 tensors only; others are refreshed on read.
    cast_of = {
        id(master): cast
        for copy, its in zip(copies, masters, strict=True)
        for master, cast in zip(its, copy.copies, strict=True)
        if master.dtype == torch.float32
    }
    pairs = [replace(pair, cast=cast_of.get(id(pair.teacher))) for pair in pairs]
    buffers: list[Tensor] = []
    if buffer_sync is not None:
        pairs, buffers = buffer_sync.replace_buffers(pairs, student)
    _warn_if_layouts_differ(pairs, cache_of_networks(teachers[0], student))
    roots = _collect_roots(teachers, student, copies, buffer_sync)
    guards = Guards(roots)
    tensors = guards.check(roots)
    with_copy = {id(pair.teacher) for pair in pairs if pair.cast is not None}
    index_of = {id(tensor): i for i, tensor in enumerate(tensors)}
    return CachedPlan(
        key=("update", options),
        guards=guards,
        plan=Plan(pairs, tensors, options, count_left_out(teachers, options)),
        masters=[[index_of[id(master)] for master in its] for its in masters],
        written_copies=[[i for i, master in enumerate(its) if id(master) in with_copy] for its in masters],
        synced_buffers=[index_of[id(buffer)] for buffer in buffers],
        caching=[module for teacher in teachers for module in find_caching_modules(teacher)],
    ), tensors


def _mark_copies_written(copies: Sequence[LowPrecisionCopy], cached: CachedPlan, tensors: list[Tensor]) -> None:
    for copy, masters, which in zip(copies, cached.masters, cached.written_copies, strict=True):
        copy.mark_written([tensors[i] for i in masters], which)


def _warn_if_layouts_differ(pairs: Sequence[Pair], cache: PlanCache) -> None:
    """Once per pair of networks, if the reference must update more than a tenth of the elements because of their
    strides, and more than a megabyte."""
    if cache.warned_of_layouts:
        return
    slow = [pair for pair in pairs if differ_in_strides(pair)]
    elements = sum(pair.teacher.numel() for pair in slow)
    size = sum(pair.teacher.nbytes for pair in slow)
    if size > _NOTICEABLE_BYTES and 10 * elements > sum(pair.teacher.numel() for pair in pairs):
        cache.warned_of_layouts = True
        first = slow[0]
        warn_user(
            f"{elements} elements take the slow path, because their strides differ between teacher and student, such "
            f"as {first.name}: {first.teacher.stride()} and {first.student.stride()}. Give both one layout: convert "
            "the student before the teacher is made, or also convert the teacher, for example by "
            "teacher.to(memory_format=torch.channels_last)."
        )


def _warn_if_stalled(plan: Plan, arguments: Arguments) -> None:
    """Once per plan, if rounding to nearest will keep the teacher from moving."""
    if isinstance(arguments.momenta, Tensor):
        return
    momentum = max(arguments.momenta)
    if 0 < 1 - momentum < plan.stalls_below:
        plan.stalls_below = 0.0
        warn_user(
            f"at momentum {momentum} a half-precision teacher rounded to nearest does not move: elements within a "
            "tenth of the student's move by less than half an ulp. Use rounding='stochastic', or a float32 teacher "
            "(EMANTeacher(student, dtype=torch.float32))."
        )
