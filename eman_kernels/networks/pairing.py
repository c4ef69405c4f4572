"""Which teacher tensor follows which student tensor, and by which rule. Looks at names only, never at addresses."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from ..options import Options, Rule
from .errors import raise_differences, warn_user
from .names import named_tensors
from .rules import default_rule, find_state_buffers, matches_any, requested_rule
from .tensors import fsdp1_class


@dataclass(frozen=True, slots=True)
class Pair:
    """A teacher tensor, the student tensor that it follows, and how: rule is "ema", "copy", or "swap" to exchange."""

    name: str
    teacher: Tensor
    student: Tensor
    rule: str
    group: int = 0  # the index of the teacher, if several teachers follow one student
    cast: Tensor | None = None  # the low-precision copy of the teacher tensor that is written in the same pass
    first: int = 0  # the number of the first element, from which stochastic rounding derives its random bits
    because: str = ""  # why it is copied although it could be averaged
    # Of a shard: the number of elements of the whole tensor, and the number of the shard's first element in it.
    whole: int | None = None
    offset: int = 0


def pair_modules(teacher: nn.Module, student: nn.Module, options: Options) -> list[Pair]:
    """Pair two networks by name.

    With buffers="copy" or "skip", integer buffers are treated like all others. Tensors with the rule "share" are in no
    pair, because both networks hold the same tensor.

    Raises ValueError with every difference between the two networks in one message.
    """
    check_gathered(teacher, "teacher")
    check_gathered(student, "student")
    teachers, students = named_tensors(teacher), named_tensors(student)
    buffers = {id(tensor) for tensor in chain(teacher.buffers(), student.buffers())}
    state_owners = find_state_buffers(teacher) | find_state_buffers(student)
    because: dict[str, str] = {}

    def rule_of(name: str, tensor: Tensor) -> Rule:
        if (requested := requested_rule(name, options, id(tensor) in buffers)) is not None:
            return requested
        rule = default_rule(tensor)
        if rule == "ema" and id(tensor) in state_owners:
            because[name] = f"{state_owners[id(tensor)]} keeps its state in it, of which an average is meaningless"
            return "copy"
        return rule

    tensors = students | teachers
    followed = {name: rule for name, tensor in tensors.items() if (rule := rule_of(name, tensor)) != "skip"}
    for pattern, _ in options.rules:
        if not matches_any(pattern, tensors):
            warn_user(f"the rule {pattern!r} matches no tensor of the teacher or the student")
    differences = [f"{name}: the teacher has none" for name in followed if name not in teachers]
    differences += [f"{name}: the student has none" for name in followed if name not in students]
    names = [name for name in followed if name in teachers and name in students]
    for name in [name for name in names if followed[name] == "share"]:
        names.remove(name)
        if teachers[name] is not students[name]:
            differences.append(f"{name}: it is to be shared, but the teacher holds another tensor than the student")
    pairs = [
        Pair(name, teachers[name], students[name], followed[name], because=because.get(name, "")) for name in names
    ]
    differences += _describe_faults(pairs)
    remedy = (
        "Does the teacher have the student's architecture? If the student was changed after the teacher was made, "
        "change the teacher's network alike: teacher.module.head = copy.deepcopy(student.head).eval()"
        ".requires_grad_(False). "
        'Exclude a tensor that only one of them is to have with a rule such as rules={"predictor.*": "skip"}.'
    )
    if differences and any(isinstance(module, fsdp1_class()) for net in (teacher, student) for module in net.modules()):
        remedy = (
            "FSDP has wrapped or gathered them differently: wrap both with the same arguments (use_orig_params, "
            "sharding_strategy, auto_wrap_policy), and update outside of summon_full_params(), or in that of both."
        )
    if "share" in followed.values():
        remedy += (
            " To share again after a copy, a load or a replaced layer: "
            "EMANTeacher(student, module=teacher.module, keep_values=True, rules=...)."
        )
    raise_differences(differences, remedy)
    return pairs


def count_left_out(teachers: Iterable[nn.Module], options: Options) -> dict[str, int]:
    """How many of the teachers' tensors are "skipped" and "shared", without zeros."""
    counts: Counter[Rule | None] = Counter()
    for teacher in teachers:
        buffers = {id(buffer) for buffer in teacher.buffers()}
        named = named_tensors(teacher)
        rules = {id(t): requested_rule(name, options, id(t) in buffers) for name, t in named.items()}
        counts.update(rules.values())
    return {verb: counts[rule] for verb, rule in (("skipped", "skip"), ("shared", "share")) if counts[rule]}


