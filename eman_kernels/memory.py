"""Where tensors lie: each piece of memory is written once, and by nobody else."""

from bisect import bisect
from itertools import product
from math import gcd, prod

import torch
from torch import Tensor

from .pairing import Pair
from .watch import is_plain

# Where no arithmetic decides, so many pieces of a tensor are looked at one by one.
_PIECES = 1 << 16


def strides_of(tensor: Tensor) -> list[int]:
    """The strides that matter: a dimension of size 1 may have any."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def extent(tensor: Tensor) -> int:
    """The elements from the first in memory to the last, both counted."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def without_ties_and_empties(pairs: list[Pair]) -> list[Pair]:
    """Each piece of teacher memory once, and empty shards. Raises ValueError where one is to follow two students."""
    first: dict[object, Pair] = {}
    for pair in pairs:
        if pair.teacher.numel() == 0 and pair.whole is None:  # an empty shard has its numbers
            continue
        known = first.setdefault(place(pair.teacher), pair)
        if known.group != pair.group:
            raise ValueError(_shares(f"teacher {pair.group}", pair.name, f"teacher {known.group}", known.name))
        if known is not pair and (place(known.student), known.rule) != (place(pair.student), pair.rule):
            raise ValueError(
                f"the teacher ties {known.name} and {pair.name} to one memory, but they would follow different "
                f"students or rules; tie them in the student as well, or give the teacher two. Nothing was written."
            )
    return list(first.values())


def check_memory(pairs: list[Pair]) -> None:
    """Raises ValueError where a tensor that is written overlaps itself or another of the pairs."""
    several = len({pair.group for pair in pairs}) > 1
    spans: dict[torch.device, list[tuple[int, int, bool, str, str, Tensor]]] = {}
    for pair in pairs:
        teacher = f"teacher {pair.group}" if several else "the teacher"
        for who, tensor, written in (
            (teacher, pair.teacher, True),
            ("the student", pair.student, pair.rule == "swap"),
            (f"{teacher}'s low-precision copy", pair.cast, True),
        ):
            if tensor is None or not is_plain(tensor):
                continue
            if written and _overlaps_itself(tensor):
                raise ValueError(
                    f"{pair.name}: {who} is an expanded or overlapping view (shape {tuple(tensor.shape)}, "
                    f"strides {tensor.stride()}), and one place would be written twice; give it memory with .clone()"
                )
            start = tensor.data_ptr()
            end = start + extent(tensor) * tensor.element_size()
            spans.setdefault(tensor.device, []).append((start, end, written, who, pair.name, tensor))
    for on_device in spans.values():
        reaching: list[tuple[int, int, bool, str, str, Tensor]] = []  # those before it that end behind its start
        for span in sorted(on_device, key=lambda span: span[:5]):
            start, _, written, who, name, tensor = span
            reaching = [other for other in reaching if other[1] > start]
            for _, _, other_written, other, other_name, other_tensor in reaching:
                if (written or other_written) and _overlap(other_tensor, tensor):
                    raise ValueError(_shares(who, name, other, other_name))
            reaching.append(span)


def place(tensor: Tensor) -> object:
    """Equal for tensors that are one piece of memory."""
    if not is_plain(tensor) or not tensor.numel():
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _shares(who: str, name: str, other: str, other_name: str) -> str:
    return (
        f"{who}'s {name} and {other}'s {other_name} share memory; the teacher must have its own (copy.deepcopy the "
        f"student, or .clone() the tensor). Nothing was written."
    )


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, of which the first begins first and ends behind the other's begin, have a byte in common:
    columns of one matrix, or real and imaginary parts, lie between one another and have none."""
    (width, steps), (other_width, other_steps) = _pieces(one), _pieces(other)
    distance = other.data_ptr() - one.data_ptr()
    every = gcd(*(step for _, step in steps + other_steps))
    if every and width <= distance % every <= every - other_width:
        return False
    if max(prod(size for size, _ in its) for its in (steps, other_steps)) > _PIECES:
        return True  # as far as can be told
    starts = sorted(_starts(steps))
    for start in _starts(other_steps):
        start += distance
        at = bisect(starts, start)
        if (at and starts[at - 1] + width > start) or (at < len(starts) and starts[at] < start + other_width):
            return True
    return False


def _pieces(tensor: Tensor) -> tuple[int, list[tuple[int, int]]]:
    """The bytes of its contiguous pieces, and how many there are along each dimension, how many bytes apart."""
    width, steps = tensor.element_size(), []
    both = zip(tensor.stride(), tensor.shape, strict=True)
    for step, size in sorted((stride * tensor.element_size(), size) for stride, size in both if size > 1):
        if step == width:
            width *= size
        else:
            steps.append((size, step))
    return width, steps


def _starts(steps: list[tuple[int, int]]) -> list[int]:
    return [sum(place) for place in product(*(range(0, size * step, step) for size, step in steps))]
