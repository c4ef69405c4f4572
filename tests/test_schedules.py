"""Momentum schedules against their formulas."""

import inspect
import math
import pickle
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eman_kernels import schedules
from eman_kernels.schedules import (
    Average,
    Constant,
    CopyFirst,
    Cosine,
    ExponentialWarmUp,
    HalfLife,
    InverseGamma,
    Linear,
    Offset,
    PowerFunction,
    WarmUp,
)

# Found in the module, so that a new schedule without an entry in INSTANCES fails the tests below.
CLASSES = [c for c in vars(schedules).values() if inspect.isclass(c) and c.__module__ == schedules.__name__]
# Instances of each schedule, from any momentum in [0, 1] and any number of steps above 0.
INSTANCES = {
    Constant: lambda momentum, steps: [Constant(momentum)],
    Cosine: lambda momentum, steps: [Cosine(momentum, steps)],
    Linear: lambda momentum, steps: [Linear(momentum, 1.0, steps), Linear(1.0, momentum, steps)],
    WarmUp: lambda momentum, steps: [WarmUp(momentum)],
    ExponentialWarmUp: lambda momentum, steps: [ExponentialWarmUp(momentum, steps)],
    HalfLife: lambda momentum, steps: [HalfLife(steps), HalfLife(steps, batch_size=3)],
    PowerFunction: lambda momentum, steps: [PowerFunction(0.1), PowerFunction(0.2)],
    InverseGamma: lambda momentum, steps: [
        InverseGamma(momentum),
        InverseGamma(momentum, 3.0, 0.5, momentum / 2, update_after_step=steps),
    ],
    Average: lambda momentum, steps: [Average(), Average(momentum)],
    CopyFirst: lambda momentum, steps: [CopyFirst(momentum, steps), CopyFirst(WarmUp(momentum), steps)],
    Offset: lambda momentum, steps: [Offset(WarmUp(momentum), steps), Offset(Cosine(momentum, steps), 1)],
}


def test_cosine_matches_byol():
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


def test_power_function_matches_karras():
    """gamma equals the paper's for both of its lengths, and an average over 2000 steps has the requested sigma_rel."""
    for sigma_rel, gamma in ((0.05, 16.97), (0.10, 6.94)):
        schedule = PowerFunction(sigma_rel)
        assert schedule.gamma == pytest.approx(gamma, abs=0.01)
        assert schedule(0) == 0.0
        weights = torch.ones(1, dtype=torch.float64)
        for step in range(1, 2000):
            momentum = schedule(step)
            weights = torch.cat([weights * momentum, torch.tensor([1 - momentum], dtype=torch.float64)])
        times = (torch.arange(2000, dtype=torch.float64) + 1) / 2000
        mean = (weights * times).sum()
        assert weights.sum().item() == pytest.approx(1, abs=1e-12)
        assert ((weights * (times - mean) ** 2).sum() ** 0.5).item() == pytest.approx(sigma_rel, rel=0.01)


def test_inverse_gamma():
    schedule = InverseGamma(0.95, inv_gamma=2.0, power=0.5, min_decay=0.3, update_after_step=10)
    assert [schedule(step) for step in (0, 5, 10)] == [0.0, 0.0, 0.0]
    assert schedule(11) == 0.3
    assert schedule(16) == pytest.approx(0.5, abs=1e-15)
    assert schedule(10 + 797) < 0.95
    assert schedule(10 + 798) == schedule(10**9) == 0.95
    # The values quoted in the documentation of timm, diffusers and ema-pytorch.
    assert InverseGamma(1.0)(31_600) == pytest.approx(0.999, abs=1e-6)
    assert InverseGamma(1.0, power=0.75)(215_400) == pytest.approx(0.9999, abs=1e-7)


