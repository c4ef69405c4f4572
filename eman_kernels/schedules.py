"""Momentum schedules: momentum as a function of the step k, where k = 0 is the first update.

A schedule is a callable that can be pickled. The step is a number, or a 0-d float64 tensor on any device. For a tensor
the momentum is a number or a 0-d float64 tensor on the same device, computed without a device synchronization.
Constructors raise ValueError if an argument is out of range.

The teacher's BatchNorm statistics start at the student's, which start at mean 0 and variance 1. In a short run a
constant high momentum keeps them near those values for a long time, and the teacher is useless until then. Use WarmUp
to avoid this.

Many libraries count the current update, so their first update has the number 1: use Offset for those.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Constant:
    """The same momentum at every step.

    Args:
        momentum: a number in [0, 1].

    >>> Constant(0.99)(1000)
    0.99
    """

    momentum: float

    def __post_init__(self) -> None:
        _check_momentum(self.momentum)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return self.momentum


@dataclass(frozen=True)
class Cosine:
    """The schedule of BYOL: rises from ``momentum`` at step 0 to 1 at step ``steps``, and stays at 1.

    ``1 - (1 - momentum)(cos(pi k / steps) + 1) / 2``. Source: Grill et al., "Bootstrap your own latent", 2020.

    Args:
        momentum: the momentum at step 0, in [0, 1].
        steps: the number of updates in the whole training, above 0.

    >>> byol = Cosine(0.996, steps=100)
    >>> [round(byol(step), 6) for step in (0, 50, 100)]
    [0.996, 0.998, 1.0]
    """

    momentum: float
    steps: int

    def __post_init__(self) -> None:
        _check_momentum(self.momentum)
        _check_positive(steps=self.steps)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return 1 - (1 - self.momentum) * (_cos(math.pi * _clamp_max(step, self.steps) / self.steps) + 1) / 2


@dataclass(frozen=True)
class Linear:
    """Moves in a straight line from ``start`` at step 0 to ``end`` at step ``steps``, and stays there.

    ``start + (end - start) k / steps``. Sources: Assran et al., "Self-supervised learning from images with a
    joint-embedding predictive architecture" (I-JEPA), 2023; Baevski et al., "data2vec", 2022, whose code counts the
    current update: ``Offset(Linear(start, end, steps), 1)``.

    Args:
        start: the momentum at step 0, in [0, 1].
        end: the momentum from step ``steps`` on, in [0, 1].
        steps: the number of updates until then, above 0.

    >>> schedule = Linear(0.996, 1.0, steps=100)
    >>> [round(schedule(step), 6) for step in (0, 50, 100, 200)]
    [0.996, 0.998, 1.0, 1.0]
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        _check_momentum(self.start)
        _check_momentum(self.end)
        _check_positive(steps=self.steps)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return self.end - (self.end - self.start) * (1 - _clamp_max(step, self.steps) / self.steps)


@dataclass(frozen=True)
class WarmUp:
    """``min(momentum, (1 + k) / (10 + k))``: 0.1 at step 0, 0.9 at step 80, 0.99 at step 890.

    torch_ema and LitEma count the current update: ``Offset(WarmUp(momentum), 1)``. diffusers' EMAModel without
    ``use_ema_warmup`` copies the student first: ``CopyFirst(WarmUp(momentum))``.

    Args:
        momentum: the final momentum, in [0, 1].

    >>> [WarmUp(0.99)(step) for step in (0, 80, 10_000)]
    [0.1, 0.9, 0.99]
    """

    momentum: float

    def __post_init__(self) -> None:
        _check_momentum(self.momentum)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return _clamp_max((1 + step) / (10 + step), self.momentum)


