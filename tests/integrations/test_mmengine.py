"""The averaged models for mmengine's EMAHook, compared with mmengine's: the cases of its own tests, run with both."""

import logging
import math

import pytest
import torch
import torch.multiprocessing
from conftest import ROOT, assert_same_bits, examples
from torch import nn

pytest.importorskip("mmengine", reason="mmengine is not installed")

from mmengine.config import Config
from mmengine.hooks import EMAHook
from mmengine.logging import MMLogger
from mmengine.model import (
    BaseModel,
    ExponentialMovingAverage,
    MomentumAnnealingEMA,
    StochasticWeightAverage,
)
from mmengine.registry import MODELS
from mmengine.runner import Runner

from eman_kernels import EMANTeacher, load_ema_checkpoint
from eman_kernels.integrations import mmengine as adapter
from eman_kernels.integrations.mmengine import (
    EMANExponentialMovingAverage,
    EMANMomentumAnnealingEMA,
    EMANStochasticWeightAverage,
    EMANUpdate,
)


class ExpMomentumEMA(ExponentialMovingAverage):
    """The average of mmdet and mmyolo in our words: the weight decays exponentially from 1 to `momentum`."""

    def __init__(self, model, momentum=0.0002, gamma=2000, **options):
        super().__init__(model, momentum, **options)
        self.gamma = gamma

    def avg_func(self, averaged_param, source_param, steps):
        averaged_param.lerp_(source_param, weight_of(self.momentum, self.gamma, int(steps)))


def weight_of(momentum, gamma, steps):
    return (1 - momentum) * math.exp(-(1 + steps) / gamma) + momentum


class EMANExpMomentumEMA(EMANUpdate, ExpMomentumEMA):
    pass


PAIRS = {
    "ema": (ExponentialMovingAverage, EMANExponentialMovingAverage),
    "annealing": (MomentumAnnealingEMA, EMANMomentumAnnealingEMA),
    "swa": (StochasticWeightAverage, EMANStochasticWeightAverage),
    "a subclass": (ExpMomentumEMA, EMANExpMomentumEMA),
}
both = pytest.mark.parametrize("ours", [False, True], ids=["mmengine", "eman_kernels"])


def net():
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 4))


def change(model):
    model(torch.randn(4, 1, 4, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)


def follow(average, model, steps):
    """Update the average after each of so many changes. Yields the values of the model, in float64."""
    for _ in range(steps):
        change(model)
        average.update_parameters(model)
        yield {name: tensor.double().clone() for name, tensor in model.state_dict().items()}


def assert_close(average, expected, names):
    state = average.module.state_dict()
    for name in names:
        torch.testing.assert_close(state[name].double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)


def parameters(model):
    return [name for name, _ in model.named_parameters()]


def floats(model):
    return [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]


# ---------------------------------------------------------------- the averages


@both
def test_the_mean_of_all_students(ours):
    model = net()
    average = PAIRS["swa"][ours](model, device=torch.device("cpu"))
    states = list(follow(average, model, 10))
    assert_close(average, {name: sum(s[name] for s in states) / 10 for name in states[0]}, parameters(model))
    assert average.steps == 10
    assert average.steps.device.type == "cpu"


@both
def test_a_state_dict_gives_the_same_average(ours):
    model = net()
    average, other = (PAIRS["swa"][ours](model) for _ in range(2))
    list(follow(average, model, 5))
    other.load_state_dict(average.state_dict())
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, average.state_dict()[name]), name
    assert other.steps == 5


@both
def test_arguments_out_of_range(ours, monkeypatch):
    with pytest.raises(AssertionError, match="momentum must be in range"):
        PAIRS["ema"][ours](net(), momentum=3)
    with pytest.raises(AssertionError, match="gamma must be greater than 0"):
        PAIRS["annealing"][ours](net(), gamma=-1)
    records = []
    monkeypatch.setattr(MMLogger.get_current_instance(), "handle", records.append)
    PAIRS["ema"][ours](net(), momentum=0.9)
    assert [record.levelno for record in records] == [logging.WARNING], "0.9 is the usual momentum, and not mmengine's"


def weights(kind, steps, interval):
    """The weight of the student in each update that averages, by the formulas in mmengine's documentation."""
    formulas = {
        "ema": lambda k: 0.1,
        "annealing": lambda k: max(0.1, 4 / (4 + k)),
        "swa": lambda k: 1 / (k // interval + 1),
        "a subclass": lambda k: weight_of(0.1, 4, k),
    }
    return [0 if k % interval else formulas[kind](k) if k else 1 for k in range(steps)]


OPTIONS = {
    "ema": {"momentum": 0.1},
    "annealing": {"momentum": 0.1, "gamma": 4},
    "swa": {},
    "a subclass": {"momentum": 0.1, "gamma": 4},
}


@both
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("update_buffers", [True, False])
def test_averages_follow_their_formulas(ours, kind, interval, update_buffers):
    model = net()
    average = PAIRS[kind][ours](model, interval=interval, update_buffers=update_buffers, **OPTIONS[kind])
    averaged = floats(model) if update_buffers else parameters(model)
    expected = None
    for weight, state in zip(weights(kind, 10, interval), follow(average, model, 10), strict=True):
        expected = {name: s + (1 - weight) * (expected[name] - s) if expected else s for name, s in state.items()}
        assert_close(average, expected, averaged)
        if not update_buffers:
            assert_close(average, state, set(state) - set(averaged))


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("options", [{}, {"interval": 2}, {"update_buffers": False}])
def test_averages_equal_mmengines_bit_for_bit(kind, options):
    """Except for SWA, which mmengine computes by add_, with one more rounding."""
    model = net()
    theirs, ours = (each(model, **{"update_buffers": True} | options | OPTIONS[kind]) for each in PAIRS[kind])
    for _ in range(12):
        change(model)
        theirs.update_parameters(model)
        ours.update_parameters(model)
        for name, tensor in ours.state_dict().items():
            if name.endswith("num_batches_tracked"):
                continue
            if kind == "swa":
                torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-5, atol=1e-5)
            else:
                assert_same_bits(tensor, theirs.state_dict()[name], name)
    assert ours.steps == theirs.steps == 12
    interval = options.get("interval", 1)
    assert ours.module[1].num_batches_tracked == (12 - 1) // interval * interval + 1
    if options.get("update_buffers", True):
        assert theirs.module[1].num_batches_tracked == 1, "mmengine copies counters in its first update only"


