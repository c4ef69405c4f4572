"""Momentum as a function of the step: k = 0 for the first update. Each is a callable that can be pickled.

The step is a number, or a 0-d float64 tensor, wherever it lies: the momentum is then one as well, and nothing waits for
the device.

The teacher's BatchNorm statistics begin at the student's, which begin at (0, 1): in a short run a constant high
momentum keeps them there for long, and the teacher is useless meanwhile. WarmUp is the cure.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Constant:
    """momentum at every step.

    >>> Constant(0.99)(1000)
    0.99
    """

    momentum: float

    def __post_init__(self) -> None:
        _check(self.momentum)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return self.momentum


@dataclass(frozen=True)
class Cosine:
    """BYOL's: from ``momentum`` at step 0 up to 1 at step ``steps`` and after.

    ``1 - (1 - momentum)(cos(pi k / steps) + 1) / 2``. Source: Grill et al., "Bootstrap your own latent", 2020.

    >>> byol = Cosine(0.996, steps=100)
    >>> [round(byol(step), 6) for step in (0, 50, 100)]
    [0.996, 0.998, 1.0]
    """

    momentum: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.momentum)
        _check_positive(steps=self.steps)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return 1 - (1 - self.momentum) * (_cos(math.pi * _at_most(step, self.steps) / self.steps) + 1) / 2


@dataclass(frozen=True)
class WarmUp:
    """``min(momentum, (1 + k) / (10 + k))``: 0.1 at first, 0.9 after 80 steps, 0.99 after 890.

    >>> [WarmUp(0.99)(step) for step in (0, 80, 10_000)]
    [0.1, 0.9, 0.99]
    """

    momentum: float

    def __post_init__(self) -> None:
        _check(self.momentum)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return _at_most((1 + step) / (10 + step), self.momentum)


@dataclass(frozen=True)
class HalfLife:
    """What the student was ``half_life`` steps ago counts half: ``0.5 ** (1 / half_life)``.

    With ``batch_size`` (samples a step, over all processes), half_life is counted in samples, and stays right when the
    batch size changes.

    >>> round(HalfLife(1000)(0) ** 1000, 6)
    0.5
    """

    half_life: float
    batch_size: int = 1

    def __post_init__(self) -> None:
        _check_positive(half_life=self.half_life, batch_size=self.batch_size)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return 0.5 ** (self.batch_size / self.half_life)


@dataclass(frozen=True)
class PowerFunction:
    """An average whose length grows with the training: ``(1 - 1 / (k + 1)) ** (gamma + 1)``.

    The student of step k counts as k ** gamma. ``sigma_rel``, in (0, 0.2886), is their standard deviation
    over the steps, as a share of the steps so far: 0.05 and 0.10 are usual, and of averages of two lengths
    (EMANTeachers) any between can be put together after the training. Source: Karras et al., "Analyzing and improving
    the training dynamics of diffusion models", 2024.

    >>> schedule = PowerFunction(0.05)
    >>> round(schedule.gamma, 2), round(schedule(1000), 4)
    (16.97, 0.9822)
    """

    sigma_rel: float
    gamma: float = field(init=False, repr=False, compare=False)  # the exponent that has this spread

    def __post_init__(self) -> None:
        if not 0 < self.sigma_rel < _spread(0.0):
            raise ValueError(f"sigma_rel must be in (0, {_spread(0.0):.4f}), and is {self.sigma_rel}")
        low, high = 0.0, 1 / self.sigma_rel  # the spread falls with gamma, and stays below 1 / gamma
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if _spread(middle) > self.sigma_rel else (low, middle)
        object.__setattr__(self, "gamma", high)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return (1 - 1 / (step + 1)) ** (self.gamma + 1)


@dataclass(frozen=True)
class InverseGamma:
    """The warm-up of timm's ModelEmaV3, diffusers' EMAModel and ema-pytorch.

    ``1 - (1 + s / inv_gamma) ** -power`` within [``min_decay``, ``momentum``], where ``s = k - update_after_step``; and
    0 up to s = 0, so that the first ``update_after_step + 1`` updates copy the student.

    With power 2/3 it is 0.999 after 31,600 updates, and 0.9999 after a million. Source: Crowson's notes in timm.

    >>> schedule = InverseGamma(0.9999)
    >>> [round(schedule(step), 4) for step in (0, 1, 31_600, 10_000_000)]
    [0.0, 0.37, 0.999, 0.9999]
    """

    momentum: float = 0.9999
    inv_gamma: float = 1.0
    power: float = 2 / 3
    min_decay: float = 0.0
    update_after_step: int = 0

    def __post_init__(self) -> None:
        _check(self.momentum)
        _check_positive(inv_gamma=self.inv_gamma, power=self.power)
        if not 0 <= self.min_decay <= self.momentum:
            raise ValueError(f"min_decay must be in [0, momentum], and is {self.min_decay}")

    def __call__(self, step: int | Tensor) -> float | Tensor:
        since = _at_least(step - self.update_after_step, 0)
        momentum = 1 - (1 + since / self.inv_gamma) ** -self.power
        return _at_least(_at_most(momentum, self.momentum), self.min_decay) * (since > 0)


@dataclass(frozen=True)
class Average:
    """The mean of all students so far, each counting alike (SWA): ``1 - 1 / (k + 1)``; the first update copies.

    Source: Izmailov et al., "Averaging weights leads to wider optima and better generalization", 2018.

    >>> [Average()(step) for step in (0, 1, 3)]
    [0.0, 0.5, 0.75]
    """

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return 1 - 1 / (step + 1)


@dataclass(frozen=True)
class CopyFirst:
    """0 for the first ``updates`` updates, which copy the student, and then ``momentum``: a number or a schedule.

    For a teacher made before what makes the processes' students equal: DDP gives all of them the first one's weights,
    and a teacher that began at others is a different one in each process for long.

    >>> [CopyFirst(0.99)(step) for step in (0, 1)]
    [0.0, 0.99]
    """

    momentum: float | Callable[[int | Tensor], float | Tensor]
    updates: int = 1

    def __post_init__(self) -> None:
        if not callable(self.momentum):
            _check(self.momentum)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        momentum = self.momentum(step) if callable(self.momentum) else self.momentum
        copied = step < self.updates
        return momentum * (1 - copied.double()) if isinstance(copied, Tensor) else momentum * (not copied)


def _spread(gamma: float) -> float:
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def _at_most(number: float | Tensor, most: float) -> float | Tensor:
    return number.clamp(max=most) if isinstance(number, Tensor) else min(number, most)


def _at_least(number: float | Tensor, least: float) -> float | Tensor:
    return number.clamp(min=least) if isinstance(number, Tensor) else max(number, least)


def _cos(angle: float | Tensor) -> float | Tensor:
    return torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle)


def _check(momentum: float) -> None:
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], and is {momentum}")


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be positive, and is {number}")
