"""The teacher's network: a copy of the student, or a given network with the student's values."""

import dis
import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from itertools import chain
from weakref import ReferenceType

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from ..networks.errors import raise_differences, warn_user
from ..networks.names import check_network, iterate_names, named_tensors, unwrap
from ..networks.rules import requested_rule, shared_tensors
from ..networks.sharding import check_share_with_sharding
from ..networks.tensors import is_plain, storage_key
from ..options import Options
from .arguments import make_arguments
from .caching import find_caching_modules
from .eager import update_lists, update_networks

# How deep an attribute is searched for a function that holds the student.
_SEARCH_DEPTH = 8


def copy_student(student: nn.Module, options: Options) -> nn.Module:
    """A deep copy of the student that requires no gradients, except for the tensors that it shares with the student.

    Raises TypeError that names the cause if the student cannot be copied, and warns if the copy would run the student.
    """
    check_network(student)
    student = unwrap(student)
    if any(hasattr(parameter, "ds_shape") for parameter in student.parameters()):
        raise TypeError(
            "the student cannot be deep-copied: its hooks gather its own parameters (DeepSpeed's ZeRO-3). Inside "
            "deepspeed.zero.GatheredParameters of both networks, use EMANTeacher(student, module=another_instance), "
            "where deepspeed.initialize() has been called on that instance too"
        )
    _check_initialized(student)
    shared = shared_tensors(student, options)
    try:
        # Without no_grad, the parameters of a copied ScriptModule would be results of a recorded computation.
        with torch.no_grad():
            copy = deepcopy(student, {id(tensor): tensor for tensor in shared.values()})
    except Exception as error:
        raise TypeError(
            f"the student cannot be deep-copied: {_find_copy_fault(student)} ({type(error).__name__}: {error}). Give "
            "the teacher its own network, built like the student: EMANTeacher(student, module=another_instance)"
        ) from error
    return _prepare_teacher(copy, student, shared)


def adopt_module(module: nn.Module, student: nn.Module, options: Options, keep_values: bool) -> nn.Module:
    """The given network, with the student's values unless it is to keep its own."""
    check_network(module)
    check_network(student)
    _check_initialized(student)
    shared = shared_tensors(student, options)
    module = unwrap(module)
    _check_initialized(module)
    _share_tensors(module, shared)
    _prepare_teacher(module, unwrap(student), shared)
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
    """Convert the floating-point and complex tensors that are not shared with the student."""
    students = set(map(id, [*student.parameters(), *student.buffers()]))
    # Module.to() would take the imaginary parts away.
    if not any(id(t) in students or t.is_complex() for t in [*module.parameters(), *module.buffers()]):
        module.to(dtype)
    else:
        module._apply(lambda t: t if id(t) in students else t.to(dtype_of_kind(t, dtype)))


def dtype_of_kind(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype for the tensor in a network of this floating-point dtype: complex tensors stay complex, and integer
    tensors as they are."""
    if tensor.is_complex():
        return dtype if dtype.is_complex else torch.complex128 if dtype == torch.float64 else torch.complex64
    return dtype if tensor.is_floating_point() and dtype.is_floating_point else tensor.dtype


def apply_keeping_dtype(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """fn(tensor), as in Module._apply, but if fn would change the dtype, the tensor is only moved to another device."""
    if tensor.is_complex():
        probe = tensor.new_empty(0, dtype=tensor.dtype.to_real())  # a cast would take the imaginary part away
        new = fn(probe)
        return fn(tensor) if new.dtype == probe.dtype else tensor.to(new.device)
    new = fn(tensor)
    return new if new.dtype == tensor.dtype else tensor.to(new.device)


def _prepare_teacher(module: nn.Module, student: nn.Module, shared: Mapping[str, Tensor]) -> nn.Module:
    """Disable gradients, except for shared tensors. Raises ValueError if the modes of the network cannot be switched,
    and warns if it would run the student."""
    find_caching_modules(module)  # before eval() is called
    shared_ids = set(map(id, shared.values()))
    for parameter in module.parameters():
        if id(parameter) not in shared_ids:
            parameter.requires_grad_(False)
    _warn_of_held_student(module, student)
    return module


def _check_initialized(network: nn.Module) -> None:
    """Raises ValueError if the network has lazy tensors, which have no shape yet."""
    for name, tensor in iterate_names(network):
        if isinstance(tensor, UninitializedTensorMixin):
            raise ValueError(
                f"{name} is lazy and has no shape yet: run one forward pass of the network before the teacher is made"
            )


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


def _warn_of_held_student(module: nn.Module, student: nn.Module) -> None:
    """Warn if a function held by the teacher's modules reaches a module or tensor of the student: deepcopy leaves
    functions, with what they close over, and weak references as they are."""
    held = set(_iterate_keys(student)) - set(_iterate_keys(module))
    names = [
        f"{name}.{attribute}".lstrip(".")
        for name, child in module.named_modules()
        for attribute, value in vars(child).items()
        if attribute not in ("_parameters", "_buffers", "_modules") and _reaches(value, held)
    ]
    if names:
        warn_user(
            f"the teacher's {', '.join(names[:3])} holds a function that refers to modules or tensors of the student, "
            "so the teacher would run the student. Make it a method of the class, set the teacher's own, or use "
            "EMANTeacher(student, module=another_instance)"
        )


def _iterate_keys(network: nn.Module) -> Iterator[int]:
    """Identify the modules and the storages of a network."""
    yield from map(id, network.modules())
    yield from map(storage_key, chain(network.parameters(), network.buffers()))


def _reaches(root: object, held: set[int]) -> bool:
    """Whether one of these modules or storages can be reached. Searched breadth first."""
    seen: dict[int, object] = {}
    level = [root]
    for _ in range(_SEARCH_DEPTH):
        level = [thing for thing in level if id(thing) not in seen]
        seen.update((id(thing), thing) for thing in level)
        for thing in level:
            keys = _iterate_keys(thing) if isinstance(thing, nn.Module) else ()
            if not held.isdisjoint([storage_key(thing)] if isinstance(thing, Tensor) else keys):
                return True
        level = [inner for thing in level for inner in _contents(thing)]
    return False


def _contents(thing: object) -> Iterable[object]:
    """What an object holds, and what a function closes over, is bound to, or reads as a global network or tensor."""
    if isinstance(thing, nn.Module | Tensor | type | types.ModuleType):
        return ()
    if isinstance(thing, dict):
        return thing.values()
    if isinstance(thing, list | tuple | set | frozenset | deque):
        return thing
    if isinstance(thing, types.MethodType):
        return (thing.__self__, thing.__func__)
    if isinstance(thing, types.BuiltinFunctionType | types.MethodWrapperType):
        return (thing.__self__,)
    if isinstance(thing, ReferenceType):
        return (thing(),)
    inner = list(getattr(thing, "__dict__", {}).values())  # __wrapped__ among them
    if isinstance(thing, functools.partial):
        inner += [thing.func, *thing.args, *thing.keywords.values()]
    elif isinstance(thing, types.FunctionType):
        for cell in thing.__closure__ or ():
            with suppress(ValueError):  # not assigned yet
                inner.append(cell.cell_contents)
        inner += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        names = {step.argval for step in dis.get_instructions(thing) if step.opname == "LOAD_GLOBAL"}
        read = (thing.__globals__.get(name) for name in names)
        inner += [value for value in read if isinstance(value, nn.Module | Tensor)]
    return inner
