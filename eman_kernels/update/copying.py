"""The teacher's network: a copy of the student, or a given network with the student's values."""

import functools
import types
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from ..networks.errors import raise_differences, warn_user
from ..networks.names import check_network, named_tensors, unwrap
from ..networks.rules import requested_rule, shared_tensors
from ..networks.sharding import check_share_with_sharding
from ..networks.tensors import is_plain
from ..options import Options
from .arguments import make_arguments
from .eager import update_lists, update_networks

# How deep a callable is searched for a module that it would call.
_SEARCH_DEPTH = 6


def copy_student(student: nn.Module, options: Options) -> nn.Module:
    """A deep copy of the student that requires no gradients, except for the tensors that it shares with the student.

    Raises TypeError that names the cause if the student cannot be copied, and warns if the copy's forward would call
    the student.
    """
    check_network(student)
    student = unwrap(student)
    if any(hasattr(parameter, "ds_shape") for parameter in student.parameters()):
        raise TypeError(
            "the student cannot be deep-copied: its hooks gather its own parameters (DeepSpeed's ZeRO-3). Inside "
            "deepspeed.zero.GatheredParameters of both networks, use EMANTeacher(student, module=another_instance), "
            "where deepspeed.initialize() has been called on that instance too"
        )
    shared = shared_tensors(student, options)
    try:
        copy = deepcopy(student, {id(tensor): tensor for tensor in shared.values()})
    except Exception as error:
        raise TypeError(
            f"the student cannot be deep-copied: {_find_copy_fault(student)} ({type(error).__name__}: {error}). Give "
            "the teacher its own network, built like the student: EMANTeacher(student, module=another_instance)"
        ) from error
    students = {id(module) for module in student.modules()}
    for name, module in copy.named_modules():
        if "forward" in vars(module) and _can_call(vars(module)["forward"], students):
            warn_user(
                f"the forward of the student's {name or 'network itself'} was replaced by a function that holds the "
                "student, and so was the copy's: the teacher would run the student. Patch the teacher's own forward, "
                "or use EMANTeacher(student, module=another_instance)"
            )
    return _disable_gradients(copy, shared)


def adopt_module(module: nn.Module, student: nn.Module, options: Options, keep_values: bool) -> nn.Module:
    """The given network, with the student's values unless it is to keep its own."""
    check_network(module)
    check_network(student)
    shared = shared_tensors(student, options)
    module = unwrap(module)
    _share_tensors(module, shared)
    _disable_gradients(module, shared)
    if keep_values:
        return module
    options = Options(options.rules, options.buffers, options.backend)
    update_networks([module], student, make_arguments([0.0]), options)
    # Tensors that updates skip start with the student's values too, if both networks have them.
    students, buffers = named_tensors(student), {id(buffer) for buffer in student.buffers()}
    skipped = [
        (tensor, theirs)
        for name, tensor in named_tensors(module).items()
        if (theirs := students.get(name)) is not None
        and requested_rule(name, options, id(theirs) in buffers) == "skip"
        and tensor.shape == theirs.shape
        and not _is_same_memory(tensor, theirs)
    ]
    update_lists([t for t, _ in skipped], [s for _, s in skipped], make_arguments([0.0]), options)
    return module


def convert_dtype(module: nn.Module, dtype: torch.dtype, student: nn.Module) -> None:
    """Convert the floating-point tensors that are not shared with the student."""
    students = set(map(id, [*student.parameters(), *student.buffers()]))
    if not any(id(tensor) in students for tensor in [*module.parameters(), *module.buffers()]):
        module.to(dtype)
    else:
        module._apply(lambda t: t if id(t) in students or not t.is_floating_point() else t.to(dtype))


def _disable_gradients(module: nn.Module, shared: Mapping[str, Tensor]) -> nn.Module:
    shared_ids = set(map(id, shared.values()))
    for parameter in module.parameters():
        if id(parameter) not in shared_ids:
            parameter.requires_grad_(False)
    return module


def _share_tensors(module: nn.Module, shared: Mapping[str, Tensor]) -> None:
    """Replace the module's own tensors by the student's."""
    if not shared:
        return
    check_share_with_sharding(module)
    own = named_tensors(module)
    differences = [f"{name}: the teacher has none" for name in shared if name not in own]
    for name, tensor in shared.items():
        kinds = [isinstance(each, nn.Parameter) for each in (own.get(name, tensor), tensor)]
        shapes = [tuple(each.shape) for each in (own.get(name, tensor), tensor)]
        if kinds[0] != kinds[1]:
            differences.append(f"{name}: it is a parameter in one network and a buffer in the other")
        elif shapes[0] != shapes[1]:
            differences.append(f"{name}: the teacher's shape is {shapes[0]}, the student's {shapes[1]}")
    raise_differences(differences, "Only tensors that are alike in both networks can be shared.")
    new = {id(own[name]): tensor for name, tensor in shared.items()}
    for holder in module.modules():
        for tensors in (holder._parameters, holder._buffers):
            tensors.update({name: new[id(tensor)] for name, tensor in tensors.items() if id(tensor) in new})


def _is_same_memory(one: Tensor, other: Tensor) -> bool:
    return one is other or (is_plain(one) and is_plain(other) and one.data_ptr() == other.data_ptr())


def _find_copy_fault(student: nn.Module) -> str:
    for name, module in student.named_modules():
        for attribute, value in vars(module).items():
            if attribute == "_modules":
                continue
            inner = value.items() if attribute in ("_parameters", "_buffers") else [(attribute, value)]
            for key, thing in inner:
                full_name = f"{name}.{key}".lstrip(".")
                if isinstance(thing, Tensor) and not thing.is_leaf:
                    return f"its {full_name} is the result of a computation that autograd recorded"
                try:
                    deepcopy(thing)
                except Exception:
                    return f"its {full_name} is a {type(thing).__name__}"
    return "a module refuses to be copied"


def _can_call(thing: object, modules: set[int], depth: int = _SEARCH_DEPTH) -> bool:
    """Whether a callable holds one of these modules: bound, closed over, as a default, or wrapped."""
    if id(thing) in modules:
        return True
    if depth == 0 or isinstance(thing, nn.Module | type):
        return False
    inner: list[object] = []
    if isinstance(thing, types.MethodType):
        inner = [thing.__self__, thing.__func__]
    elif isinstance(thing, functools.partial):
        inner = [thing.func, *thing.args, *thing.keywords.values()]
    elif isinstance(thing, types.FunctionType):
        for cell in thing.__closure__ or ():
            try:
                inner.append(cell.cell_contents)
            except ValueError:  # not assigned yet
                continue
        inner += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *vars(thing).values()]
    elif isinstance(thing, list | tuple):
        inner = list(thing)
    elif callable(thing):
        inner = list(getattr(thing, "__dict__", {}).values())
    return any(_can_call(each, modules, depth - 1) for each in inner)
