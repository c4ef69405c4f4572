"""What is compared, but for the libraries in peers.py: the loops one writes by hand, and ours.

A method makes a `Following` of a teacher, a student and a momentum. It may take the teacher for its own.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from models import tensors_of
from torch import Tensor, nn

import eman_kernels
from eman_kernels import EMANTeacher, ema_update_, eman_update_, plan_for
from eman_kernels.plan import Plan

LOOP, LIMIT, COPY = "published EMAN loop", "limit: one flat lerp", "flat copy"
OURS = "eman_kernels"  # with which the names of all ours begin
GRAPH = ", in a CUDA graph"  # with which the names of replayed methods end
KINDS = ("parameters", "float buffers", "counters")

Update = Callable[[], object]


class Following(NamedTuple):
    update: Update
    teacher: Mapping[str, Tensor]  # its tensors, by the student's names
    plan: Callable[[], Plan | None] = lambda: None  # ours only
    dispatched: bool = True  # whether torch's dispatcher sees its operations, so that they can be counted


class Method(NamedTuple):
    make: Callable[[nn.Module, nn.Module, float], Following]
    claims: tuple[str, ...] = KINDS  # what it is to get right, or else it gets no figure
    exact: bool = False  # the bits of torch.lerp


def published_loop(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    def update() -> None:
        followed = student.state_dict()
        for name, tensor in teacher.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(tensor * momentum + followed[name] * (1.0 - momentum))
            else:
                tensor.copy_(followed[name])

    return Following(update, tensors_of(teacher))


def split(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], ...]:
    """Averaged and followed, copied and their source."""
    mine, theirs = teacher.state_dict(), student.state_dict()
    averaged = [name for name, tensor in mine.items() if tensor.is_floating_point()]
    copied = [name for name, tensor in mine.items() if not tensor.is_floating_point()]
    return tuple([which[name] for name in names] for names in (averaged, copied) for which in (mine, theirs))


def lerp_loop(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    averaged, followed, copied, source = split(teacher, student)

    def update() -> None:
        for t, s in zip(averaged, followed, strict=True):
            t.lerp_(s.to(t.dtype), 1.0 - momentum)
        for t, s in zip(copied, source, strict=True):
            t.copy_(s)

    return Following(update, tensors_of(teacher))


def foreach(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    averaged, followed, copied, source = split(teacher, student)

    def update() -> None:
        torch._foreach_lerp_(averaged, followed, 1.0 - momentum)
        if copied:
            torch._foreach_copy_(copied, source)

    return Following(update, tensors_of(teacher))


def compiled_lerp_loop(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    averaged, followed, copied, source = split(teacher, student)
    # Each model's lists compile anew, and torch gives a function up after eight times.
    torch._dynamo.reset()

    @torch.compile
    def average(averaged: list[Tensor], followed: list[Tensor]) -> None:
        for t, s in zip(averaged, followed, strict=True):
            t.lerp_(s.to(t.dtype), 1.0 - momentum)

    def update() -> None:
        average(averaged, followed)
        if copied:
            torch._foreach_copy_(copied, source)

    return Following(update, tensors_of(teacher), dispatched=False)


def ours(backend: str) -> Callable[[nn.Module, nn.Module, float], Following]:
    def make(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
        return Following(
            lambda: eman_update_(teacher, student, momentum, backend=backend),
            tensors_of(teacher),
            lambda: plan_for(teacher, student),
        )

    return make


def ours_of_views(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    """Lists whose tensors are other objects in each call, as torch's AveragedModel hands them over."""
    averaged, followed, copied, source = split(teacher, student)
    mine, theirs = averaged + copied, followed + source

    def update() -> None:
        ema_update_([t.detach() for t in mine], [t.detach() for t in theirs], momentum)

    return Following(update, tensors_of(teacher), dispatched=False)


def ours_stochastic(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    keeper = EMANTeacher(teacher, momentum, rounding="stochastic")
    return Following(
        lambda: keeper.update(student), tensors_of(keeper.module), lambda: plan_for(keeper.module, student)
    )


def by_hand() -> dict[str, Method | str]:
    return {
        LOOP: Method(published_loop),
        "lerp loop": Method(lerp_loop, exact=True),
        "torch.compile of the lerp loop": Method(compiled_lerp_loop),
        "foreach, lists kept": Method(foreach, exact=True),
    }


def by_us(device: torch.device) -> dict[str, Method | str]:
    """Name -> method, or why this machine has none."""
    found: dict[str, Method | str] = {}
    for name, reason in eman_kernels.available_backends().items():
        if name != "reference" and not (name in ("cpu", "cuda") and name != device.type):
            found[f"eman_kernels {name}"] = f"not available: {reason}" if reason else Method(ours(name), exact=True)
    found["eman_kernels, fresh views"] = Method(ours_of_views, exact=True)
    found["eman_kernels, stochastic"] = Method(ours_stochastic)
    return found
