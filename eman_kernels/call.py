"""What differs from one update to the next, read from what users give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from .distributed import is_distributed
from .watch import is_plain

Rounding = Literal["nearest", "stochastic"]
Nonfinite = Literal["propagate", "skip"]


@dataclass(slots=True)
class Call:
    """What differs from one update to the next. Tensors lie on the teacher's device and are not waited for."""

    momenta: list[float] | Tensor  # one for each teacher; a tensor is of float32 or float64
    found_inf: Tensor | None = None  # float32: nothing is written when it is not 0
    seed: int = 0  # of stochastic rounding; below 2^32
    step: int | Tensor = 0  # likewise; a tensor is of int64
    skipped: Tensor | None = None  # int64: the number of skipped student elements is added to it
    counts: Sequence[Callable[[], object]] = ()  # called with the last write, by interrupts.at_once

    def is_by_value(self) -> bool:
        """Whether no tensor is in it."""
        numbers = type(self.momenta) is list and not isinstance(self.step, Tensor)
        return numbers and self.found_inf is None and self.skipped is None


@lru_cache  # bounded: a seed may be another in each step
def check_modes(rounding: str, seed: int, has_step: bool, nonfinite: str) -> None:
    """Raises ValueError for a rounding or a nonfinite mode that is none, or one that lacks its seed or step."""
    for name, value, known in (("rounding", rounding, Rounding), ("nonfinite", nonfinite, Nonfinite)):
        if value not in get_args(known):
            raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, get_args(known)))}")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must be in [0, 2^32), and is {seed}")
    if rounding == "stochastic" and not has_step:
        raise ValueError("rounding='stochastic' needs step=, the number of this update: each must draw its own bits")


def call_of(
    momenta: Sequence[float | Tensor],
    found_inf: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor | None = None,
    skipped: Tensor | None = None,
    counts: Sequence[Callable[[], object]] = (),
) -> Call:
    """The call, with what it was given checked as far as can be without waiting for a device.

    Raises TypeError or ValueError for a momentum that is none, or a tensor of another shape or dtype.
    """
    momenta = [as_momentum(momentum) for momentum in momenta]
    for momentum in momenta:
        if type(momentum) is not float:
            momenta = momenta[0] if len(momenta) == 1 else _stacked(momenta)
            break
    if found_inf is not None:
        found_inf = as_found_inf(found_inf)
    if step is None:
        step = 0
    elif isinstance(step, Tensor):
        step = _counter("step", step)
    if skipped is not None:
        skipped = _counter("skipped", skipped)
    return Call(momenta, found_inf, seed, step, skipped, counts)


def as_momentum(momentum: float | Tensor) -> float | Tensor:
    """A float in [0, 1], or the tensor that may hold one. Raises TypeError or ValueError for anything else."""
    if type(momentum) is float and 0.0 <= momentum <= 1.0:
        return momentum
    if isinstance(momentum, Tensor):
        if momentum.dim() or momentum.dtype not in (torch.float32, torch.float64):
            what = f"{momentum.dtype} of shape {tuple(momentum.shape)}"
            raise TypeError(f"a momentum in a tensor must be 0-d and of float32 or float64, and is {what}")
        momentum = _read("momentum", momentum)
        if momentum.device.type != "cpu":
            return momentum  # to look at it would be to wait for the device
    elif not isinstance(momentum, Real):
        raise TypeError(f"momentum must be a number in [0, 1] or a 0-d tensor, not a {type(momentum).__name__}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], and is {float(momentum)}")
    return momentum if isinstance(momentum, Tensor) else float(momentum)


def as_found_inf(found_inf: Tensor) -> Tensor:
    """0-d and of float32, not 0 where it was not. Raises TypeError or ValueError for what is no tensor of one element.

    GradScaler's own comes back as it is.
    """
    if not isinstance(found_inf, Tensor):
        raise TypeError(
            f"found_inf must be a tensor of one element, or None where nothing is to be skipped, and is a "
            f"{type(found_inf).__name__}; a GradScaler that is not enabled has none: leave found_inf away"
        )
    if found_inf.numel() != 1:
        raise ValueError(f"found_inf must be one number, and is of shape {tuple(found_inf.shape)}")
    found_inf = _read("found_inf", found_inf).detach().reshape(())
    # Not by a cast: a number may be too small for float32.
    return found_inf if found_inf.dtype == torch.float32 else (found_inf != 0).float()


def _read(name: str, tensor: Tensor) -> Tensor:
    """With its value in memory, where the kernels read it; a lazily negated tensor has another there.

    A DTensor, as the norm of FSDP2's gradients is, has it in each process, or the processes put it together.
    """
    if is_distributed(tensor):
        tensor = tensor.full_tensor()
    if not is_plain(tensor):
        raise TypeError(f"the {name} must be a torch.Tensor, whose memory the kernel reads, and is a {type(tensor)}")
    return tensor.resolve_conj().resolve_neg()


def _stacked(momenta: list[float | Tensor]) -> Tensor:
    """In one tensor where those lie that are tensors. A copy from the host would wait."""
    device = next(momentum.device for momentum in momenta if isinstance(momentum, Tensor))
    like = {"dtype": torch.float64, "device": device}
    return torch.stack([m.double() if isinstance(m, Tensor) else torch.full((), m, **like) for m in momenta])


def _counter(name: str, counter: Tensor) -> Tensor:
    if not isinstance(counter, Tensor) or counter.dim() or counter.dtype != torch.int64 or counter.is_neg():
        what = type(counter).__name__
        if isinstance(counter, Tensor):
            what = f"{counter.dtype} of shape {tuple(counter.shape)}" + ", lazily negated" * counter.is_neg()
        raise TypeError(f"{name} in a tensor must be 0-d and of int64, and is {what}")
    return _read(name, counter)
