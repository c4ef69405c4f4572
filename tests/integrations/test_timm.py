"""ModelEman with timm's own training components, compared with ModelEmaV3."""

import copy
import inspect
import os

import pytest
import torch
import torch.distributed as dist
from conftest import adapters_example, assert_same_bits, examples
from torch import nn

timm = pytest.importorskip("timm", reason="timm is not installed")

from timm.utils import CheckpointSaver, ModelEmaV3, distribute_bn  # noqa: E402

from eman_kernels import EMANTeacher, load_ema_checkpoint  # noqa: E402
from eman_kernels.integrations import timm as adapter  # noqa: E402
from eman_kernels.integrations.timm import ModelEman  # noqa: E402


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 4))


def train_step(model):
    model.train()
    model(torch.randn(4, 3, 6, 6, dtype=next(model.parameters()).dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def assert_same_networks(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert_same_bits(tensor, theirs[name], name)


def test_examples_run(tmp_path):
    model = timm.create_model("test_resnet", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    names = {"optimizer": optimizer, "batches": torch.randn(3, 2, 3, 64, 64), "folder": str(tmp_path)}
    (example,) = examples(adapter.__doc__)
    exec(example, names)
    assert names["model_ema"].step == 3
    assert (tmp_path / "last.pth.tar").exists()


def test_the_example_of_the_guide_runs():
    names = {}
    exec(adapters_example("timm"), names)
    assert names["model_ema"].step == 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": 0.9, "update_after_step": 3},
        {"decay": 0.7, "use_warmup": True},
        {"decay": 0.9, "use_warmup": True, "min_decay": 0.2, "update_after_step": 2, "warmup_gamma": 3.0},
        {"use_warmup": True, "warmup_power": 0.75, "device": "cpu"},
        {"decay": 0.5, "use_warmup": True, "min_decay": 0.8},
        {"decay": 0.5, "min_decay": 0.8, "foreach": False},
        {"decay": 0.9, "exclude_buffers": True},
    ],
)
@pytest.mark.parametrize("with_step", [True, False])
def test_averages_equal_modelemav3s_bit_for_bit(options, with_step):
    model = net()
    ours, theirs = ModelEman(model, **options), ModelEmaV3(model, **options)
    for step in range(1, 11):
        train_step(model)
        for average in (ours, theirs):
            average.update(model, step=step if with_step else None)
        assert_same_networks(ours.module, theirs.module)
        assert ours.get_decay(step if with_step else None) == theirs.get_decay(step if with_step else None)
        if not with_step:
            assert ours.step == step
    assert not torch.equal(ours.module[3].weight, model[3].weight)
    for average in (ours, theirs):
        average.set(model)
    assert_same_networks(ours.module, model)
    assert_same_networks(theirs.module, model)
    assert ours.step == 10, "set() must not count as an update"


def test_attributes_of_the_decay_can_be_assigned():
    model = net()
    ours, theirs = ModelEman(model, 0.9), ModelEmaV3(model, 0.9)
    changes = [{}, {"decay": 0.5}, {"use_warmup": True, "warmup_gamma": 3.0}, {"warmup_power": 0.9}, {"min_decay": 0.7},
               {"decay": 0.1}, {"update_after_step": 6}, {"use_warmup": False, "update_after_step": 0}]  # fmt: skip
    for step, change in enumerate(changes, start=3):
        train_step(model)
        for average in (ours, theirs):
            for name, value in change.items():
                setattr(average, name, value)
            average.update(model, step=step)
        assert_same_networks(ours.module, theirs.module)
        assert [ours.get_decay(k) for k in range(99)] == [theirs.get_decay(k) for k in range(99)]
    assert ours.momentum == ours.decay == 0.1
    ours.momentum = 0.25
    assert ours.decay == ours.get_decay(1000) == 0.25


def test_arguments_are_modelemav3s_in_the_same_order():
    parameters = [list(inspect.signature(kind).parameters.values()) for kind in (ModelEman, ModelEmaV3)]
    ours, theirs = ([(p.name, p.kind, p.default) for p in each] for each in parameters)
    if "stochastic_rounding" in inspect.signature(ModelEmaV3).parameters:  # since timm 1.0.31
        assert ours[:-1] == theirs
    assert {each[0] for each in theirs} <= {each[0] for each in ours}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1.5}, r"must be in \[0, 1\]"),
        ({"warmup_gamma": 0, "use_warmup": True}, "gamma must be positive"),
        ({"warmup_power": 0, "use_warmup": True}, "power must be positive"),
        ({"min_decay": -0.1, "use_warmup": True}, r"min_decay must be in"),
        ({"min_decay": 1.1, "use_warmup": True}, r"must be in \[0, 1\]"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        ModelEman(net(), **options)


def test_options_of_emanteacher_have_precedence():
    average = ModelEman(net(), stochastic_rounding_seed=1, exclude_buffers=True)
    assert (average.rounding, average.seed, average.buffer_rule) == ("stochastic", 1, "copy")
    assert ModelEman(net(), stochastic_rounding=False).rounding == "nearest"
    average = ModelEman(net(), stochastic_rounding_seed=1, rounding="nearest", seed=2, buffers="skip")
    assert (average.rounding, average.seed, average.buffer_rule) == ("nearest", 2, "skip")


# The cases of timm's own tests, tests/test_utils.py, for both classes.
KINDS = pytest.mark.parametrize("kind", [ModelEman, ModelEmaV3])
OPTIONS = pytest.mark.parametrize("options", [{}, {"foreach": False}, {"exclude_buffers": True}], ids=str)
NEEDS_1_0_31 = pytest.mark.skipif(
    "stochastic_rounding" not in inspect.signature(ModelEmaV3).parameters,
    reason="ModelEmaV3 rounds stochastically and has a dtype since timm 1.0.31",
)


def drifts(average, model, steps):
    """How far a drifting model's average has moved, and how far it would have moved in float64."""
    start = model.weight.detach().double().clone()
    exact = start.clone()
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight += 1e-3
        average.update(model, step=step)
        exact = exact.lerp(model.weight.detach().double(), 1 - average.get_decay(step))
    return (average.module.weight.double() - start).mean().item(), (exact - start).mean().item()


@KINDS
@OPTIONS
@pytest.mark.parametrize(
    ("dtype", "rounded", "tolerance"),
    [
        (torch.bfloat16, {"dtype": torch.float32}, 0.01),
        (torch.bfloat16, {}, 0.05),
        (torch.bfloat16, {"stochastic_rounding": False}, None),
        (torch.float32, {}, 1e-5),
    ],
    ids=str,
)
@NEEDS_1_0_31
@pytest.mark.filterwarnings("ignore:at momentum 0.9998 a half-precision teacher rounded to nearest does not move")
def test_average_of_a_drifting_model(kind, options, dtype, rounded, tolerance):
    torch.manual_seed(0)
    model = nn.Linear(32, 32, dtype=dtype)
    average = kind(model, 0.9998, **options, **rounded)
    assert average.module.weight.dtype == rounded.get("dtype", dtype)
    moved, exact = drifts(average, model, steps=600)
    if tolerance is None:  # steps below half an ulp are lost
        assert moved < 0.2 * exact
    else:
        assert moved == pytest.approx(exact, rel=tolerance)


@KINDS
@OPTIONS
@NEEDS_1_0_31
def test_stochastic_rounding_depends_on_the_seed_only(kind, options):
    """Processes with other random states round alike, and none of their random numbers is used up."""
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).bfloat16()
    averages = [kind(model, 0.9998, stochastic_rounding_seed=seed, **options) for seed in (17, 17, 18)]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor += 2
    for step in range(10, 14):
        for rank, average in enumerate(averages):
            torch.manual_seed(100 * step + rank)
            before = torch.get_rng_state()
            average.update(model, step=step)
            assert torch.equal(torch.get_rng_state(), before)
    assert_same_networks(averages[0].module, averages[1].module)
    assert not torch.equal(averages[0].module[0].weight, averages[2].module[0].weight)