def test_statistics_are_averaged_by_default():
    model = net()
    average = EMANExponentialMovingAverage(model, momentum=0.1)
    list(follow(average, model, 3))
    assert average.update_buffers
    assert not torch.equal(average.module[1].running_mean, model[1].running_mean)


def test_networks_that_differ():
    average = EMANExponentialMovingAverage(net())
    with pytest.raises(ValueError, match="the teacher has none"):
        average.update_parameters(nn.Sequential(*net(), nn.Linear(4, 4)))
    assert average.steps == 0


# ---------------------------------------------------------------- in EMAHook


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.seen = []

    def forward(self, inputs, data_samples=None, mode="tensor"):
        outputs = self.network(torch.stack(inputs) if isinstance(inputs, list) else inputs)
        if mode == "loss":
            return {"loss": (outputs - 1).square().mean()}
        if mode == "predict":
            self.seen.append(self.network[0].weight.detach().clone())
            return list(outputs)
        return outputs


def runner_of(folder, ema_type, epochs=2, **others):
    torch.manual_seed(0)
    data = [{"inputs": torch.randn(2), "data_samples": torch.zeros(1)} for _ in range(8)]
    loader = {"dataset": data, "sampler": {"type": "DefaultSampler", "shuffle": False}, "batch_size": 4}
    loader["num_workers"] = 0
    return Runner(
        model=Toy(),
        work_dir=str(folder),
        train_dataloader=loader,
        val_dataloader=loader,
        val_evaluator=[],
        train_cfg={"by_epoch": True, "max_epochs": epochs, "val_interval": 1},
        val_cfg={},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
        custom_hooks=[{"type": "EMAHook", "ema_type": ema_type, "momentum": 0.1, "update_buffers": True}],
        default_hooks={"logger": None},
        experiment_name=f"{folder.name} {ema_type} {epochs}",
        randomness={"seed": 0},
        log_level="ERROR",
        **others,
    )


def hook_of(runner):
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    return hook


@pytest.fixture
def runners(monkeypatch):
    """A Runner changes the start method of new processes, and loads its own files with weights_only=False only if torch
    is told so: they hold HistoryBuffers."""
    method = torch.multiprocessing.get_start_method(allow_none=True)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    yield runner_of
    torch.multiprocessing.set_start_method(method, force=True)


@pytest.mark.filterwarnings("ignore")  # mmengine's own
def test_in_a_runner_with_emahook(runners, tmp_path):
    states = {}
    for name in ("ExponentialMovingAverage", "EMANExponentialMovingAverage"):
        runner = runners(tmp_path / name, name)
        runner.train()
        hook = hook_of(runner)
        assert type(hook.ema_model).__name__ == name
        states[name] = {key: tensor.clone() for key, tensor in hook.ema_model.state_dict().items()}
        weight = "module.network.0.weight"
        assert torch.equal(runner.model.seen[-1], states[name][weight]), "validated with the average"
        assert not torch.equal(runner.model.network[0].weight, states[name][weight]), "swapped back afterwards"
    theirs, ours = states.values()
    assert ours["steps"] == 4
    for key, tensor in ours.items():
        if not key.endswith("num_batches_tracked"):
            assert_same_bits(tensor, theirs[key], key)


@pytest.mark.filterwarnings("ignore")  # mmengine's own
def test_resuming_from_either_file_is_exact(runners, tmp_path):
    whole = runners(tmp_path / "whole", "EMANExponentialMovingAverage", epochs=3)
    whole.train()
    for first in ("ExponentialMovingAverage", "EMANExponentialMovingAverage"):
        folder = tmp_path / first
        runners(folder, first).train()
        path = str(folder / "epoch_2.pth")
        resumed = runners(folder, "EMANExponentialMovingAverage", epochs=3, load_from=path, resume=True)
        resumed.train()
        for key, tensor in hook_of(whole).ema_model.state_dict().items():
            if not key.endswith("num_batches_tracked"):
                assert_same_bits(hook_of(resumed).ema_model.state_dict()[key], tensor, key)

    needed = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert "mmengine.logging.history_buffer.HistoryBuffer" in needed, "the guide says that weights_only refuses them"
    checkpoint = torch.load(path, weights_only=False)
    teacher = EMANTeacher(Toy())
    found = load_ema_checkpoint(teacher, checkpoint)
    assert found.layout == "mmengine"
    assert_same_bits(teacher.module.network[0].weight, checkpoint["state_dict"]["network.0.weight"])


def test_examples_run():
    (example,) = examples(adapter.__doc__)
    page = examples((ROOT / "docs" / "adapters.md").read_text())
    (in_the_guide,) = [block for block in page if "EMAHook" in block]
    for block in (example, in_the_guide):
        names = {"others": {}}
        exec(block, names)
        (hook,) = names["config"].custom_hooks
        assert isinstance(names["config"], Config)
        options = {key: value for key, value in hook.items() if key not in ("type", "ema_type")}
        average = MODELS.build({"type": hook.ema_type, "model": net(), **options})
        assert isinstance(average, EMANUpdate)
        assert average.momentum == 0.0002
