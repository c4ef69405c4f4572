"""One step of a teacher, or of several in one pass."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING
from weakref import ref

import torch
from torch import Tensor, nn

from .call import as_found_inf, call_of, check_modes
from .distributed import check_sync
from .functional import update_networks, update_options
from .interrupts import holding

if TYPE_CHECKING:
    from .teacher import EMANTeacher

# What EMANTeachers do in one pass for all of them.
_SHARED = ("rules", "buffer_rule", "backend", "rounding", "seed", "cast", "nonfinite", "capturable", "sync_buffers")


def update_locked(
    teachers: Sequence["EMANTeacher"],
    student: nn.Module | None,
    momentum: float | Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """One step, when nobody else has a turn with any of the teachers."""
    holding([teacher._turn.lock for teacher in teachers], _update, teachers, student, momentum, found_inf)


def _update(
    teachers: Sequence["EMANTeacher"],
    student: nn.Module | None,
    momentum: float | Tensor | None,
    found_inf: Tensor | None,
) -> None:
    first = teachers[0]
    student = first._followed(student)
    check_modes(first.rounding, first.seed, True, first.nonfinite)
    check_sync(first.sync_buffers)
    if found_inf is not None:
        found_inf = as_found_inf(found_inf)
    networks, momenta, counts = [], [], []
    for teacher in teachers:
        check_turn(teacher)
        if teacher is not first:
            _check_shared(first, teacher)
        teacher._prepare(found_inf is not None and found_inf.device.type != "cpu")
        networks.append(teacher.module)
        momenta.append(_momentum(teacher) if momentum is None else momentum)
        counts.append(_count(teacher, found_inf))
    copies = []
    # A copy that no forward has asked for yet need not be written along.
    if first.cast is not None and any(teacher._copy is not None for teacher in teachers):
        copies = [teacher._copy or teacher._low_precision() for teacher in teachers]
    step = _known_step(first) if first.rounding == "stochastic" else None
    call = call_of(momenta, found_inf, first.seed, step, first.skipped, counts)
    options = update_options(
        first.rules, first.buffer_rule, first.backend, first.rounding, first.nonfinite, first.sync_buffers
    )
    update_networks(networks, student, call, options, copies)
    for teacher in teachers:
        if teacher._student is None or teacher._student() is not student:
            teacher._student = ref(student)


def check_turn(teacher: "EMANTeacher") -> None:
    if teacher._turn.exchange is not None:
        raise RuntimeError("the teacher is swapped with its student: update after the context has been left")
    if teacher._turn.unrestored:
        raise RuntimeError(f"{teacher._turn.unrestored}\nload_state_dict() makes the teacher whole again")


def _check_shared(first: "EMANTeacher", teacher: "EMANTeacher") -> None:
    own = [name for name in _SHARED if getattr(teacher, name) != getattr(first, name)]
    if own:
        theirs, firsts = ([repr(getattr(each, name)) for name in own] for each in (teacher, first))
        raise ValueError(
            f"teachers that are updated in one pass have their options in common, and {', '.join(own)} of one is "
            f"{', '.join(theirs)} where the first's is {', '.join(firsts)}; set it for all, or update each by itself"
        )


def _count(teacher: "EMANTeacher", found_inf: Tensor | None) -> Callable[[], object]:
    """What counts the step: a C function, so that no interrupt comes between the write and it."""
    step = teacher._step
    if type(step) is int:
        # Not by nn.Module's setattr, which looks among parameters and modules first: a tenth of a cold step.
        return partial(teacher.__dict__.__setitem__, "_step", step + 1)
    return partial(step.add_, 1 if found_inf is None else (found_inf == 0).to(step.device))


def _momentum(teacher: "EMANTeacher") -> float | Tensor:
    if not callable(teacher.momentum):
        return teacher.momentum
    step = _known_step(teacher)
    # In double, because 1 - m of a float32 m is three digits short.
    return teacher.momentum(step.double() if isinstance(step, Tensor) else step)


def _known_step(teacher: "EMANTeacher") -> int | Tensor:
    """A number where the host has it: a compiled graph has put it into a tensor there."""
    step = teacher._step
    return int(step) if isinstance(step, Tensor) and step.device.type == "cpu" and not teacher.capturable else step


def counter(number: int | Tensor, device: torch.device) -> Tensor:
    """The number on this device; itself, if it lies there. Made there, because a copy from the host would wait."""
    # Inference mode would make one that cannot be written once it has ended.
    with torch.inference_mode(False):
        if isinstance(number, Tensor):
            return number.to(device)
        return torch.full((), number, dtype=torch.int64, device=device)