@pytest.mark.filterwarnings("ignore")  # the libraries' own warnings on import
def test_inverse_gamma_matches_the_libraries():
    """Their step counts the current update, ours only the updates before it."""
    model = torch.nn.Linear(2, 2)
    options = {"inv_gamma": 2.0, "power": 0.7, "update_after_step": 4}
    schedule = InverseGamma(0.8, min_decay=0.1, **options)
    diffusers = pytest.importorskip("diffusers.training_utils", reason="diffusers is not installed")
    ema_pytorch = pytest.importorskip("ema_pytorch", reason="ema-pytorch is not installed")
    diffusers_ema = diffusers.EMAModel(model.parameters(), decay=0.8, min_decay=0.1, use_ema_warmup=True, **options)
    ema_pytorch_ema = ema_pytorch.EMA(model, beta=0.8, min_value=0.1, **options)
    for step in range(60):
        assert schedule(step) == diffusers_ema.get_decay(step + 1)
        ema_pytorch_ema.step.fill_(step + 1)
        assert schedule(step) == pytest.approx(ema_pytorch_ema.get_current_decay(), abs=1e-6)


def test_average_is_the_mean_of_all_students():
    mean = 0.0
    for step, value in enumerate([4.0, -1.0, 2.5, 7.0]):
        momentum = Average()(step)
        mean = momentum * mean + (1 - momentum) * value
    assert mean == pytest.approx(12.5 / 4)


def test_linear_is_i_jepas_and_data2vecs_ramp():
    """I-JEPA's generator gives the update k = 0 its first number. data2vec's counter includes the current update."""
    start, end, steps = 0.996, 1.0, 40
    i_jepa = [start + i * (end - start) / steps for i in range(steps + 1)]
    schedule = Linear(start, end, steps)
    assert [schedule(step) for step in range(steps + 1)] == pytest.approx(i_jepa, abs=1e-15)
    assert schedule(steps) == schedule(10**9) == end

    def data2vec(num_updates):
        return end if num_updates >= steps else end - (end - start) * (1 - num_updates / steps)

    for step in range(2 * steps):
        assert Offset(schedule, 1)(step) == pytest.approx(data2vec(step + 1), abs=1e-15)


def test_exponential_warm_up_is_yolos():
    """ModelEMA increments its counter before it reads the decay."""
    for step in range(3000):
        theirs = 0.9999 * (1 - math.exp(-(step + 1) / 2000))
        assert ExponentialWarmUp(0.9999, tau=2000)(step) == pytest.approx(theirs, abs=1e-15)
    assert ExponentialWarmUp() == ExponentialWarmUp(0.9999, 2000)


def test_average_with_a_largest_momentum_is_mean_teachers():
    """Its global_step is incremented before the update; copies of its loop that increment it afterwards start at 0."""
    for step in range(300):
        assert Average(0.99)(step) == min(1 - 1 / (step + 1), 0.99)
        assert Offset(Average(0.99), 1)(step) == min(1 - 1 / (step + 2), 0.99)
    assert Average(0.99)(99) == Average(0.99)(10**9) == 0.99


def test_offset_warm_up_is_torch_emas():
    """Where the student is 0, each update multiplies the average by the momentum."""
    torch_ema = pytest.importorskip("torch_ema", reason="torch_ema is not installed")
    student = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    average = torch_ema.ExponentialMovingAverage([student], decay=0.9)
    torch.nn.init.zeros_(student)
    for step in range(120):
        before = average.shadow_params[0].item()
        average.update()
        assert Offset(WarmUp(0.9), 1)(step) == pytest.approx(average.shadow_params[0].item() / before, abs=1e-12)


def test_diffusers_without_its_warm_up_copies_first():
    diffusers = pytest.importorskip("diffusers.training_utils", reason="diffusers is not installed")
    average = diffusers.EMAModel(torch.nn.Linear(2, 2).parameters(), decay=0.95)
    for step in range(300):
        assert CopyFirst(WarmUp(0.95))(step) == average.get_decay(step + 1)


