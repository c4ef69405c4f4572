"""Which teacher tensor follows which student tensor, and by which rule. Names only: no address is looked at here."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

Rule = Literal["ema", "copy", "skip", "share"]
RULES = get_args(Rule)

# Path components that wrappers put into their module's names. DDP's and DataParallel's "module" is a name that a
# network may well use itself, so that one is looked through only where it leads every name.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_LISTED = 20

# Whose buffers are state of the student's own, the average of which means nothing: they are copied. By the names of
# classes, because what a process has not imported it does not have.
_STATE_MODULES = {
    "torch.nn.utils.parametrizations._SpectralNorm",
    "torch.ao.quantization.observer.ObserverBase",
    "torch.ao.quantization.fake_quantize.FakeQuantizeBase",
    "torch.ao.pruning.sparsifier.utils.FakeSparsity",
    "torchao.quantization.pt2e.observer.ObserverBase",
    "torchao.quantization.pt2e.fake_quantize.FakeQuantizeBase",
    "torchao.quantization.qat.fake_quantizer.FakeQuantizerBase",
}
# Hooks that keep such buffers in the module they are on: the attribute with the name of the tensor they work on, and
# what they append to it.
_STATE_HOOKS = {
    "torch.nn.utils.spectral_norm.SpectralNorm": ("name", ("_u", "_v")),
    "torch.nn.utils.prune.BasePruningMethod": ("_tensor_name", ("_mask",)),
}


@dataclass(frozen=True, slots=True)
class Pair:
    """A teacher tensor, the student tensor that it follows, and how: rule is "ema" or "copy", or "swap" to exchange."""

    name: str
    teacher: Tensor
    student: Tensor
    rule: str
    group: int = 0  # which of several teachers of the student this is of
    cast: Tensor | None = None  # the teacher tensor's low-precision copy, written along
    first: int = 0  # the number of its first element, by which stochastic rounding draws
    because: str = ""  # why it is copied although it could be averaged
    # Of a shard: how many elements the whole tensor has, and the number of the shard's first among them.
    whole: int | None = None
    offset: int = 0


def unwrap(module: nn.Module) -> nn.Module:
    """The network inside DDP, DataParallel and torch.compile."""
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = module._orig_mod
        else:
            return module


def check_network(network: object) -> None:
    """Raises TypeError for what is no network."""
    if not isinstance(network, nn.Module):
        remedy = "the network itself, an nn.Module, and not its parameters() or state_dict()"
        raise TypeError(f"a teacher and a student must be {remedy}; it is a {type(network).__name__}")


def every_name(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by every name that the module has for them, as they are in its state_dict."""
    return chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, the non-persistent too, by the names they have in the unwrapped network.

    Raises ValueError where two have one name there.
    """
    tensors, names = {}, {}
    for name, tensor in every_name(module):
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in tensors and tensors[short] is not tensor:
            raise ValueError(
                f"{names[short]} and {name} are two tensors of one name, {short}, without the wrapper's prefix; give "
                "one of them another name. Nothing was written."
            )
        tensors[short], names[short] = tensor, name
    while tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def state_buffers(module: nn.Module) -> dict[int, str]:
    """The buffers whose average means nothing, by their id, and the class of what keeps its state in them."""
    owners: dict[int, str] = {}
    for child in module.modules():
        if _classes(child) & _STATE_MODULES:
            owners.update((id(buffer), type(child).__name__) for buffer in child._buffers.values())
        for hook in child._forward_pre_hooks.values():
            for kind in _classes(hook) & _STATE_HOOKS.keys():
                attribute, endings = _STATE_HOOKS[kind]
                names = [getattr(hook, attribute) + ending for ending in endings]
                owners.update((id(child._buffers.get(name)), type(hook).__name__) for name in names)
    return owners


def _classes(thing: object) -> set[str]:
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in type(thing).__mro__}


def check_rules(rules: Mapping[str, Rule], buffers: Rule) -> None:
    """Raises ValueError for a rule that is none."""
    for pattern, rule in [*rules.items(), ("buffers", buffers)]:
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r} for {pattern!r}: it must be one of {', '.join(RULES)}")


def asked_rule(name: str, rules: Mapping[str, Rule], buffers: Rule, is_buffer: bool) -> Rule | None:
    """The rule that was asked for, of the first pattern that matches or the buffers'; None: each tensor's own."""
    for pattern, rule in rules.items():
        if fnmatchcase(name, pattern):
            return rule
    return buffers if is_buffer and buffers != "ema" else None


def shared_tensors(student: nn.Module, rules: Mapping[str, Rule], buffers: Rule) -> dict[str, Tensor]:
    """The student's tensors that are the teacher's too. Raises ValueError where tied names would be and would not."""
    if "share" not in (buffers, *rules.values()):
        return {}
    tensors, its_buffers = named_tensors(student), {id(buffer) for buffer in student.buffers()}
    shared = {n: t for n, t in tensors.items() if asked_rule(n, rules, buffers, id(t) in its_buffers) == "share"}
    name_of = {id(tensor): name for name, tensor in shared.items()}
    check(
        [],
        [
            f"{name}: the student ties it to {name_of[id(tensor)]}, which is to be shared"
            for name, tensor in tensors.items()
            if id(tensor) in name_of and name not in shared
        ],
        'Give both the rule "share", or neither.',
    )
    return shared


def pair_modules(
    teacher: nn.Module, student: nn.Module, rules: Mapping[str, Rule] | None = None, buffers: Rule = "ema"
) -> list[Pair]:
    """Pair two networks by name.

    rules: name patterns (fnmatch, over the unwrapped network's names) and their rule; the first that matches counts.
    buffers: what floating-point buffers do that no pattern names. With "copy" and "skip", integer buffers do the same.
    With "ema", those are copied whose average means nothing: spectral norm's vectors, prune's masks, observers' ranges.
    What has the rule "share" is in no pair: both networks hold one tensor.
    Raises ValueError with every difference between the two networks in one message.
    """
    rules = rules or {}
    check_rules(rules, buffers)
    check_gathered(teacher, "teacher")
    check_gathered(student, "student")
    teachers, students = named_tensors(teacher), named_tensors(student)
    is_buffer = {id(tensor) for tensor in chain(teacher.buffers(), student.buffers())}
    states = state_buffers(teacher) | state_buffers(student)
    because: dict[str, str] = {}

    def rule_of(name: str, tensor: Tensor) -> Rule:
        if (asked := asked_rule(name, rules, buffers, id(tensor) in is_buffer)) is not None:
            return asked
        rule = default_rule(tensor)
        if rule == "ema" and id(tensor) in states:
            because[name] = f"{states[id(tensor)]} keeps its state in it, whose average means nothing"
            return "copy"
        return rule

    tensors = students | teachers
    followed = {name: rule for name, tensor in tensors.items() if (rule := rule_of(name, tensor)) != "skip"}
    for pattern in rules:
        if not any(fnmatchcase(name, pattern) for name in tensors):
            warnings.warn(f"the rule {pattern!r} matches no tensor of the teacher or the student", stacklevel=2)
    differences = [f"{name}: the teacher has none" for name in followed if name not in teachers]
    differences += [f"{name}: the student has none" for name in followed if name not in students]
    names = [name for name in followed if name in teachers and name in students]
    for name in [name for name in names if followed[name] == "share"]:
        names.remove(name)
        if teachers[name] is not students[name]:
            differences.append(f"{name}: it is to be shared, and the teacher's is another tensor than the student's")
    pairs = [
        Pair(name, teachers[name], students[name], followed[name], because=because.get(name, "")) for name in names
    ]
    remedy = (
        "Is the teacher of the student's architecture? "
        'A tensor that is not to follow takes a rule, like rules={"predictor.*": "skip"}.'
    )
    if "share" in followed.values():
        remedy += (
            " What is to be shared again (after a copy, a load or a replaced layer): "
            "EMANTeacher(student, module=teacher.module, keep_values=True, rules=...)."
        )
    check(pairs, differences, remedy)
    return pairs


def check_order(teacher: list[Tensor], student: list[Tensor], order: str) -> None:
    """Raises ValueError where the first is what an optimizer trains, and the second is not."""
    if teacher and student and all(t.requires_grad for t in teacher) and not any(s.requires_grad for s in student):
        raise ValueError(
            "every parameter of the teacher requires grad and none of the student's does: they seem to be the wrong "
            f"way round, and the order is {order}. If not, teacher.requires_grad_(False). Nothing was written."
        )


def check_gathered(network: nn.Module, who: str) -> None:
    """Raises ValueError where parameters have been taken away."""
    named = [(n, p) for n, p in network.named_parameters() if not isinstance(p, UninitializedTensorMixin)]
    empty = [(name, parameter) for name, parameter in named if parameter.numel() == 0]
    partitioned = [name for name, parameter in empty if hasattr(parameter, "ds_shape")]
    if partitioned or (named and len(empty) == len(named)):
        raise ValueError(
            f"the {who}'s {(partitioned or [empty[0][0]])[0]} is empty ({len(empty)} of {len(named)} parameters "
            "are), as DeepSpeed's ZeRO-3 leaves them outside of a forward. Make and update a teacher inside "
            "deepspeed.zero.GatheredParameters([*teacher.parameters(), *student.parameters()], modifier_rank=0). "
            "Nothing was written."
        )


def check_lengths(teacher: list[Tensor], student: list[Tensor]) -> None:
    """Raises ValueError for lists that cannot be paired by position."""
    if len(teacher) != len(student):
        raise ValueError(f"{len(teacher)} teacher tensors and {len(student)} student tensors: they must be as many")


def pair_lists(teacher: list[Tensor], student: list[Tensor], copied: Sequence[bool] = ()) -> list[Pair]:
    """Pair two lists of one length by position, each tensor by its default rule, or copied where `copied` says so."""
    all_three = enumerate(zip(teacher, student, copied or [False] * len(teacher), strict=True))
    pairs = [Pair(f"teacher_tensors[{i}]", t, s, "copy" if c else default_rule(t)) for i, (t, s, c) in all_three]
    if all(isinstance(tensor, nn.Parameter) for tensor in student):
        check_order(teacher, student, "ema_update_(teacher_tensors, student_tensors, momentum)")
    check(pairs)
    return pairs


def default_rule(tensor: Tensor) -> Rule:
    """Averages what can be averaged: floating point and complex. Counters and flags are copied."""
    return "ema" if tensor.is_floating_point() or tensor.is_complex() else "copy"


def check(
    pairs: Iterable[Pair],
    differences: Iterable[str] = (),
    remedy: str = "",
    head: str = "the teacher cannot follow the student; nothing was written.",
) -> None:
    """Raises ValueError that lists the differences given and all that is wrong with a pair by itself."""
    wrong = [*differences, *(f"{pair.name}: {fault}" for pair in pairs if (fault := _fault(pair)))]
    if wrong:
        listed = wrong[:_LISTED] + [f"and {len(wrong) - _LISTED} more"] * (len(wrong) > _LISTED)
        raise ValueError("\n  ".join([head, *listed]) + f"\n{remedy}".rstrip())


def _fault(pair: Pair) -> str | None:
    for who, tensor in (("teacher", pair.teacher), ("student", pair.student)):
        if isinstance(tensor, UninitializedTensorMixin):
            return f"the {who} is lazy and has no shape yet; run one forward pass first"
        if tensor.is_meta:
            return f"the {who} is on the meta device and holds no data; materialise it with to_empty() first"
        if tensor.is_quantized:
            return f"the {who} is quantized ({tensor.dtype}); keep an unquantized teacher and quantize a copy of it"
        if tensor.layout is not torch.strided or tensor.is_nested:
            layout = "nested" if tensor.is_nested else tensor.layout
            return f"the {who} is {layout}; only strided tensors can follow"
    teacher, student = pair.teacher, pair.student
    if teacher.shape != student.shape:
        return f"the teacher's shape is {tuple(teacher.shape)}, the student's {tuple(student.shape)}"
    kinds = [default_rule(tensor) for tensor in (teacher, student)]
    if kinds[0] != kinds[1] or teacher.is_complex() != student.is_complex():
        return f"the teacher is {teacher.dtype}, the student {student.dtype}"
    if pair.rule == "ema" and kinds[0] != "ema":
        return f"the rule 'ema' needs floating point, and it is {teacher.dtype}; use 'copy'"
    for tensor in (teacher, student):
        if pair.rule == "ema" and not _computes(tensor.dtype):
            return f"torch cannot compute with {tensor.dtype}; use the rule 'copy'"
    return None


@cache
def _computes(dtype: torch.dtype) -> bool:
    try:
        torch.zeros(1, dtype=dtype).to(torch.complex128)
    except NotImplementedError:
        return False
    return True