@KINDS
@OPTIONS
@NEEDS_1_0_31
def test_tensors_and_steps_are_rounded_differently(kind, options):
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(2))).bfloat16()
    average = kind(model, 0.9998, **options)
    rounded = []
    for step in (10, 11):
        with torch.no_grad():
            for layers, value in ((model, 2.0), (average.module, 1.0)):
                for parameter in layers.parameters():
                    parameter.fill_(value)
        average.update(model, step=step)
        rounded += [layer.weight.detach().clone() for layer in average.module]
    assert not any(torch.equal(rounded[i], rounded[j]) for i in range(4) for j in range(i))


@KINDS
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_scripted_model(kind, tmp_path):
    """As in ``train.py --torchscript --model-ema``."""
    model = net()
    scripted, plain = torch.jit.script(model), kind(model, 0.9)
    average = kind(scripted, 0.9)
    images = torch.randn(2, 3, 6, 6)
    optimizer = torch.optim.SGD(scripted.parameters(), lr=0.1)
    for step in range(1, 4):
        scripted(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        plain.load_state_dict(average.state_dict())
        average.update(scripted, step=step)
        plain.update(model, step=step)  # its tensors are the scripted model's
        assert_same_networks(average.module, plain.module)
    assert not torch.equal(average.module.state_dict()["0.weight"], model[0].weight)
    assert_same_bits(average.eval()(images), plain.eval()(images))
    saver = CheckpointSaver(scripted, optimizer, model_ema=average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0)
    saved = torch.load(tmp_path / "last.pth.tar", weights_only=False)["state_dict_ema"]
    for name, tensor in plain.module.state_dict().items():
        assert_same_bits(saved[name], tensor, name)


def test_tied_weights_and_non_persistent_buffers():
    """V3 averages tied weights twice per step, and never updates non-persistent buffers."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    model.register_buffer("mean", torch.zeros(4), persistent=False)
    ours, theirs = ModelEman(model, 0.9), ModelEmaV3(model, 0.9)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
        model.mean += 1
    ours.update(model)
    theirs.update(model)
    torch.testing.assert_close(ours.module[1].weight, before + 0.1)
    torch.testing.assert_close(theirs.module[1].weight.detach(), before + 0.19)
    torch.testing.assert_close(ours.module.mean, torch.full((4,), 0.1))
    assert not theirs.module.mean.any()


def test_bfloat16_average_is_unbiased_like_v3s():
    model = nn.Linear(200, 200, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    averages = [ModelEman(model, 0.9999)]
    if "stochastic_rounding" in inspect.signature(ModelEmaV3).parameters:  # since timm 1.0.31
        averages.append(ModelEmaV3(model, 0.9999))
    nn.init.constant_(model.weight, 1.5)
    for _ in range(100):
        for average in averages:
            average.update(model)
    expected = 1.5 - 0.5 * 0.9999**100
    for average in averages:
        values = average.module.weight.detach().double()
        assert values.mean().item() == pytest.approx(expected, abs=5 * values.std().item() / 200)


def test_resuming_from_timms_checkpoints_is_bit_exact(tmp_path):
    """timm stores the plain network without the step, which update(step=...) supplies."""
    options = {"decay": 0.99, "use_warmup": True, "update_after_step": 2}
    model = timm.create_model("test_resnet", num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model_ema, v3 = ModelEman(model, **options), ModelEmaV3(model, **options)
    batches = torch.randn(8, 2, 3, 64, 64)

    def step(number, model, optimizer, *averages):
        optimizer.zero_grad()
        model(batches[number - 1]).square().mean().backward()
        optimizer.step()
        for average in averages:
            average.update(model, step=number)

    for number in range(1, 6):
        step(number, model, optimizer, model_ema, v3)
    CheckpointSaver(model, optimizer, model_ema=model_ema, checkpoint_dir=str(tmp_path)).save_checkpoint(epoch=0)

    path = str(tmp_path / "last.pth.tar")
    resumed = timm.create_model("test_resnet", num_classes=10)
    resumed_optimizer = torch.optim.SGD(resumed.parameters(), lr=0.1)
    resumed_ema = ModelEman(resumed, **options)
    assert timm.models.resume_checkpoint(resumed, path, resumed_optimizer, log_info=False) == 1
    timm.models.load_checkpoint(resumed_ema.module, path, use_ema=True)
    for number in range(6, 9):
        step(number, model, optimizer, model_ema, v3)
        step(number, resumed, resumed_optimizer, resumed_ema)
    assert_same_networks(resumed, model)
    assert_same_networks(resumed_ema.module, model_ema.module)
    assert_same_networks(resumed_ema.module, v3.module)
    assert resumed_ema.step == 8


@KINDS
@pytest.mark.parametrize("compiled", [False, True])
def test_in_timms_tasks(kind, compiled, monkeypatch):
    """The cases of timm's tests/test_task.py: the task makes the average, evaluates, saves and loads it."""
    from timm.task import ClassificationTask, task

    monkeypatch.setattr(task, "ModelEmaV3", kind)

    def make_task(model):
        task = ClassificationTask(model, nn.CrossEntropyLoss(), device=torch.device("cpu"), verbose=False)
        task.setup_ema(decay=0.9)
        if compiled:
            task.compile(backend="eager")
            task.compile_ema(backend="eager")
        return task

    model, images = net(), torch.randn(2, 3, 6, 6)
    task = make_task(model)
    assert task.has_ema()
    before = task.get_eval_model(ema=True)(images)
    train_step(model)
    task.update_ema(step=1)  # copies the model
    after = task.get_eval_model(ema=True)(images)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, copy.deepcopy(model).eval()(images))
    expected = model[0].weight.detach().clone()
    train_step(model)
    task.update_ema(step=2)
    expected.lerp_(model[0].weight.detach(), 0.1)

    state = task.get_checkpoint_state(ema=True)["state_dict_ema"]
    assert list(state) == list(task.get_checkpoint_state()["state_dict"])
    torch.testing.assert_close(state["0.weight"], expected)
    resumed = make_task(net())
    resumed.load_checkpoint_state(copy.deepcopy(state), ema=True)
    assert_same_networks(resumed.get_trainable_module(ema=True).module, task.get_trainable_module(ema=True).module)