def pair_lists(
    teachers: list[Tensor], students: list[Tensor], copied: Sequence[bool] = (), names: Sequence[str] = ()
) -> list[Pair]:
    """Pair two lists of equal length by position. copied: which tensors are copied; the others have default rules."""
    rules = [
        "copy" if copy else default_rule(tensor)
        for tensor, copy in zip(teachers, copied or [False] * len(teachers), strict=True)
    ]
    names = names or [f"teacher_tensors[{i}]" for i in range(len(teachers))]
    pairs = [Pair(*pair) for pair in zip(names, teachers, students, rules, strict=True)]
    if all(isinstance(tensor, nn.Parameter) for tensor in students):
        check_order(teachers, students, "ema_update_(teacher_tensors, student_tensors, momentum)")
    raise_differences(_describe_faults(pairs))
    return pairs


def check_lengths(teachers: list[Tensor], students: list[Tensor]) -> None:
    """Raises ValueError for lists that cannot be paired by position."""
    if len(teachers) != len(students):
        raise ValueError(
            f"got {len(teachers)} teacher tensors and {len(students)} student tensors; both lists must have the same "
            "length"
        )


def check_order(teachers: list[Tensor], students: list[Tensor], order: str) -> None:
    """Raises ValueError if the optimizer seems to train the teacher instead of the student."""
    if teachers and students and all(t.requires_grad for t in teachers) and not any(s.requires_grad for s in students):
        raise ValueError(
            "every parameter of the teacher requires grad and none of the student's does: they seem to be swapped. The "
            f"order is {order}. If the order is right, call teacher.requires_grad_(False). Nothing was written."
        )


def check_gathered(network: nn.Module, who: str) -> None:
    """Raises ValueError if DeepSpeed's ZeRO-3 has partitioned the parameters, which then are empty."""
    named = [(n, p) for n, p in network.named_parameters() if not isinstance(p, UninitializedTensorMixin)]
    empty = [(name, parameter) for name, parameter in named if parameter.numel() == 0]
    partitioned = [name for name, parameter in empty if hasattr(parameter, "ds_shape")]
    if partitioned or (named and len(empty) == len(named)):
        raise ValueError(
            f"the {who}'s {(partitioned or [empty[0][0]])[0]} is empty ({len(empty)} of {len(named)} parameters "
            "are), as DeepSpeed's ZeRO-3 leaves them outside of a forward. Create and update a teacher inside "
            "deepspeed.zero.GatheredParameters([*teacher.parameters(), *student.parameters()], modifier_rank=0). "
            "Nothing was written."
        )


def _describe_faults(pairs: Iterable[Pair]) -> list[str]:
    return [f"{pair.name}: {fault}" for pair in pairs if (fault := _find_pair_fault(pair))]


def _find_pair_fault(pair: Pair) -> str | None:
    """What is wrong with a pair by itself, whatever the backend."""
    for who, tensor in (("teacher", pair.teacher), ("student", pair.student)):
        if isinstance(tensor, UninitializedTensorMixin):
            return f"the {who} is lazy and has no shape yet; run one forward pass first"
        if tensor.is_meta:
            return f"the {who} is on the meta device and has no data; materialize it with to_empty() first"
        if tensor.is_quantized:
            return f"the {who} is quantized ({tensor.dtype}); keep an unquantized teacher and quantize a copy of it"
        if tensor.layout is not torch.strided or tensor.is_nested:
            layout = "nested" if tensor.is_nested else tensor.layout
            return f"the {who} is {layout}; only strided tensors are supported"
    teacher, student = pair.teacher, pair.student
    if teacher.shape != student.shape:
        return f"the teacher's shape is {tuple(teacher.shape)}, the student's {tuple(student.shape)}"
    kinds = [default_rule(tensor) for tensor in (teacher, student)]
    if kinds[0] != kinds[1] or teacher.is_complex() != student.is_complex():
        return f"the teacher is {teacher.dtype}, the student {student.dtype}"
    if pair.rule == "ema" and kinds[0] != "ema":
        return f"the rule 'ema' needs a floating-point tensor, but it is {teacher.dtype}; use 'copy'"
    for tensor in (teacher, student):
        if pair.rule == "ema" and not _supports_arithmetic(tensor.dtype):
            return f"torch cannot compute with {tensor.dtype}; use the rule 'copy'"
    return None


@cache
def _supports_arithmetic(dtype: torch.dtype) -> bool:
    try:
        torch.zeros(1, dtype=dtype).to(torch.complex128)
    except NotImplementedError:
        return False
    return True
