"""The ground truth, in plain torch: what every other backend must equal bit for bit. It takes any pair there is."""

import torch
from torch import Tensor

NAME = "reference"
TAKES_TABLE = False


def unavailable(device_type: str) -> str | None:
    return None


def run(work, momentum: float | Tensor) -> None:
    weight = 1.0 - (momentum.double() if isinstance(momentum, Tensor) else momentum)
    for pair in work.pairs:
        update(pair.teacher, pair.student, pair.rule, weight)


@torch.no_grad()
def update(teacher: Tensor, student: Tensor, rule: str, weight: float | Tensor) -> None:
    """Update one teacher tensor in place, in float32 or wider, rounded once into its dtype. weight = 1 - momentum."""
    if rule == "copy":
        teacher.copy_(student)
        return
    wide = torch.promote_types(_at_least_float32(teacher), _at_least_float32(student))
    if isinstance(weight, Tensor):
        weight = weight.to(teacher.device, wide)
    teacher.copy_(torch.lerp(teacher.to(wide), student.to(teacher.device, wide), weight))


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    if tensor.is_complex():
        return torch.promote_types(tensor.dtype, torch.complex64)
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
