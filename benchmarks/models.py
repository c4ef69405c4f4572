"""The measured networks; each stresses a different part of an update."""

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

DTYPES = {  # teacher, student
    "float32": (torch.float32, torch.float32),
    "mixed": (torch.float32, torch.bfloat16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
}


class Block(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(outside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False) if inside != outside else None

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.leaky_relu(self.norm1(x), 0.1)
        kept = x if self.shortcut is None else self.shortcut(y)
        return kept + self.conv2(nn.functional.leaky_relu(self.norm2(self.conv1(y)), 0.1))


def wide_resnet28_2() -> nn.Module:
    """FixMatch's network for 32 x 32 images and 10 classes: small, so the overhead around the kernel is visible."""
    blocks: list[nn.Module] = []
    width = 16
    for wider, stride in ((32, 1), (64, 2), (128, 2)):
        for k in range(4):
            blocks.append(Block(width, wider, stride if k == 0 else 1))
            width = wider
    tail = [nn.BatchNorm2d(width), nn.LeakyReLU(0.1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), *blocks, *tail)


def odd_sizes() -> nn.Module:
    """Layers of prime width: no tensor size is a multiple of the vector width."""
    primes = (2003, 1999, 997, 1009, 1013, 499, 7)
    layers = [(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in pairwise(primes)]
    return nn.Sequential(*(layer for group in layers for layer in group))


def make_torchvision_model(name: str) -> nn.Module:
    import torchvision  # here, because the other networks do not need it

    return getattr(torchvision.models, name)()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": partial(make_torchvision_model, "resnet50"),
    "mobilenet_v3_large": partial(make_torchvision_model, "mobilenet_v3_large"),  # many small tensors
    "mobilenet_v2": partial(make_torchvision_model, "mobilenet_v2"),
    "wide_resnet28_2": wide_resnet28_2,
    "vit_b_16": partial(make_torchvision_model, "vit_b_16"),  # few large tensors, and no buffers
    "odd_sizes": odd_sizes,
}


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names, including non-persistent ones."""
    named = [module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for some in named for name, tensor in some}


def student_of(teacher: nn.Module) -> nn.Module:
    """A copy of the teacher with changed weights, statistics and counters, as after some training."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    moved = {tensor.data_ptr(): tensor for tensor in tensors_of(student).values()}  # each tied tensor once
    for tensor in moved.values():
        tensor.add_(torch.randn_like(tensor) * 0.05 if tensor.is_floating_point() else 900)
    return student


def pair(name: str, dtype: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """A teacher and a student of this name, from MODELS or from torchvision."""
    torch.manual_seed(0)
    make = MODELS.get(name) or partial(make_torchvision_model, name)
    teacher = make().requires_grad_(False)
    student = student_of(teacher)
    teacher_dtype, student_dtype = DTYPES[dtype]
    return teacher.to(device, teacher_dtype), student.to(device, student_dtype)


class Slices(nn.Module):
    """Parameters of equal size, contiguous in `flat`, so the limit can process the same memory as one vector."""

    def __init__(self, elements: int, tensors: int, device: torch.device) -> None:
        super().__init__()
        self.flat = [torch.randn(elements, device=device)]  # in a list, so that the module does not register it
        pieces = self.flat[0].chunk(tensors)
        self.pieces = nn.ParameterList(nn.Parameter(piece, requires_grad=False) for piece in pieces)