def test_cosine_matches_lightly():
    """lightly ends at its last step, max_steps - 1."""
    cosine_schedule = pytest.importorskip("lightly.utils.scheduler", reason="lightly is not installed").cosine_schedule
    for step in range(50):
        assert Cosine(0.996, 49)(step) == pytest.approx(cosine_schedule(step, 50, 0.996, 1.0), abs=1e-15)


def test_mmengines_annealing_and_mmdets_exponential_rule():
    """Both copy in their first update. Their momentum is the student's weight, 1 - ours."""
    momentum, gamma = 0.0002, 100
    for steps in range(1, 3000):
        annealed = max(momentum, gamma / (gamma + steps))
        assert InverseGamma(1 - momentum, inv_gamma=gamma, power=1)(steps) == pytest.approx(1 - annealed, abs=1e-15)
        exponential = (1 - momentum) * math.exp(-(1 + steps) / gamma) + momentum
        ours = CopyFirst(ExponentialWarmUp(1 - momentum, tau=gamma))
        assert ours(steps) == pytest.approx(1 - exponential, abs=1e-15)
    assert InverseGamma(1 - momentum, inv_gamma=gamma, power=1)(0) == ours(0) == 0.0


def test_copy_first():
    assert [CopyFirst(0.9)(step) for step in range(3)] == [0.0, 0.9, 0.9]
    schedule = CopyFirst(WarmUp(0.99), updates=3)
    assert [schedule(step) for step in range(5)] == [0.0, 0.0, 0.0, 4 / 13, 5 / 14]


@pytest.mark.parametrize("schedule_class", CLASSES)
def test_a_tensor_step_gives_the_momentum_of_the_number(schedule_class):
    for schedule in INSTANCES[schedule_class](0.9, 50):
        for step in (0, 1, 7, 49, 50, 60, 5000):
            momentum = schedule(torch.tensor(step, dtype=torch.float64))
            assert float(momentum) == pytest.approx(schedule(step), abs=1e-15)
            assert isinstance(momentum, float) or (momentum.dtype, momentum.shape) == (torch.float64, ())


@pytest.mark.parametrize("schedule_class", CLASSES)
@given(momentum=st.floats(0, 1), steps=st.integers(1, 10**6), step=st.integers(0, 10**7))
def test_schedules_stay_in_range_and_can_be_pickled(schedule_class, momentum, steps, step):
    for schedule in INSTANCES[schedule_class](momentum, steps):
        assert 0 <= schedule(step) <= 1
        assert pickle.loads(pickle.dumps(schedule)) == schedule


@pytest.mark.parametrize("schedule_class", CLASSES)
def test_docstrings_have_an_example_and_describe_each_argument(schedule_class):
    text = inspect.getdoc(schedule_class)
    assert f"{schedule_class.__name__}(" in text.partition(">>> ")[2]
    for argument in fields(schedule_class):
        assert not argument.init or f"    {argument.name}: " in text, argument.name


@pytest.mark.parametrize(
    "make",
    [lambda: Constant(1.1), lambda: Cosine(-0.1, 5), lambda: Cosine(0.9, 0), lambda: WarmUp(float("nan")),
     lambda: HalfLife(0), lambda: HalfLife(10, batch_size=-1),
     lambda: PowerFunction(0.3), lambda: PowerFunction(0.0),
     lambda: InverseGamma(1.1), lambda: InverseGamma(power=0), lambda: InverseGamma(inv_gamma=-1),
     lambda: InverseGamma(0.9, min_decay=0.95), lambda: CopyFirst(1.1),
     lambda: Linear(-0.1, 1.0, 5), lambda: Linear(0.9, 1.1, 5), lambda: Linear(0.9, 1.0, 0),
     lambda: ExponentialWarmUp(1.1), lambda: ExponentialWarmUp(tau=0), lambda: Average(1.1),
     lambda: Offset(0.9, 1), lambda: Offset(WarmUp(0.9), -1)],
)  # fmt: skip
def test_arguments_out_of_range_raise(make):
    with pytest.raises(ValueError, match="must be"):
        make()
