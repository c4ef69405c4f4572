"""The formulas of post-hoc EMA, against numerical integration, numpy.linalg.lstsq and the students' exact weights."""

import math

import numpy as np
import pytest
import torch

from eman_kernels.checkpoints.profiles import gamma_of_half_life, integrate_profile, solve_coefficients
from eman_kernels.schedules import PowerFunction

GAMMA_005, GAMMA_010 = PowerFunction(0.05).gamma, PowerFunction(0.10).gamma
SIGMA_RELS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.25)
TARGETS = [PowerFunction(sigma_rel).gamma for sigma_rel in SIGMA_RELS]


def stored(n, last=1000):
    """n steps of two averages."""
    steps = [last * (i + 1) / n for i in range(n)]
    return steps * 2, [GAMMA_005] * n + [GAMMA_010] * n


def profile(gamma, step, t):
    return np.where(t <= step, (gamma + 1) * (t / step) ** gamma / step, 0.0)


def quadrature(ends, points=20):
    """Gauss-Legendre points and weights on each interval, between which profiles have no jump."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    ends = np.asarray([0.0, *sorted(set(ends))])
    half = np.diff(ends)[:, None] / 2
    return ((ends[:-1, None] + half) + half * nodes).ravel(), (half * weights).ravel()


@pytest.mark.parametrize("n", [2, 8, 16, 32])
def test_coefficients_are_the_least_squares_solution(n):
    """numpy.linalg.lstsq on profiles sampled at quadrature points. The sum of 1 is one more, heavily weighted row."""
    steps, gammas = stored(n)
    coefficients, errors = solve_coefficients(steps, gammas, 1000, TARGETS)
    t, weights = quadrature(steps)
    root = np.sqrt(weights)
    columns = np.stack([profile(g, s, t) * root for g, s in zip(gammas, steps, strict=True)], axis=1)
    # Eliminate the constraint exactly: the last coefficient is 1 minus the others.
    for i, gamma in enumerate(TARGETS):
        wanted = profile(gamma, 1000, t) * root
        free, *_ = np.linalg.lstsq(columns[:, :-1] - columns[:, -1:], wanted - columns[:, -1], rcond=None)
        expected = np.append(free, 1 - free.sum())
        assert coefficients[:, i].numpy() == pytest.approx(expected, abs=1e-7)
        error = np.linalg.norm(columns @ expected - wanted) / np.linalg.norm(wanted)
        assert float(errors[i]) == pytest.approx(error, abs=1e-6)


def test_coefficients_add_up_to_one():
    coefficients, _ = solve_coefficients(*stored(8), 1000, TARGETS)
    assert coefficients.sum(dim=0).tolist() == pytest.approx([1] * len(TARGETS), abs=1e-12)


def test_a_stored_profile_needs_no_other():
    steps, gammas = stored(16)
    coefficients, errors = solve_coefficients(steps, gammas, steps[5], [GAMMA_010])
    assert coefficients[:, 0].tolist() == pytest.approx([float(i == 21) for i in range(32)], abs=1e-9)
    assert float(errors) == pytest.approx(0, abs=1e-7)


def test_coefficients_do_not_depend_on_the_unit_of_the_step():
    steps, gammas = stored(8)
    for scale in (1e-3, 1e9):
        scaled, errors = solve_coefficients([scale * step for step in steps], gammas, scale * 1000, TARGETS)
        expected, expected_errors = solve_coefficients(steps, gammas, 1000, TARGETS)
        assert torch.allclose(scaled, expected, rtol=1e-9)
        assert torch.allclose(errors, expected_errors, rtol=1e-6, atol=1e-7)


def test_many_snapshots_are_well_conditioned():
    steps, gammas = stored(500, last=1e6)
    coefficients, errors = solve_coefficients(steps, gammas, 1e6, TARGETS)
    assert float(errors.max()) < 0.002
    assert float(coefficients.norm(dim=0).max()) < 30


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.2])
def test_the_profile_is_that_of_the_updates(sigma_rel):
    """The weights of the students after n updates with PowerFunction are the integrals of the profile over one step."""
    schedule, n = PowerFunction(sigma_rel), 300
    weights = np.zeros(n)
    for step in range(n):
        momentum = schedule(step)
        weights *= momentum
        weights[step] = 1 - momentum
    t, quad = quadrature(range(1, n + 1))
    integrals = (profile(schedule.gamma, n, t) * quad).reshape(n, -1).sum(axis=1)
    assert weights == pytest.approx(integrals, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("first", [0, 10])
@pytest.mark.parametrize("gamma", [0.5, 6.94, 30.0])
def test_weights_of_checkpoints_are_the_integral_of_a_piecewise_linear_student(gamma, first):
    steps = [first, 20, 50, 60, 100]
    weights = integrate_profile(steps, gamma).numpy()
    t, quad = quadrature([0.1, 1, 3, 10, *steps[1:]])
    for i in range(len(steps)):
        hat = np.interp(t, steps, np.eye(len(steps))[i])  # constant before the first step
        assert weights[i] == pytest.approx((profile(gamma, 100, t) * hat * quad).sum(), rel=1e-6, abs=1e-12)
    assert (weights > 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-12)


def test_one_checkpoint_has_all_the_weight():
    assert integrate_profile([7], 3.0).tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("half_life", [1, 50, 499])
def test_half_of_the_weight_is_on_the_last_half_life(half_life):
    gamma = gamma_of_half_life(half_life, 1000)
    t, weights = quadrature([1000 - half_life, 1000])
    late = t > 1000 - half_life
    assert (profile(gamma, 1000, t) * weights)[late].sum() == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("half_life", [0, -1, 500, math.nan])
def test_a_half_life_out_of_range(half_life):
    with pytest.raises(ValueError, match="half_life must be above 0 and below half of the 1000 updates"):
        gamma_of_half_life(half_life, 1000)


@pytest.mark.parametrize("gamma", [0.01, 6.94, 100.0])
def test_a_schedule_from_gamma(gamma):
    assert PowerFunction.from_gamma(gamma).gamma == pytest.approx(gamma, rel=1e-9)


def test_gamma_must_be_positive():
    with pytest.raises(ValueError, match="gamma must be positive"):
        PowerFunction.from_gamma(0)
