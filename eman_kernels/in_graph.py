"""What takes the functions' place while torch.compile or torch.export traces them: ``torch.ops.eman_kernels`` in the
graph, with nothing done by Python in a step. What several processes have in common breaks the graph.

Imported only then: torch._dynamo is here anyway, and ``import eman_kernels`` does without it.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from . import distributed, functional
from .caches import caching_modules, renew
from .pairing import Rule, check_order, named_tensors, pair_modules
from .step import check_turn, update_locked
from .teacher import EMANTeacher


@torch.compiler.disable
def outside(function: Any, *args: Any, **kwargs: Any) -> Any:
    """The call as it is, outside of the graph, which breaks here."""
    return function(*args, **kwargs)


def ema_update_(
    teachers: Sequence[Tensor],
    students: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    found_inf: Tensor | None = None,
    step: int | Tensor | None = None,
    **others: Any,
) -> None:
    """The operator, with numbers put into tensors: they can be others in the graph's next run."""
    if _sharded([*teachers, *students]):
        both = list(teachers), list(students)
        return outside(functional.ema_update_, *both, momentum, found_inf=found_inf, step=step, **others)
    with torch.no_grad():
        torch.ops.eman_kernels.ema_update_(
            list(teachers),
            list(students),
            _in_tensor(momentum, torch.float64),
            found_inf=found_inf,
            step=None if step is None else _in_tensor(step, torch.int64),
            **others,
        )


def eman_update_(
    teacher: nn.Module,
    student: nn.Module,
    momentum: float | Tensor,
    rules: Mapping[str, Rule],
    buffers: Rule,
    **others: Any,
) -> None:
    # Walked by the trace, which will then notice a tensor or a layer that has come or gone.
    teachers, students = named_tensors(teacher), named_tensors(student)
    if _sharded([*teachers.values(), *students.values()]):
        function = functional.eman_update_
        return outside(function, teacher, student, momentum, rules=rules, buffers=buffers, **others)
    names, copied, caching = _pairs(id(teacher), id(student), tuple(rules.items()), buffers)
    ema_update_(
        [teachers[name] for name in names], [students[name] for name in names], momentum, copied=copied, **others
    )
    if caching:
        outside(_renew, teacher)


def update(
    teachers: Sequence[EMANTeacher],
    student: nn.Module | None,
    momentum: float | Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """EMANTeacher.update and EMANTeachers.update; the student is read once for each teacher."""
    student = teachers[0]._followed(student)
    tensors = [*student.parameters(), *(p for teacher in teachers for p in teacher.module.parameters())]
    if teachers[0].sync_buffers != "none" or _sharded(tensors):
        return outside(update_locked, teachers, student, momentum, found_inf)
    for teacher in teachers:
        check_turn(teacher)
        _prepare(id(teacher), found_inf is not None and found_inf.device.type != "cpu")
        # nn.Module's own asks what a weak reference is, which torch 2.11 does not know in a graph.
        object.__setattr__(teacher, "_student", _weakly(id(student)))
        step = teacher._step
        by_step = teacher.momentum(step.double()) if callable(teacher.momentum) else teacher.momentum
        eman_update_(
            teacher.module,
            student,
            by_step if momentum is None else momentum,
            teacher.rules,
            teacher.buffer_rule,
            backend=teacher.backend,
            found_inf=found_inf,
            rounding=teacher.rounding,
            seed=teacher.seed,
            step=step if teacher.rounding == "stochastic" else None,
            nonfinite=teacher.nonfinite,
            skipped=teacher.skipped,
        )
        with torch.no_grad():
            step += 1 if found_inf is None else found_inf.reshape(()).to(step.device) == 0


def _sharded(tensors: Sequence[Tensor]) -> bool:
    """DTensor asks an operator which shards it takes to which. Ours is to see the shards, of whatever placement."""
    kind = _dtensor()
    return any(isinstance(tensor, kind) for tensor in tensors)


@torch.compiler.assume_constant_result
def _dtensor() -> type | tuple[()]:
    return distributed.dtensor()


def _renew(teacher: nn.Module) -> None:
    renew(caching_modules(teacher))


def _in_tensor(number: float | Tensor, dtype: torch.dtype) -> Tensor:
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=dtype, device="cpu")


def _at(address: int) -> Any:
    """The object of this id. A module itself is no argument for assume_constant_result before torch 2.14; that its id
    is the same is a condition of the graph."""
    return ctypes.cast(address, ctypes.py_object).value


@torch.compiler.assume_constant_result
def _pairs(
    teacher_id: int, student_id: int, rules: tuple[tuple[str, Rule], ...], buffers: Rule
) -> tuple[tuple[str, ...], tuple[bool, ...], bool]:
    """The names of the tensors that are updated, which of them are copied, and whether modules of the teacher keep what
    they have computed from them; found when the graph is made."""
    teacher, student = _at(teacher_id), _at(student_id)
    check_order([*teacher.parameters()], [*student.parameters()], "eman_update_(teacher, student, momentum)")
    pairs = pair_modules(teacher, student, dict(rules), buffers)
    return (
        tuple(pair.name for pair in pairs),
        tuple(pair.rule == "copy" for pair in pairs),
        bool(caching_modules(teacher)),
    )


@torch.compiler.assume_constant_result
def _weakly(module_id: int) -> Any:
    """Made when the graph is: in torch 2.6 it cannot make one."""
    return ref(_at(module_id))


@torch.compiler.assume_constant_result
def _prepare(teacher_id: int, on_device: bool) -> None:
    """When the graph is made: the step lies in a tensor from now on. A number would be a constant of the graph."""
    teacher = _at(teacher_id)
    teacher._prepare(on_device)
    if not isinstance(teacher._step, Tensor):
        with torch.inference_mode(False):
            teacher._step = torch.full((), teacher._step, dtype=torch.int64, device="cpu")
