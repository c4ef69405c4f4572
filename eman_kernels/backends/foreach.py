"""torch's own multi-tensor operations: nothing to compile, and on any device that torch reaches."""

from functools import partial
from math import isfinite

import torch

from ..interrupts import at_once
from . import reference

NAME = "foreach"
TAKES_TABLE = False


def unavailable(device_type: str) -> str | None:
    return None


@torch.no_grad()
def run(work, call, tensors) -> None:
    if work.general or call.found_inf is not None or isinstance(call.momenta, torch.Tensor):
        # _foreach_lerp_ does none of these; its weight is a number.
        return reference.run(work, call, tensors)
    weight = 1.0 - call.momenta[0]
    writes = []  # at once, and the count with them, for interrupts
    for (rule, teacher_dtype, student_dtype), places in work.places.items():
        teachers, students = [tensors[p.teacher] for p in places], [tensors[p.student] for p in places]
        wide = reference.wide_of(teachers[0], students[0])
        if rule == "copy" or reference.weight_in(wide, weight, torch.device("cpu")) == 1:
            writes.append(partial(torch._foreach_copy_, teachers, students))
        elif weight == 0:
            continue
        elif teacher_dtype == student_dtype:
            # It makes NaNs of infinities that are equal.
            infinite = [(t, s) for t, s in zip(teachers, students, strict=True) if _may_be_infinite(s)]
            equal = [teacher == student for teacher, student in infinite]
            writes.append(partial(torch._foreach_lerp_, teachers, students, weight))
            for (teacher, student), where in zip(infinite, equal, strict=True):
                writes.append(partial(torch.where, where, student, teacher, out=teacher))
        else:
            # _foreach_lerp_ takes no mixed dtypes. One at a time: no temporary of the network's size.
            for teacher, student in zip(teachers, students, strict=True):
                teacher.copy_(reference.lerp(teacher, student, weight))
    at_once(*writes, *call.counts)


def _may_be_infinite(tensor: torch.Tensor) -> bool:
    """Whether an infinity may be in it: any where it would have to be waited for."""
    return tensor.device.type != "cpu" or not isfinite(tensor.sum())


swaps = reference.swaps
