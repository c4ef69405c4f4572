"""The ground truth, in plain torch operations: every other backend must give the same bits. It supports any pair of
tensors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from .interface import WITHOUT_FLOAT64, Arguments, Work, widest_float

NAME = "reference"
TAKES_TABLE = False


def unavailable(device_type: str) -> str | None:
    return None


@torch.no_grad()
def run(work: Work, arguments: Arguments, tensors: Sequence[Tensor]) -> None:
    momenta = arguments.momenta
    if isinstance(momenta, Tensor):
        weights = 1.0 - momenta.to(widest_float(momenta.device)).reshape(-1)
    else:
        weights = [1.0 - momentum for momentum in momenta]
    for place in chain(*work.places.values()):
        teacher = tensors[place.teacher]
        student = tensors[place.student].to(teacher.device)
        if place.rule == "copy":
            new = student.to(teacher.dtype)
        else:
            weight = weights[place.group]
            average = lerp(teacher, student, weight, replace_nonfinite=work.skip_nonfinite)
            if work.stochastic:
                new = round_stochastically(average, teacher.dtype, place.first, arguments)
            else:
                new = average.to(teacher.dtype)
            # At momentum 1 keep the bits of the teacher: the conversions above would change a NaN's.
            new = torch.where(convert_weight(weight, torch.float32, teacher.device) == 0, teacher, new)
        if work.skip_nonfinite:
            # Converted, because torch has no isfinite for float8.
            finite = student.to(_at_least_float32(student)).isfinite()
            new = torch.where(finite, new, teacher)
            if place.group == 0 and arguments.skipped is not None:
                arguments.skipped += (~finite).sum() * (1 if arguments.found_inf is None else arguments.found_inf == 0)
        if arguments.found_inf is not None:
            new = torch.where(arguments.found_inf != 0, teacher, new)
        teacher.copy_(new)
        if place.cast is not None:
            tensors[place.cast].copy_(teacher)


def swaps(work: Work, tensors: Sequence[Tensor]) -> Iterator[tuple[Callable[[], object], ...]]:
    for place in chain(*work.places.values()):
        teacher, student = tensors[place.teacher], tensors[place.student]
        yield partial(teacher.copy_, student), partial(student.copy_, teacher.clone())


def lerp(teacher: Tensor, student: Tensor, weight: float | Tensor, replace_nonfinite: bool = False) -> Tensor:
    """The average before rounding, in float32 or wider. weight = 1 - momentum. replace_nonfinite: NaNs and infinities
    of the teacher are replaced by the student's values first."""
    wide = promote_dtypes(teacher, student)
    t, s, w = teacher.to(wide), student.to(wide), convert_weight(weight, wide, teacher.device)
    if replace_nonfinite:
        t = torch.where(t.isfinite(), t, s)
    average = torch.lerp(t, s, w)
    # torch.lerp gives NaN for equal infinities, and at weight 1 for a teacher that is not finite.
    return torch.where((t == s) | (w == 1), s, average)


def promote_dtypes(teacher: Tensor, student: Tensor) -> torch.dtype:
    """The dtype in which the average is computed."""
    return torch.promote_types(_at_least_float32(teacher), _at_least_float32(student))


def convert_weight(weight: float | Tensor, wide: torch.dtype, device: torch.device) -> Tensor:
    """The weight as a tensor of this dtype on this device. torch.full creates it there without a device
    synchronization."""
    if isinstance(weight, Tensor):
        return weight.to(device, wide)
    return torch.full((), weight, dtype=wide, device=device)


def round_stochastically(average: Tensor, dtype: torch.dtype, first: int, arguments: Arguments) -> Tensor:
    """The average in the teacher's dtype. For half types it is rounded up or down at random, so that the expected value
    is the average itself. first: the number of the teacher's first element.

    Let lower and upper be the two neighbors of the average, and f in [0, 1) its position between them, cut to 16 binary
    digits. Philox draws 16 bits r per element; the result is upper if f + r / 2^16 >= 1, which has probability f.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return average.to(dtype)
    if average.device.type in WITHOUT_FLOAT64:
        on_host = replace(arguments, step=int(arguments.step))
        return round_stochastically(average.cpu(), dtype, first, on_host).to(average.device)
    average = average.float()
    # Element n gets bits 16 * (n % 2) and up of word n % 8 // 2 of the block n // 8: eight elements per Philox call.
    numbers = torch.arange(first, first + average.numel(), device=average.device)
    words = philox(numbers // 8, arguments.seed, arguments.step)
    drawn = (words.gather(0, (numbers % 8 // 2)[None])[0] >> numbers % 2 * 16 & 0xFFFF).view_as(average)
    # The significant bits of the dtype, and the exponent of its smallest normal number.
    digits, smallest = (8, -126) if dtype == torch.bfloat16 else (11, -14)
    magnitude = average.abs().nan_to_num(posinf=0.0).double()
    distance = torch.exp2(magnitude.frexp().exponent.clamp(min=smallest + 1).double() - digits)
    if dtype == torch.float16:
        # A float32 has only 13 bits more than a normal float16, so only 13 of the 16 bits drawn are used.
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
        # The products overflow int64, but their upper halves are right: the mask removes the copies of the sign bit.
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32 & low) ^ c1 ^ k0, b & low, (a >> 32 & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3])


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    if tensor.is_complex():
        return torch.promote_types(tensor.dtype, torch.complex64)
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
