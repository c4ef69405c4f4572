"""Momentum schedules against their formulas."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eman_kernels.schedules import Constant, Cosine, HalfLife, PowerFunction, WarmUp


def test_cosine_is_byols():
    schedule = Cosine(0.996, 1000)
    assert schedule(0) == pytest.approx(0.996, abs=1e-15)
    assert schedule(500) == pytest.approx(0.998, abs=1e-15)
    assert schedule(250) == pytest.approx(1 - 0.004 * (math.sqrt(0.5) + 1) / 2, abs=1e-15)
    assert schedule(1000) == schedule(1500) == schedule(5000) == 1.0


def test_warm_up():
    schedule = WarmUp(0.99)
    assert [schedule(0), schedule(1), schedule(80)] == [0.1, 2 / 11, 0.9]
    assert schedule(889) < 0.99
    assert schedule(890) == schedule(10**9) == 0.99


def test_half_life_in_steps_and_in_samples():
    assert HalfLife(100)(7) ** 100 == pytest.approx(0.5)
    assert HalfLife(1_000_000, batch_size=256)(0) ** (1_000_000 / 256) == pytest.approx(0.5)


def test_constant():
    assert Constant(0.5)(3) == 0.5


def test_power_function_is_karrass():
    """Its gamma is the paper's for both of the paper's lengths, and 2000 steps' average has the spread asked for."""
    for sigma_rel, gamma in ((0.05, 16.97), (0.10, 6.94)):
        schedule = PowerFunction(sigma_rel)
        assert schedule.gamma == pytest.approx(gamma, abs=0.01)
        assert schedule(0) == 0.0
        weights = torch.ones(1, dtype=torch.float64)
        for step in range(1, 2000):
            momentum = schedule(step)
            weights = torch.cat([weights * momentum, torch.tensor([1 - momentum], dtype=torch.float64)])
        at = (torch.arange(2000, dtype=torch.float64) + 1) / 2000
        mean = (weights * at).sum()
        assert weights.sum().item() == pytest.approx(1, abs=1e-12)
        assert ((weights * (at - mean) ** 2).sum() ** 0.5).item() == pytest.approx(sigma_rel, rel=0.01)


@pytest.mark.parametrize("schedule", [Constant(0.9), Cosine(0.9, 50), WarmUp(0.99), HalfLife(9), PowerFunction(0.1)])
def test_a_step_in_a_tensor(schedule):
    for step in (0, 1, 7, 49, 50, 60, 5000):
        momentum = schedule(torch.tensor(step, dtype=torch.float64))
        assert float(momentum) == pytest.approx(schedule(step), abs=1e-15)
        assert isinstance(momentum, float) or momentum.dtype == torch.float64


@given(st.floats(0, 1), st.integers(1, 10**6), st.integers(0, 10**7))
def test_every_schedule_stays_in_range_and_can_be_pickled(momentum, steps, step):
    for schedule in (
        Constant(momentum),
        Cosine(momentum, steps),
        WarmUp(momentum),
        HalfLife(steps),
        PowerFunction(0.2),
    ):
        assert 0 <= schedule(step) <= 1
        assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    "make",
    [lambda: Constant(1.1), lambda: Cosine(-0.1, 5), lambda: Cosine(0.9, 0), lambda: WarmUp(float("nan")),
     lambda: HalfLife(0), lambda: HalfLife(10, batch_size=-1),
     lambda: PowerFunction(0.3), lambda: PowerFunction(0.0)],
)  # fmt: skip
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="must be"):
        make()