@dataclass(frozen=True)
class ExponentialWarmUp:
    """The schedule of YOLO's ModelEMA (ultralytics, yolov5, YOLOX): ``momentum (1 - exp(-(k + 1) / tau))``.

    Their counter includes the current update, so at step 0 it is about ``momentum / tau``. Source: yolov5's
    ``utils/torch_utils.py``.

    Args:
        momentum: the momentum that it approaches, in [0, 1]; default 0.9999.
        tau: the time constant in updates, above 0: 63 % of ``momentum`` after ``tau`` updates, 99.99 % after 9.2 times
            as many. Default 2000.

    >>> yolo = ExponentialWarmUp(0.9999, tau=2000)
    >>> [round(yolo(step), 4) for step in (0, 1999, 19_999)]
    [0.0005, 0.6321, 0.9999]
    """

    momentum: float = 0.9999
    tau: float = 2000

    def __post_init__(self) -> None:
        _check_momentum(self.momentum)
        _check_positive(tau=self.tau)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return self.momentum * (1 - math.e ** (-(step + 1) / self.tau))


@dataclass(frozen=True)
class HalfLife:
    """A constant momentum given as a half-life: the weight of a student halves every ``half_life`` steps.

    ``0.5 ** (batch_size / half_life)``.

    Args:
        half_life: in steps; in samples if ``batch_size`` is given. Must be above 0.
        batch_size: samples per step over all processes, above 0; default 1. A half-life in samples remains valid when
            the batch size changes.

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
    """An average whose length grows in proportion to the training: ``(1 - 1 / (k + 1)) ** (gamma + 1)``.

    The student of step k has a weight proportional to k ** gamma. Stored averages of two lengths can be combined after
    the training into an average of any length: see ``Snapshots``. Source: Karras et al., "Analyzing and improving the
    training dynamics of diffusion models", 2024.

    Args:
        sigma_rel: the length of the average, in (0, 0.2886): the standard deviation of the weights over the steps, as
            a fraction of the steps so far. Usual values are 0.05 and 0.10.

    Attributes:
        gamma: the exponent that gives this sigma_rel.

    >>> schedule = PowerFunction(0.05)
    >>> round(schedule.gamma, 2), round(schedule(1000), 4)
    (16.97, 0.9822)
    """

    sigma_rel: float
    gamma: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.sigma_rel < _relative_deviation(0.0):
            raise ValueError(f"sigma_rel must be in (0, {_relative_deviation(0.0):.4f}), got {self.sigma_rel}")
        # Bisection: the deviation decreases with gamma and is below 1 / gamma.
        low, high = 0.0, 1 / self.sigma_rel
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if _relative_deviation(middle) > self.sigma_rel else (low, middle)
        object.__setattr__(self, "gamma", high)

    @classmethod
    def from_gamma(cls, gamma: float) -> "PowerFunction":
        """The schedule with this exponent, above 0.

        >>> round(PowerFunction.from_gamma(16.97).sigma_rel, 4)
        0.05
        """
        _check_positive(gamma=gamma)
        return cls(_relative_deviation(gamma))

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return (1 - 1 / (step + 1)) ** (self.gamma + 1)


@dataclass(frozen=True)
class InverseGamma:
    """The warm-up of timm's ModelEmaV3, diffusers' EMAModel and ema-pytorch.

    With ``s = k - update_after_step``: ``1 - (1 + s / inv_gamma) ** -power``, clamped to [``min_decay``, ``momentum``].
    While s <= 0 it is 0, so the first ``update_after_step + 1`` updates copy the student.

    With power 2/3 it reaches 0.999 after 31,600 updates and 0.9999 after a million. Source: Crowson's notes in timm.

    Args:
        momentum: the largest momentum, in [0, 1]; default 0.9999.
        inv_gamma: the scale of s in steps, above 0; default 1.0.
        power: above 0; default 2/3.
        min_decay: the smallest momentum once s > 0, in [0, momentum]; default 0.0.
        update_after_step: the number of steps before the warm-up; default 0.

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
        _check_momentum(self.momentum)
        _check_positive(inv_gamma=self.inv_gamma, power=self.power)
        if not 0 <= self.min_decay <= self.momentum:
            raise ValueError(f"min_decay must be in [0, momentum], got {self.min_decay}")

    def __call__(self, step: int | Tensor) -> float | Tensor:
        since = _clamp_min(step - self.update_after_step, 0)
        momentum = 1 - (1 + since / self.inv_gamma) ** -self.power
        return _clamp_min(_clamp_max(momentum, self.momentum), self.min_decay) * (since > 0)


