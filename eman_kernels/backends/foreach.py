"""torch's own multi-tensor operations: nothing to compile, and on any device that torch reaches."""

import torch

from . import reference

NAME = "foreach"
TAKES_TABLE = False


def unavailable(device_type: str) -> str | None:
    return None


def run(work, momentum: float | torch.Tensor) -> None:
    if isinstance(momentum, torch.Tensor):
        # _foreach_lerp_ takes no weight on the device.
        return reference.run(work, momentum)
    weight = 1.0 - momentum
    groups: dict[object, list] = {}
    for pair in work.pairs:
        groups.setdefault((pair.rule, pair.teacher.dtype, pair.student.dtype), []).append(pair)
    for (rule, teacher_dtype, student_dtype), pairs in groups.items():
        teachers, students = [pair.teacher for pair in pairs], [pair.student for pair in pairs]
        if rule == "copy":
            torch._foreach_copy_(teachers, students)
        elif teacher_dtype == student_dtype:
            torch._foreach_lerp_(teachers, students, weight)
        else:
            # _foreach_lerp_ takes no mixed dtypes.
            for pair in pairs:
                reference.update(pair.teacher, pair.student, pair.rule, weight)
