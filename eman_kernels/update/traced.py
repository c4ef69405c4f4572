"""The update while torch.compile, torch.export or make_fx traces it: the graph contains the operator, and a step runs
no Python.

Functions decorated with assume_constant_result run once, when the graph is made. Updates that need Python in every step
(collectives, DTensors, modules that cache) break the graph and run eagerly.

Imported only while tracing, because it makes torch import torch._dynamo.
"""

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..networks.names import named_tensors
from ..networks.pairing import check_order, pair_modules
from ..networks.tensors import dtensor_class
from ..options import TENSOR_OPTIONS, Options, make_options
from .arguments import check_step, make_arguments
from .caching import find_caching_modules, renew_caches
from .eager import pair_tensors, update_lists, update_networks
from .state import StudentReference, TeacherState
from .step import step_teachers


@torch.compiler.disable
def break_graph(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the function eagerly, outside of the graph."""
    return function(*args, **kwargs)


def trace_lists(
    teachers: Iterable[Tensor] | Mapping[str, Any],
    students: Iterable[Tensor] | Mapping[str, Any],
    momentum: float | Tensor,
    options: Options,
    *,
    found_inf: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor | None = None,
    skipped: Tensor | None = None,
    copied: Sequence[bool] | None = None,
) -> None:
    """``ema_update_`` in a graph. Numbers become tensors, so that they can change without a new graph."""
    given = {"found_inf": found_inf, "seed": seed, "step": step, "skipped": skipped}
    if isinstance(teachers, Mapping) or isinstance(students, Mapping):
        teachers, students, _ = pair_tensors(teachers, students)
    teachers, students = list(teachers), list(students)
    if _any_distributed(teachers + students):
        return break_graph(_update_lists_eagerly, teachers, students, momentum, options, given)
    given["step"] = None if step is None else _to_tensor(step, torch.int64)
    tensor_options = {name: getattr(options, name) for name in TENSOR_OPTIONS}
    with torch.no_grad():
        torch.ops.eman_kernels.ema_update_(
            teachers,
            students,
            _to_tensor(momentum, torch.float64),
            copied=copied,
            **given,
            **tensor_options,
        )


def trace_networks(
    teacher: nn.Module, student: nn.Module, momentum: float | Tensor, options: Options, **given: Any
) -> None:
    """``eman_update_`` in a graph. given: found_inf, seed, step and skipped, as in trace_lists."""
    if options.sync_buffers != "none":
        return break_graph(_update_networks_eagerly, teacher, student, momentum, options, given)
    # Walked by the trace, so that the graph is invalidated when a tensor or a layer is added or removed.
    teachers, students = named_tensors(teacher), named_tensors(student)
    if _any_distributed([*teachers.values(), *students.values()]):
        return break_graph(_update_networks_eagerly, teacher, student, momentum, options, given)
    names, copied, caching = _pair_once(id(teacher), id(student), options.rules, options.buffers)
    trace_lists(
        [teachers[name] for name in names],
        [students[name] for name in names],
        momentum,
        options,
        copied=copied,
        **given,
    )
    if caching:
        break_graph(_renew_caches_of, teacher)


def trace_teachers(
    networks: Sequence[nn.Module],
    states: Sequence[TeacherState],
    student: nn.Module | None,
    momentum: float | Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """``EMANTeacher.update`` and ``EMANTeachers.update`` in a graph, which reads the student once per teacher."""
    if student is None:
        student = states[0].find_student()
    tensors = [*student.parameters(), *(p for network in networks for p in network.parameters())]
    if states[0].options.sync_buffers != "none" or _any_distributed(tensors):
        return break_graph(step_teachers, networks, states, student, momentum, found_inf)
    for network, state in zip(networks, states, strict=True):
        state.lock.check_can_update()
        _prepare_once(id(network), id(state), found_inf is not None and found_inf.device.type != "cpu")
        state.student = _reference_once(id(student))
        step = state.step
        by_step = state.momentum(step.double()) if callable(state.momentum) else state.momentum
        trace_networks(
            network,
            student,
            by_step if momentum is None else momentum,
            state.options,
            found_inf=found_inf,
            seed=state.seed,
            step=step if state.options.rounding == "stochastic" else None,
            skipped=state.skipped,
        )
        with torch.no_grad():
            step += 1 if found_inf is None else found_inf.reshape(()).to(step.device) == 0


def trace_options(rules: Mapping[str, Any] | None = None, *others: Any) -> Options:
    """make_options in a call that is being traced: the options are constants of the graph."""
    return _make_options_once(tuple(rules.items()) if rules else (), *others)


@torch.compiler.assume_constant_result
def _make_options_once(rules: tuple[tuple[str, Any], ...], *others: Any) -> Options:
    return make_options(dict(rules), *others)


def _update_lists_eagerly(
    teachers: list[Tensor], students: list[Tensor], momentum: float | Tensor, options: Options, given: dict[str, Any]
) -> None:
    check_step(options.rounding, given["step"])
    teachers, students, _ = pair_tensors(teachers, students)
    update_lists(teachers, students, make_arguments([momentum], **given), options)


def _update_networks_eagerly(
    teacher: nn.Module, student: nn.Module, momentum: float | Tensor, options: Options, given: dict[str, Any]
) -> None:
    check_step(options.rounding, given["step"])
    update_networks([teacher], student, make_arguments([momentum], **given), options)


def _any_distributed(tensors: Sequence[Tensor]) -> bool:
    """DTensor asks every operator how it distributes shards. Ours updates local shards of any placement, eagerly."""
    kind = _dtensor_once()
    return any(isinstance(tensor, kind) for tensor in tensors)


@torch.compiler.assume_constant_result
def _dtensor_once() -> type | tuple[()]:
    return dtensor_class()


def _renew_caches_of(teacher: nn.Module) -> None:
    renew_caches(find_caching_modules(teacher))


def _to_tensor(number: float | Tensor, dtype: torch.dtype) -> Tensor:
    return number if isinstance(number, Tensor) else torch.full((), number, dtype=dtype, device="cpu")


def _object_of(address: int) -> Any:
    """The object with this id. Before torch 2.14, assume_constant_result does not take modules as arguments. The graph
    guards on the id."""
    return ctypes.cast(address, ctypes.py_object).value


@torch.compiler.assume_constant_result
def _pair_once(
    teacher_id: int, student_id: int, rules: tuple[tuple[str, Any], ...], buffers: Any
) -> tuple[tuple[str, ...], tuple[bool, ...], bool]:
    """The names of the tensors that are updated, which of them are copied, and whether modules of the teacher cache
    values derived from their weights."""
    teacher, student = _object_of(teacher_id), _object_of(student_id)
    check_order([*teacher.parameters()], [*student.parameters()], "eman_update_(teacher, student, momentum)")
    pairs = pair_modules(teacher, student, Options(rules, buffers))
    return (
        tuple(pair.name for pair in pairs),
        tuple(pair.rule == "copy" for pair in pairs),
        bool(find_caching_modules(teacher)),
    )


@torch.compiler.assume_constant_result
def _reference_once(module_id: int) -> Any:
    """torch 2.6 cannot create a weak reference in a graph."""
    return StudentReference(_object_of(module_id))


@torch.compiler.assume_constant_result
def _prepare_once(network_id: int, state_id: int, on_device: bool) -> None:
    """Puts the step into a tensor, because a number would be a constant of the graph."""
    state = _object_of(state_id)
    with _disable_current_modes():  # make_fx would make the counters local to its graph
        state.prepare_counters(_object_of(network_id), on_device)
        if not isinstance(state.step, Tensor):
            with torch.inference_mode(False):
                state.step = torch.full((), state.step, dtype=torch.int64, device="cpu")
