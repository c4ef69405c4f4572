"""Memory overlap checks: no element is written twice, and no tensor that is written aliases another one."""

from bisect import bisect
from itertools import product
from math import gcd, prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..networks.errors import NOTHING_WRITTEN
from ..networks.pairing import Pair
from ..networks.tensors import address_of, extent, is_plain, memory_key

# Where the strides do not decide whether two tensors overlap, up to this many pieces are compared one by one.
_MAX_PIECES = 1 << 16


class _Span(NamedTuple):
    """The bytes from the begin of a tensor to its end, gaps included."""

    start: int
    end: int
    written: bool
    who: str
    name: str
    tensor: Tensor


def drop_ties_and_empties(pairs: list[Pair]) -> list[Pair]:
    """Each piece of teacher memory once, and no empty tensors. Keeps empty shards: their elements still have numbers.

    Raises ValueError if one piece of memory would follow two students.
    """
    first: dict[object, Pair] = {}
    for pair in pairs:
        if pair.teacher.numel() == 0 and pair.whole is None:
            continue
        earlier = first.setdefault(memory_key(pair.teacher), pair)
        if earlier.group != pair.group:
            raise ValueError(
                _describe_overlap(f"teacher {pair.group}", pair.name, f"teacher {earlier.group}", earlier.name)
            )
        if (memory_key(earlier.student), earlier.rule) != (memory_key(pair.student), pair.rule):
            raise ValueError(
                f"the teacher ties {earlier.name} and {pair.name}, but they would follow different student tensors or "
                f"rules; tie them in the student as well, or give the teacher two tensors. {NOTHING_WRITTEN}"
            )
    return list(first.values())


def check_overlaps(pairs: list[Pair]) -> None:
    """Raises ValueError if a tensor that is written overlaps itself or another tensor of the pairs."""
    several = len({pair.group for pair in pairs}) > 1
    spans: dict[torch.device, list[_Span]] = {}
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
                    f"strides {tensor.stride()}), so one element would be written twice; copy it with .clone()"
                )
            start = address_of(tensor)
            end = start + extent(tensor) * tensor.element_size()
            spans.setdefault(tensor.device, []).append(_Span(start, end, written, who, pair.name, tensor))
    # A sweep over the spans in the order of their start: only those that have not ended yet can overlap the next one.
    for on_device in spans.values():
        open_spans: list[_Span] = []
        for span in sorted(on_device, key=lambda span: span[:5]):
            open_spans = [other for other in open_spans if other.end > span.start]
            for other in open_spans:
                if (span.written or other.written) and _tensors_overlap(other.tensor, span.tensor):
                    raise ValueError(_describe_overlap(span.who, span.name, other.who, other.name))
            open_spans.append(span)


def _describe_overlap(who: str, name: str, other: str, other_name: str) -> str:
    remedy = "the teacher must have its own (copy.deepcopy the student, or .clone() the tensor)"
    if who == other:
        remedy = "one of them must have its own (.clone() it), or both networks must tie them alike"
    return f"{who}'s {name} and {other}'s {other_name} share memory; {remedy}. {NOTHING_WRITTEN}"


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two indices address the same element. Exact: in the order of their strides, each dimension must step over
    everything that the smaller ones reach."""
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _tensors_overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors share a byte, where one starts before two and ends after two's start.

    Interleaved tensors, such as columns of one matrix or real and imaginary parts, do not. A tensor is a set of
    contiguous pieces, all of one width, at a sum of multiples of its steps. Every distance between pieces of the two
    tensors is the distance of their starts, modulo the greatest common divisor of all steps: often that decides.
    Otherwise the pieces are compared one by one.
    """
    (width, steps), (other_width, other_steps) = _contiguous_pieces(one), _contiguous_pieces(other)
    distance = address_of(other) - address_of(one)
    divisor = gcd(*(step for _, step in steps + other_steps))
    if divisor and width <= distance % divisor <= divisor - other_width:
        return False
    if max(prod(count for count, _ in its) for its in (steps, other_steps)) > _MAX_PIECES:
        return True  # undecided, so assume that they do
    starts = sorted(_piece_starts(steps))
    for start in _piece_starts(other_steps):
        start += distance
        at = bisect(starts, start)
        if (at and starts[at - 1] + width > start) or (at < len(starts) and starts[at] < start + other_width):
            return True
    return False


def _contiguous_pieces(tensor: Tensor) -> tuple[int, list[tuple[int, int]]]:
    """The bytes of each contiguous piece, and for each remaining dimension the count and distance (bytes) of pieces."""
    width, steps = tensor.element_size(), []
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    for step, size in sorted((stride * tensor.element_size(), size) for stride, size in dimensions if size > 1):
        if step == width:
            width *= size
        else:
            steps.append((size, step))
    return width, steps


def _piece_starts(steps: list[tuple[int, int]]) -> list[int]:
    return [sum(offsets) for offsets in product(*(range(0, count * step, step) for count, step in steps))]
