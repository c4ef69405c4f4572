"""The ground truth, in plain torch: what every other backend must equal bit for bit. It takes any pair there is."""

from functools import partial
from itertools import chain

import torch
from torch import Tensor

from ..interrupts import at_once

NAME = "reference"
TAKES_TABLE = False


def unavailable(device_type: str) -> str | None:
    return None


@torch.no_grad()
def run(work, call, tensors) -> None:
    momenta = call.momenta
    weights = 1.0 - momenta.double().reshape(-1) if isinstance(momenta, Tensor) else [1.0 - m for m in momenta]
    places = list(chain(*work.places.values()))
    for place in places:
        teacher = tensors[place.teacher]
        student = tensors[place.student].to(teacher.device)
        if place.rule == "copy":
            new = student.to(teacher.dtype)
        else:
            weight = weights[place.group]
            average = lerp(teacher, student, weight, heals=work.skip_nonfinite)
            if work.stochastic:
                new = rounded_at_random(average, teacher.dtype, place.first, call)
            else:
                new = average.to(teacher.dtype)
            # At momentum 1 nothing new: a NaN would lose its bits on the way.
            new = torch.where(weight_in(torch.float32, weight, teacher.device) == 0, teacher, new)
        if work.skip_nonfinite:
            # torch asks float8 for no such thing.
            finite = student.to(_at_least_float32(student)).isfinite()
            new = torch.where(finite, new, teacher)
            if place.group == 0 and call.skipped is not None:
                call.skipped += (~finite).sum() * (1 if call.found_inf is None else call.found_inf == 0)
        if call.found_inf is not None:
            new = torch.where(call.found_inf != 0, teacher, new)
        at_once(partial(teacher.copy_, new), *(call.counts if place is places[-1] else ()))
        if place.cast is not None:
            tensors[place.cast].copy_(teacher)


def swaps(work, tensors):
    for place in chain(*work.places.values()):
        teacher, student = tensors[place.teacher], tensors[place.student]
        yield partial(teacher.copy_, student), partial(student.copy_, teacher.clone())


def lerp(teacher: Tensor, student: Tensor, weight: float | Tensor, heals: bool = False) -> Tensor:
    """The average before it is rounded, in float32 or wider. weight = 1 - momentum. heals: the student's number takes
    the place of a teacher's that is not finite."""
    wide = wide_of(teacher, student)
    t, s, w = teacher.to(wide), student.to(wide), weight_in(wide, weight, teacher.device)
    if heals:
        t = torch.where(t.isfinite(), t, s)
    average = torch.lerp(t, s, w)
    # Of equal infinities torch.lerp makes NaNs, and at weight 1 of a teacher that is not finite.
    return torch.where((t == s) | (w == 1), s, average)


def wide_of(teacher: Tensor, student: Tensor) -> torch.dtype:
    """The dtype of the arithmetic."""
    return torch.promote_types(_at_least_float32(teacher), _at_least_float32(student))


def weight_in(wide: torch.dtype, weight: float | Tensor, device: torch.device) -> Tensor:
    """Rounded as the arithmetic takes it. A number is written there by the device itself, for which nobody waits."""
    if isinstance(weight, Tensor):
        return weight.to(device, wide)
    return torch.full((), weight, dtype=wide, device=device)


def rounded_at_random(average: Tensor, dtype: torch.dtype, first: int, call) -> Tensor:
    """In the teacher's dtype; if that is a half type, up or down, so that its mean is the average itself. first: the
    number of the teacher's first element.

    The upper neighbour is taken if what lies above the lower one, in 2^16ths of their distance, and the 16 bits that
    Philox draws for the element's number make 2^16 or more.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return average.to(dtype)
    average = average.float()
    numbers = torch.arange(first, first + average.numel(), device=average.device)
    words = philox(numbers // 8, call.seed, call.step)
    drawn = (words.gather(0, (numbers % 8 // 2)[None])[0] >> numbers % 2 * 16 & 0xFFFF).view_as(average)
    # Binary digits, and the exponent of the smallest normal number.
    digits, smallest = (8, -126) if dtype == torch.bfloat16 else (11, -14)
    magnitude = average.abs().nan_to_num(posinf=0.0).double()
    distance = torch.exp2(magnitude.frexp().exponent.clamp(min=smallest + 1).double() - digits)
    if dtype == torch.float16:
        # Above its subnormals float32 has but 13 digits more.
        drawn = torch.where(magnitude < 2.0**smallest, drawn, drawn // 8 * 8)
    steps = torch.floor((torch.floor(magnitude / distance * 2**16) + drawn) / 2**16)
    rounded = (steps * distance).copysign(average.double()).to(dtype)
    return torch.where(average.isfinite(), rounded, average.to(dtype))


def philox(group: Tensor, seed: int, step: int | Tensor) -> Tensor:
    """Philox 4x32-10 of the counter (group, 0) and the key (seed, step): int64 [4, n], each below 2^32.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = group & low, group >> 32, torch.zeros_like(group), torch.zeros_like(group)
    k0, k1 = seed, step & low
    for _ in range(10):
        # A product's upper half is right although int64 has a sign: the shift's sign bits are cut off.
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3])


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    if tensor.is_complex():
        return torch.promote_types(tensor.dtype, torch.complex64)
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
