"""torch's own multi-tensor operations: nothing to compile, and available on any device that torch supports."""

from collections.abc import Sequence
from functools import partial
from math import isfinite

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import reference
from .interface import Arguments, Place, Work
from .interrupts import uninterrupted

NAME = "foreach"
TAKES_TABLE = False
# Of the teachers that are joined in one temporary tensor.
_JOINED_BYTES = 1 << 27


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
        # In float32 these weights round to 1. Compared as numbers, because a tensor would be another operation.
        copies = weight == 1 if torch.float64 in (teacher_dtype, student_dtype) else weight >= 1 - 2.0**-25
        if rule == "copy" or copies:
            torch._foreach_copy_(teachers, students)
        elif weight == 0:
            continue
        elif teacher_dtype == student_dtype and work.device.type == "cpu":
            _lerp_on_cpu(work, places, tensors, weight)
        elif teacher_dtype == student_dtype:
            _lerp_joined(teachers, students, weight)
        else:
            # _foreach_lerp_ does not support mixed dtypes. One tensor at a time, so that no temporary is as large as
            # the network.
            for teacher, student in zip(teachers, students, strict=True):
                teacher.copy_(reference.lerp(teacher, student, weight))


# Plain lerp gives NaN where teacher and student are the same infinity; the reference gives that infinity.


def _lerp_on_cpu(work: Work, places: Sequence[Place], tensors: Sequence[Tensor], weight: float) -> None:
    """_foreach_lerp_ for the students that are known to be finite. The others are checked just before they are used, so
    that the sum finds memory that the average needs in the cache as well."""
    teachers, students = [], []
    for place in places:
        teacher, student = tensors[place.teacher], tensors[place.student]
        if _is_known_finite(work, place.student, student):
            teachers.append(teacher)
            students.append(student)
        elif isfinite(student.sum()):
            _remember_finite(work, place.student, student)
            teacher.lerp_(student, weight)
        else:
            equal = teacher == student
            # An interrupt between the two would leave the NaNs in the teacher.
            uninterrupted(
                partial(teacher.lerp_, student, weight), partial(torch.where, equal, student, teacher, out=teacher)
            )
    if teachers:
        torch._foreach_lerp_(teachers, students, weight)


def _is_known_finite(work: Work, index: int, student: Tensor) -> bool:
    """Whether the student has not been written since it was found finite: the same object with the same version and
    memory. Writes that torch does not track (``p.data.fill_``) are not noticed."""
    seen = work.finite.get(index)
    return (
        seen is not None and seen[:3] == (id(student), student._version, student.data_ptr()) and not seen[3].expired()
    )


def _remember_finite(work: Work, index: int, student: Tensor) -> None:
    if not student.is_inference():  # has no version
        # A weak reference to the tensor itself would make swap_tensors fail.
        storage = StorageWeakRef(student.untyped_storage())
        work.finite[index] = id(student), student._version, student.data_ptr(), storage


def _lerp_joined(teachers: Sequence[Tensor], students: Sequence[Tensor], weight: float) -> None:
    """On devices where a check of the values would synchronize, and each operation is a launch: six operations per
    128 MB, in temporary memory. The plan says that all tensors are dense, with equal strides."""
    begin = size = 0
    for end, teacher in enumerate(teachers):
        if size and size + teacher.nbytes > _JOINED_BYTES:
            _lerp_in_one_tensor(teachers[begin:end], students[begin:end], weight)
            begin, size = end, 0
        size += teacher.nbytes
    _lerp_in_one_tensor(teachers[begin:], students[begin:], weight)


def _lerp_in_one_tensor(teachers: Sequence[Tensor], students: Sequence[Tensor], weight: float) -> None:
    flat_teachers = [_flatten_dense(teacher) for teacher in teachers]
    teacher, student = torch.cat(flat_teachers), torch.cat([_flatten_dense(student) for student in students])
    equal = teacher == student
    teacher.lerp_(student, weight)
    torch.where(equal, student, teacher, out=teacher)
    torch._foreach_copy_(flat_teachers, teacher.split([flat.numel() for flat in flat_teachers]))


def _flatten_dense(tensor: Tensor) -> Tensor:
    """The elements in the order of their memory."""
    return tensor if tensor.dim() == 1 else tensor.as_strided((tensor.numel(),), (1,))


swaps = reference.swaps
