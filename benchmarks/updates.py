"""The compared methods, except the libraries in peers.py: handwritten loops, and eman_kernels.

A method creates a `Following` from a teacher, a student and a momentum. It may use the teacher itself as its average.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from models import tensors_of
from torch import Tensor, nn

import eman_kernels
from eman_kernels import EMANTeacher, ema_update_, eman_update_, plan_for
from eman_kernels import __main__ as bench
from eman_kernels.__main__ import Update, split_tensors
from eman_kernels.plan.plan import Plan

LOOP, LIMIT, COPY = "published EMAN loop", "limit: one flat lerp", "flat copy"
OURS = "eman_kernels"  # prefix of the names of all our methods
GRAPH = ", in a CUDA graph"  # suffix of the names of replayed methods
KINDS = ("parameters", "float buffers", "counters")


class Following(NamedTuple):
    update: Update
    teacher: Mapping[str, Tensor]  # the teacher's tensors, by the student's names
    plan: Callable[[], Plan | None] = lambda: None  # eman_kernels only
    dispatched: bool = True  # whether torch dispatches its operations, so they can be counted


class Method(NamedTuple):
    make: Callable[[nn.Module, nn.Module, float], Following]
    claims: tuple[str, ...] = KINDS  # what it must get right to be timed
    exact: bool = False  # whether it must give the bits of torch.lerp


def published_loop(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    return Following(bench.published_loop(teacher, student, momentum), tensors_of(teacher))


def lerp_loop(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    averaged, followed, copied, source = split_tensors(teacher, student)

    def update() -> None:
        for t, s in zip(averaged, followed, strict=True):
            t.lerp_(s.to(t.dtype), 1.0 - momentum)
        for t, s in zip(copied, source, strict=True):
            t.copy_(s)

    return Following(update, tensors_of(teacher))


def foreach(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    return Following(bench.foreach_lerp(teacher, student, momentum), tensors_of(teacher))


def compiled_lerp_loop(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    averaged, followed, copied, source = split_tensors(teacher, student)
    # Each model recompiles the function, and torch gives up after eight recompilations.
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


def ours_with_new_views(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    """Pass new tensor objects (views) in each call, as torch's AveragedModel does."""
    averaged, followed, copied, source = split_tensors(teacher, student)
    mine, theirs = averaged + copied, followed + source

    def update() -> None:
        ema_update_([t.detach() for t in mine], [t.detach() for t in theirs], momentum)

    return Following(update, tensors_of(teacher), dispatched=False)


def ours_stochastic(teacher: nn.Module, student: nn.Module, momentum: float) -> Following:
    mean = EMANTeacher(teacher, momentum, rounding="stochastic")
    return Following(lambda: mean.update(student), tensors_of(mean.module), lambda: plan_for(mean.module, student))


def handwritten_methods() -> dict[str, Method | str]:
    return {
        LOOP: Method(published_loop),
        "lerp loop": Method(lerp_loop, exact=True),
        "torch.compile of the lerp loop": Method(compiled_lerp_loop),
        "foreach, lists kept": Method(foreach, exact=True),
    }


def our_methods(device: torch.device) -> dict[str, Method | str]:
    """Name -> method, or the reason why it is not available."""
    found: dict[str, Method | str] = {}
    for name, reason in eman_kernels.available_backends().items():
        if name != "reference" and not (name in ("cpu", "cuda") and name != device.type):
            found[f"eman_kernels {name}"] = f"not available: {reason}" if reason else Method(ours(name), exact=True)
    found["eman_kernels, fresh views"] = Method(ours_with_new_views, exact=True)
    found["eman_kernels, stochastic"] = Method(ours_stochastic)
    return found
