"""torch's own multi-tensor operations: nothing to compile, and available on any device that torch supports."""

from collections.abc import Sequence
from functools import partial
from math import isfinite

import torch
from torch import Tensor

from . import reference
from .interface import Arguments, Work
from .interrupts import uninterrupted

NAME = "foreach"
TAKES_TABLE = False


def unavailable(device_type: str) -> str | None:
    return None


@torch.no_grad()
def run(work: Work, arguments: Arguments, tensors: Sequence[Tensor]) -> None:
    if work.general or arguments.found_inf is not None or isinstance(arguments.momenta, Tensor):
        # _foreach_lerp_ supports none of these; its weight must be a number.
        return reference.run(work, arguments, tensors)
    weight = 1.0 - arguments.momenta[0]
    for (rule, teacher_dtype, student_dtype), places in work.places.items():
        teachers, students = [tensors[p.teacher] for p in places], [tensors[p.student] for p in places]
        wide = reference.promote_dtypes(teachers[0], students[0])
        if rule == "copy" or reference.convert_weight(weight, wide, torch.device("cpu")) == 1:
            torch._foreach_copy_(teachers, students)
        elif weight == 0:
            continue
        elif teacher_dtype == student_dtype:
            _lerp(teachers, students, weight)
        else:
            # _foreach_lerp_ does not support mixed dtypes. One tensor at a time, so that no temporary is as large as
            # the network.
            for teacher, student in zip(teachers, students, strict=True):
                teacher.copy_(reference.lerp(teacher, student, weight))


def _lerp(teachers: list[Tensor], students: list[Tensor], weight: float) -> None:
    """_foreach_lerp_ makes NaNs where teacher and student are the same infinity; these get the student's value back.

    Both steps run uninterrupted: an interrupt between them would leave the NaNs in the teacher.
    """
    infinite = [(t, s) for t, s in zip(teachers, students, strict=True) if _may_be_infinite(s)]
    equal = [teacher == student for teacher, student in infinite]
    uninterrupted(
        partial(torch._foreach_lerp_, teachers, students, weight),
        *(
            partial(torch.where, where, student, teacher, out=teacher)
            for (teacher, student), where in zip(infinite, equal, strict=True)
        ),
    )


def _may_be_infinite(tensor: Tensor) -> bool:
    """Whether the tensor may hold an infinity. Not checked on devices where that would synchronize."""
    return tensor.device.type != "cpu" or not isfinite(tensor.sum())


swaps = reference.swaps
