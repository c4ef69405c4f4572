"""Momentum as a function of the step: k = 0 for the first update. Each is a callable that can be pickled.

The teacher's BatchNorm statistics begin at the student's, which begin at (0, 1): in a short run a constant high
momentum keeps them there for long, and the teacher is useless meanwhile. WarmUp is the cure.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """momentum at every step."""

    momentum: float

    def __post_init__(self) -> None:
        _check(self.momentum)

    def __call__(self, step: int) -> float:
        return self.momentum


@dataclass(frozen=True)
class Cosine:
    """BYOL's: from ``momentum`` at step 0 up to 1 at step ``steps`` and after.

    ``1 - (1 - momentum)(cos(pi k / steps) + 1) / 2``. Source: Grill et al., "Bootstrap your own latent", 2020.
    """

    momentum: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.momentum)
        _check_positive(steps=self.steps)

    def __call__(self, step: int) -> float:
        return 1 - (1 - self.momentum) * (math.cos(math.pi * min(step, self.steps) / self.steps) + 1) / 2


@dataclass(frozen=True)
class WarmUp:
    """``min(momentum, (1 + k) / (10 + k))``: 0.1 at first, 0.9 after 80 steps, 0.99 after 890."""

    momentum: float

    def __post_init__(self) -> None:
        _check(self.momentum)

    def __call__(self, step: int) -> float:
        return min(self.momentum, (1 + step) / (10 + step))


@dataclass(frozen=True)
class HalfLife:
    """What the student was ``half_life`` steps ago counts half: ``0.5 ** (1 / half_life)``.

    With ``batch_size`` (samples a step, over all processes), half_life is counted in samples, and stays right when the
    batch size changes.
    """

    half_life: float
    batch_size: int = 1

    def __post_init__(self) -> None:
        _check_positive(half_life=self.half_life, batch_size=self.batch_size)

    def __call__(self, step: int) -> float:
        return 0.5 ** (self.batch_size / self.half_life)


def _check(momentum: float) -> None:
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], and is {momentum}")


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be positive, and is {number}")
