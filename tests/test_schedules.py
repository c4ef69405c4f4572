"""Momentum schedules against their formulas."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eman_kernels.schedules import Constant, Cosine, HalfLife, WarmUp


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


@given(st.floats(0, 1), st.integers(1, 10**6), st.integers(0, 10**7))
def test_every_schedule_stays_in_range_and_can_be_pickled(momentum, steps, step):
    for schedule in (Constant(momentum), Cosine(momentum, steps), WarmUp(momentum), HalfLife(steps)):
        assert 0 <= schedule(step) <= 1
        assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize(
    "make",
    [lambda: Constant(1.1), lambda: Cosine(-0.1, 5), lambda: Cosine(0.9, 0), lambda: WarmUp(float("nan")),
     lambda: HalfLife(0), lambda: HalfLife(10, batch_size=-1)],
)  # fmt: skip
def test_bad_arguments(make):
    with pytest.raises(ValueError, match="must be"):
        make()
