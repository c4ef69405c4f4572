"""The rule of each tensor: averaged, copied, skipped or shared."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..options import Options, Rule
from .errors import raise_differences
from .names import iterate_names, named_tensors

# Modules whose buffers are private state of the student: averaging them is not meaningful, so they are copied. Given by
# class name, because a process that never imported a class has no such module.
_STATE_MODULES = {
    "torch.nn.utils.parametrizations._SpectralNorm",
    "torch.ao.quantization.observer.ObserverBase",
    "torch.ao.quantization.fake_quantize.FakeQuantizeBase",
    "torch.ao.pruning.sparsifier.utils.FakeSparsity",
    "torchao.quantization.pt2e.observer.ObserverBase",
    "torchao.quantization.pt2e.fake_quantize.FakeQuantizeBase",
    "torchao.quantization.qat.fake_quantizer.FakeQuantizerBase",
}
# Hooks that keep such buffers in the module that they are registered on: the hook's attribute with the name of the
# tensor that it works on, and the suffixes of its buffers.
_STATE_HOOKS = {
    "torch.nn.utils.spectral_norm.SpectralNorm": ("name", ("_u", "_v")),
    "torch.nn.utils.prune.BasePruningMethod": ("_tensor_name", ("_mask",)),
}


def find_state_buffers(module: nn.Module) -> dict[int, str]:
    """Buffers that must not be averaged, by id, with the class that keeps its state in them."""
    owners: dict[int, str] = {}
    for child in module.modules():
        if _class_names(child) & _STATE_MODULES:
            owners.update((id(buffer), type(child).__name__) for buffer in child._buffers.values())
        for hook in child._forward_pre_hooks.values():
            for kind in _class_names(hook) & _STATE_HOOKS.keys():
                attribute, suffixes = _STATE_HOOKS[kind]
                names = [getattr(hook, attribute) + suffix for suffix in suffixes]
                owners.update((id(child._buffers.get(name)), type(hook).__name__) for name in names)
    return owners


def _class_names(thing: object) -> set[str]:
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in type(thing).__mro__}


def default_rule(tensor: Tensor) -> Rule:
    """Floating-point and complex tensors are averaged; counters and flags are copied."""
    return "ema" if tensor.is_floating_point() or tensor.is_complex() else "copy"


def requested_rule(name: str, options: Options, is_buffer: bool) -> Rule | None:
    """The rule of the first pattern that matches, or of the buffers; None if the user asked for none."""
    for pattern, rule in options.rules:
        if fnmatchcase(name, pattern):
            return rule
    return options.buffers if is_buffer and options.buffers != "ema" else None


def matches_any(pattern: str, names: Iterable[str]) -> bool:
    """Whether a rule's pattern matches one of the names."""
    return any(fnmatchcase(name, pattern) for name in names)


def shared_tensors(student: nn.Module, options: Options) -> dict[str, Tensor]:
    """The student's tensors with the rule "share". Raises ValueError if that holds for only one of two tied names."""
    if "share" not in (options.buffers, *dict(options.rules).values()):
        return {}
    tensors, buffers = named_tensors(student), {id(buffer) for buffer in student.buffers()}
    scripted = [each for each in student.modules() if isinstance(each, torch.jit.ScriptModule)]
    in_script = {id(tensor) for each in scripted for _, tensor in iterate_names(each)}
    shared = {n: t for n, t in tensors.items() if requested_rule(n, options, id(t) in buffers) == "share"}
    name_of = {id(tensor): name for name, tensor in shared.items()}
    raise_differences(
        (
            f"{name}: the student ties it to {name_of[id(tensor)]}, which is to be shared"
            for name, tensor in tensors.items()
            if id(tensor) in name_of and name not in shared
        ),
        'Give both the rule "share", or neither.',
    )
    raise_differences(
        (f"{name}: a ScriptModule holds it" for name, tensor in shared.items() if id(tensor) in in_script),
        "A copy of a ScriptModule has tensors of its own: share tensors of modules that are not scripted.",
    )
    return shared
