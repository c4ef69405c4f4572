"""Post-hoc EMA: which combination of stored averages is the average of another length.

After n updates with ``schedules.PowerFunction``, the student of update k has the weight
``(k ** (gamma + 1) - (k - 1) ** (gamma + 1)) / n ** (gamma + 1)``. That is the integral of the profile
``p(t) = (gamma + 1) t ** gamma / n ** (gamma + 1)`` over (k - 1, k]. So profiles are compared as functions of t in
(0, n], where their dot products have a closed form.

Source: Karras et al., "Analyzing and improving the training dynamics of diffusion models", 2024, section 3.2 and
appendix C. There the coefficients are the least squares solution. Here they must also add up to 1: the values that are
averaged are much larger than the differences between averages, so a sum of 0.98 would change every weight by 2 %.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# The values of sigma_rel that people search among: `keep` and `--describe` judge a folder by them.
COMMON_LENGTHS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)


def solve_coefficients(
    steps: Sequence[float], gammas: Sequence[float], step: float, targets: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Coefficients with which stored averages add up to the averages of other lengths.

    Args:
        steps, gammas: the number of updates and the exponent of each stored average; no two are alike.
        step: the number of updates of the target averages.
        targets: the exponents of the target averages.

    Returns:
        The coefficients, float64 [stored, targets], and the errors, float64 [targets]: the L2 norm of the difference
        between the combined profile and the target's, divided by the norm of the target's.
    """
    t, a = (torch.tensor(each, dtype=torch.float64)[:, None] for each in (steps, gammas))
    target = torch.tensor([targets], dtype=torch.float64)
    last = torch.full_like(target, step)
    cosines = _cosines(t, a, t.T, a.T)
    towards = _cosines(t, a, last, target)
    # In units of profiles of norm 1, and with a Lagrange multiplier for the sum of the coefficients.
    n, scale = len(t), 1 / _norms(t, a)
    system = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    system[:n, :n], system[:n, n:], system[n:, :n] = cosines, scale, scale.T
    solution = torch.linalg.solve(system, torch.cat([towards, 1 / _norms(last, target)]))[:n]
    squares = 1 - 2 * (solution * towards).sum(dim=0) + (solution * (cosines @ solution)).sum(dim=0)
    return solution * scale * _norms(last, target), squares.clamp(min=0).sqrt()


def integrate_profile(steps: Sequence[float], gamma: float) -> Tensor:
    """Weights with which students, stored at these increasing steps, add up to their average at the last of the steps.

    Between two steps the student is taken to move linearly, and before the first one not at all. Returns float64
    weights that are positive and add up to 1.
    """
    t = torch.tensor([0.0, *steps], dtype=torch.float64) / steps[-1]
    mass = (t ** (gamma + 1)).diff()
    moment = (gamma + 1) / (gamma + 2) * (t ** (gamma + 2)).diff()
    # The share of the upper end of each interval. The first one is empty if the student of step 0 is stored.
    later = (moment - t[:-1] * mass) / t.diff().clamp(min=1e-300)
    weights = later.clone()
    weights[0] = mass[0]
    weights[:-1] += (mass - later)[1:]
    return weights


def gamma_of_half_life(half_life: float, step: float) -> float:
    """The exponent with which half of the weight is on the last ``half_life`` of ``step`` updates."""
    if not 0 < half_life < step / 2:
        raise ValueError(
            f"half_life must be above 0 and below half of the {step} updates, where all students have the same weight, "
            f"but is {half_life}"
        )
    return math.log(0.5) / math.log1p(-half_life / step) - 1


def _norms(steps: Tensor, gammas: Tensor) -> Tensor:
    """The L2 norm of each profile."""
    return (gammas + 1) / ((2 * gammas + 1) * steps).sqrt()


def _cosines(steps: Tensor, gammas: Tensor, other_steps: Tensor, other_gammas: Tensor) -> Tensor:
    """The dot products of profiles, divided by their norms."""
    a, b = gammas + 0.5, other_gammas + 0.5
    power = torch.where(steps < other_steps, b, a)  # of the later one
    ratio = torch.minimum(steps, other_steps) / torch.maximum(steps, other_steps)
    return 2 * (a * b).sqrt() / (a + b) * ratio**power
