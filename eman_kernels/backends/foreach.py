"""torch's own multi-tensor operations: nothing to compile, and on any device that torch reaches."""

import torch

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
    for (rule, teacher_dtype, student_dtype), places in work.places.items():
        teachers, students = [tensors[p.teacher] for p in places], [tensors[p.student] for p in places]
        if rule == "copy":
            torch._foreach_copy_(teachers, students)
        elif teacher_dtype == student_dtype:
            torch._foreach_lerp_(teachers, students, weight)
        else:
            # _foreach_lerp_ takes no mixed dtypes. One at a time: no temporary of the network's size.
            for teacher, student in zip(teachers, students, strict=True):
                teacher.copy_(reference.lerp(teacher, student, weight))


swap = reference.swap
