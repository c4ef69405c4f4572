"""The teacher's network: a copy of the student, or one that is given, with the student's values."""

import functools
import types
import warnings
from collections.abc import Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn

from .distributed import check_share
from .functional import ema_update_, eman_update_
from .pairing import Rule, asked_rule, check, check_network, named_tensors, shared_tensors, unwrap
from .watch import is_plain


def copied(student: nn.Module, rules: Mapping[str, Rule], buffers: Rule) -> nn.Module:
    """A deep copy of the student that requires no gradients, but for the tensors that it shares with the student, which
    are as they are. Raises TypeError that says what stands in the way, and warns of a copy that would run the student.
    """
    check_network(student)
    student = unwrap(student)
    if any(hasattr(parameter, "ds_shape") for parameter in student.parameters()):
        raise TypeError(
            "the student cannot be deep-copied: its hooks gather its own parameters (DeepSpeed's ZeRO-3). Within "
            "deepspeed.zero.GatheredParameters of both, take EMANTeacher(student, module=another_instance), which "
            "deepspeed.initialize() has been given too"
        )
    shared = shared_tensors(student, rules, buffers)
    try:
        copy = deepcopy(student, {id(tensor): tensor for tensor in shared.values()})
    except Exception as error:
        raise TypeError(
            f"the student cannot be deep-copied: {_cause(student)} ({type(error).__name__}: {error}). Give the teacher "
            "a network of its own, built as the student was: EMANTeacher(student, module=another_instance)"
        ) from error
    theirs = {id(module) for module in student.modules()}
    for name, module in copy.named_modules():
        if "forward" in vars(module) and _leads_to(vars(module)["forward"], theirs):
            warnings.warn(
                f"the forward of the student's {name or 'network itself'} was replaced by a function that holds the "
                "student, and so does the copy's: the teacher would run the student. Patch the teacher's own forward, "
                "or take EMANTeacher(student, module=another_instance)",
                stacklevel=3,
            )
    return _without_gradients(copy, shared)


def adopted(
    module: nn.Module, student: nn.Module, rules: Mapping[str, Rule], buffers: Rule, backend: str | None, keep: bool
) -> nn.Module:
    """This network, with the student's values unless it is to keep its own."""
    check_network(module)
    check_network(student)
    shared = shared_tensors(student, rules, buffers)
    module = unwrap(module)
    _share(module, shared)
    _without_gradients(module, shared)
    if keep:
        return module
    eman_update_(module, student, 0.0, rules=rules, buffers=buffers, backend=backend)
    # What the updates skip is to begin alike too, where both have it.
    students, its_buffers = named_tensors(student), {id(buffer) for buffer in student.buffers()}
    skipped = [
        (tensor, theirs)
        for name, tensor in named_tensors(module).items()
        if (theirs := students.get(name)) is not None
        and asked_rule(name, rules, buffers, id(theirs) in its_buffers) == "skip"
        and tensor.shape == theirs.shape
        and not _same(tensor, theirs)
    ]
    ema_update_([t for t, _ in skipped], [s for _, s in skipped], 0.0, backend=backend)
    return module


def to_dtype(module: nn.Module, dtype: torch.dtype, student: nn.Module) -> None:
    """Convert the floating-point tensors that are not the student's."""
    theirs = set(map(id, [*student.parameters(), *student.buffers()]))
    if not any(id(tensor) in theirs for tensor in [*module.parameters(), *module.buffers()]):
        module.to(dtype)
    else:
        module._apply(lambda t: t if id(t) in theirs or not t.is_floating_point() else t.to(dtype))


def _without_gradients(module: nn.Module, shared: Mapping[str, Tensor]) -> nn.Module:
    theirs = set(map(id, shared.values()))
    for parameter in module.parameters():
        if id(parameter) not in theirs:
            parameter.requires_grad_(False)
    return module


def _share(module: nn.Module, shared: Mapping[str, Tensor]) -> None:
    """Put the student's tensors in the place of the module's own."""
    if not shared:
        return
    check_share(module)
    own = named_tensors(module)
    differences = [f"{name}: the teacher has none" for name in shared if name not in own]
    for name, tensor in shared.items():
        kinds = [isinstance(each, nn.Parameter) for each in (own.get(name, tensor), tensor)]
        shapes = [tuple(each.shape) for each in (own.get(name, tensor), tensor)]
        if kinds[0] != kinds[1]:
            differences.append(f"{name}: of teacher and student, one has a parameter and the other a buffer")
        elif shapes[0] != shapes[1]:
            differences.append(f"{name}: the teacher's shape is {shapes[0]}, the student's {shapes[1]}")
    check([], differences, "Only what both have alike can be shared.")
    new = {id(own[name]): tensor for name, tensor in shared.items()}
    for holder in module.modules():
        for tensors in (holder._parameters, holder._buffers):
            tensors.update({name: new[id(tensor)] for name, tensor in tensors.items() if id(tensor) in new})


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (is_plain(one) and is_plain(other) and one.data_ptr() == other.data_ptr())


def _cause(student: nn.Module) -> str:
    for name, module in student.named_modules():
        for attribute, value in vars(module).items():
            if attribute == "_modules":
                continue
            inner = value.items() if attribute in ("_parameters", "_buffers") else [(attribute, value)]
            for key, thing in inner:
                where = f"{name}.{key}".lstrip(".")
                if isinstance(thing, Tensor) and not thing.is_leaf:
                    return f"its {where} is the result of a computation that autograd recorded"
                try:
                    deepcopy(thing)
                except Exception:
                    return f"its {where} is a {type(thing).__name__}"
    return "a module refuses it"


def _leads_to(thing: object, modules: set[int], depth: int = 6) -> bool:
    """Whether calling it would come to one of these modules: by what it is bound to, closed over or wraps."""
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
            except ValueError:  # empty yet
                continue
        inner += [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values(), *vars(thing).values()]
    elif isinstance(thing, list | tuple):
        inner = list(thing)
    elif callable(thing):
        inner = list(getattr(thing, "__dict__", {}).values())
    return any(_leads_to(each, modules, depth - 1) for each in inner)