def test_average_stays_in_eval_mode_and_resumes_from_its_state_dict():
    model = net()
    model_ema = ModelEman(model)
    assert isinstance(model_ema, EMANTeacher)
    assert not model_ema.train().module[1].training
    model_ema.update(model, step=40)
    resumed = ModelEman(model)
    resumed.load_state_dict(ModelEmaV3(model).state_dict())  # V3's state has no step
    assert resumed.step == 0
    assert load_ema_checkpoint(resumed, {"state_dict_ema": model.state_dict()}).step is None
    resumed.load_state_dict(model_ema.state_dict())
    assert resumed.step == 40


def _train_in_one_process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    model = net()
    averages = {"steps": ModelEman(model, 0.9), "no steps": ModelEman(model, 0.9), "v3": ModelEmaV3(model, 0.9)}
    student = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    for step in range(1, 4):
        optimizer.zero_grad()
        student(torch.randn(4, 3, 6, 6)).square().mean().backward()
        optimizer.step()
        for name, average in averages.items():
            average.update(student if name != "v3" else model, step=step if name != "no steps" else None)
    for each in (student, averages["steps"], averages["v3"]):
        distribute_bn(each, 2, reduce=True)
    torch.save({name: average.module.state_dict() for name, average in averages.items()}, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")
def test_averages_are_equal_in_all_processes(tmp_path):
    """Each process creates its average from its own initial weights, before DDP broadcasts the first process's."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_train_in_one_process, args=(rank, str(tmp_path)), daemon=True) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(os.path.join(tmp_path, str(rank)), weights_only=True) for rank in range(2))
    for name in first["steps"]:
        assert_same_bits(first["steps"][name], second["steps"][name], name)
        assert_same_bits(first["steps"][name], first["v3"][name], name)
    difference = first["no steps"]["0.weight"] - second["no steps"]["0.weight"]
    assert difference.abs().max() > 0.1, "without step= no update copies, and the averages differ"