@dataclass(frozen=True)
class Average:
    """The unweighted mean of all students so far: ``min(momentum, 1 - 1 / (k + 1))``. The first update copies the
    student.

    Sources: Izmailov et al., "Averaging weights leads to wider optima and better generalization" (SWA), 2018; with a
    largest momentum Tarvainen and Valpola, "Mean teachers are better role models", 2017, whose code counts the current
    update: ``Offset(Average(momentum), 1)``.

    Args:
        momentum: the largest momentum, in [0, 1]; default 1.0. Below 1 the mean becomes a moving average after
            ``1 / (1 - momentum)`` updates.

    >>> [Average()(step) for step in (0, 1, 3)]
    [0.0, 0.5, 0.75]
    >>> Average(0.99)(10_000)
    0.99
    """

    momentum: float = 1.0

    def __post_init__(self) -> None:
        _check_momentum(self.momentum)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return _clamp_max(1 - 1 / (step + 1), self.momentum)


@dataclass(frozen=True)
class CopyFirst:
    """Momentum 0 for the first ``updates`` updates, which copy the student, and then ``momentum``.

    Use it for a teacher that is created before DDP. DDP broadcasts the first process's weights to the students of all
    processes; teachers created from other weights would differ between processes for a long time.

    Args:
        momentum: a number in [0, 1], or a schedule, which is called with the same step.
        updates: the number of updates that copy; default 1.

    >>> [CopyFirst(0.99)(step) for step in (0, 1)]
    [0.0, 0.99]
    """

    momentum: float | Callable[[int | Tensor], float | Tensor]
    updates: int = 1

    def __post_init__(self) -> None:
        if not callable(self.momentum):
            _check_momentum(self.momentum)

    def __call__(self, step: int | Tensor) -> float | Tensor:
        momentum = self.momentum(step) if callable(self.momentum) else self.momentum
        copied = step < self.updates
        return momentum * (1 - copied.double()) if isinstance(copied, Tensor) else momentum * (not copied)


@dataclass(frozen=True)
class Offset:
    """Another schedule that starts at a later step: ``schedule(k + steps)``.

    ``steps=1`` is for the rules of libraries that count the current update: torch_ema, LitEma, mean-teacher, data2vec.

    Args:
        schedule: it is called with the later step.
        steps: the step that the first update gets, at least 0.

    >>> torch_ema = Offset(WarmUp(0.999), 1)
    >>> torch_ema(0) == WarmUp(0.999)(1) == 2 / 11
    True
    """

    schedule: Callable[[int | Tensor], float | Tensor]
    steps: int

    def __post_init__(self) -> None:
        if not callable(self.schedule):
            raise ValueError(f"schedule must be a function of the step, got {self.schedule}")
        if self.steps < 0:
            raise ValueError(f"steps must be at least 0, got {self.steps}")

    def __call__(self, step: int | Tensor) -> float | Tensor:
        return self.schedule(step + self.steps)


def _relative_deviation(gamma: float) -> float:
    """The sigma_rel of weights proportional to k ** gamma."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def _clamp_max(number: float | Tensor, maximum: float) -> float | Tensor:
    return number.clamp(max=maximum) if isinstance(number, Tensor) else min(number, maximum)


def _clamp_min(number: float | Tensor, minimum: float) -> float | Tensor:
    return number.clamp(min=minimum) if isinstance(number, Tensor) else max(number, minimum)


def _cos(angle: float | Tensor) -> float | Tensor:
    return torch.cos(angle) if isinstance(angle, Tensor) else math.cos(angle)


def _check_momentum(momentum: float) -> None:
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be in [0, 1], got {momentum}")


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")
