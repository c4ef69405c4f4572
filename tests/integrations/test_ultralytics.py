"""ModelEMAN and its callback in ultralytics' trainer, compared with ModelEMA."""

import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from conftest import adapters_example, assert_same_bits, examples
from torch import nn

pytest.importorskip("ultralytics", reason="ultralytics cannot be imported", exc_type=ImportError)

import numpy as np
from PIL import Image
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import ModelEMA

from eman_kernels import EMANTeacher, load_ema_checkpoint
from eman_kernels.integrations import ultralytics as adapter
from eman_kernels.integrations.ultralytics import ModelEMAN, use_eman

both = pytest.mark.parametrize("ema_class", [ModelEMA, ModelEMAN])


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 4))


def change(model):
    model.train()
    model(torch.randn(2, 3, 6, 6))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def counters(model):
    return [tensor for name, tensor in model.named_buffers() if name.endswith("num_batches_tracked")]


@pytest.mark.parametrize("options", [{}, {"decay": 0.9, "tau": 3}, {"decay": 0.99, "tau": 10, "updates": 50}])
def test_averages_equal_modelemas_bit_for_bit_and_counters_are_copied(options):
    model = net()
    theirs, ours = ModelEMA(model, **options), ModelEMAN(model, **options)
    for _ in range(10):
        change(model)
        theirs.update(model)
        ours.update(model)
        for name, tensor in ours.ema.state_dict().items():
            if tensor.is_floating_point():
                assert_same_bits(tensor, theirs.ema.state_dict()[name], name)
    assert ours.updates == theirs.updates == options.get("updates", 0) + 10
    assert [int(n) for n in counters(ours.ema)] == [10]
    assert [int(n) for n in counters(theirs.ema)] == [0], "ModelEMA leaves counters at their first value"


@both
def test_the_ramp_of_the_momentum(ema_class):
    """An average that starts at 0 and follows 1 is 1 - the product of the momenta."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    ema = ema_class(model, decay=0.9, tau=5)
    nn.init.ones_(model.weight)
    for k in range(1, 21):
        ema.update(model)
        product = math.prod(0.9 * (1 - math.exp(-i / 5)) for i in range(1, k + 1))
        assert ema.ema.weight.item() == pytest.approx(1 - product, abs=1e-12)


@both
def test_disabled_and_enabled_again(ema_class):
    model = net()
    ema = ema_class(model)
    before = ema.ema[0].weight.clone()
    ema.enabled = False
    change(model)
    ema.update(model)
    assert ema.updates == 0
    assert torch.equal(ema.ema[0].weight, before)
    ema.enabled = True
    ema.update(model)
    assert ema.updates == 1
    assert not torch.equal(ema.ema[0].weight, before)


@both
def test_the_average_is_in_eval_mode_without_gradients_and_takes_attributes(ema_class):
    model = net()
    model.names = {0: "thing"}
    ema = ema_class(nn.DataParallel(model))
    assert not ema.ema.training
    assert not any(parameter.requires_grad for parameter in ema.ema.parameters())
    assert type(ema.ema) is nn.Sequential, "the wrapper is stripped"
    model.names = {0: "other"}
    ema.update_attr(model, include=["names"])
    assert ema.ema.names == {0: "other"}


def test_a_model_in_a_wrapper_is_followed():
    model = net()
    wrapped, plain = ModelEMAN(model), ModelEMAN(model)
    change(model)
    wrapped.update(nn.DataParallel(model))
    plain.update(model)
    assert_same_bits(wrapped.ema[0].weight, plain.ema[0].weight)


class Distillation(nn.Module):
    """What ModelEMA sees of ultralytics' DistillationModel: it removes the teacher from its copy."""

    def __init__(self):
        super().__init__()
        self.student_model, self.teacher_model = net(), net()


@both
def test_the_teacher_of_a_distillation_is_not_followed(ema_class):
    model = Distillation()
    ema = ema_class(model)
    if ema.ema.teacher_model is not None:
        pytest.skip("this version of ultralytics keeps the teacher in the average")
    before = model.student_model[0].weight.detach().clone()
    change(model.student_model)
    ema.update(model)
    assert ema.ema.teacher_model is None
    assert not torch.equal(ema.ema.student_model[0].weight, before)


def test_an_update_that_fails_is_not_counted():
    model = net()
    ema = ModelEMAN(model)
    with pytest.raises(ValueError, match="the teacher has none"):
        ema.update(nn.Sequential(*model, nn.Linear(4, 4)))
    assert ema.updates == 0


def test_the_callback_keeps_average_and_count():
    model = net()
    trainer = SimpleNamespace(ema=ModelEMA(model, decay=0.9, tau=3))
    change(model)
    trainer.ema.update(model)
    average, expected = trainer.ema.ema, ModelEMA(model, decay=0.9, tau=3, updates=1)
    expected.ema.load_state_dict(average.state_dict())
    use_eman(trainer)
    assert type(trainer.ema) is ModelEMAN
    assert trainer.ema.ema is average
    change(model)
    for ema in (trainer.ema, expected):
        ema.update(model)
    assert trainer.ema.updates == 2
    assert_same_bits(average[0].weight, expected.ema[0].weight)
    ours = trainer.ema
    use_eman(trainer)
    assert trainer.ema is ours
    use_eman(SimpleNamespace(ema=None))  # a trainer without an average


def test_on_a_yolo():
    model = DetectionModel("yolo11n.yaml", ch=3, nc=1, verbose=False)
    theirs, ours = ModelEMA(model), ModelEMAN(model)
    for _ in range(2):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor += 1
        theirs.update(model)
        ours.update(model)
    state = theirs.ema.state_dict()
    differing = [name for name, tensor in ours.ema.state_dict().items() if not torch.equal(tensor, state[name])]
    assert len(differing) == len(counters(model)) == 81
    assert all(name.endswith("num_batches_tracked") for name in differing)


# ---------------------------------------------------------------- in ultralytics' trainer


class Interrupted(Exception):
    pass


def stop(trainer):
    raise Interrupted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ultralytics' own
def test_in_a_training_that_is_resumed(tmp_path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "labels" / f"{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {tmp_path}\ntrain: images\nval: images\nnames: {{0: thing}}\n")
    options = {"epochs": 2, "imgsz": 64, "batch": 2, "nbs": 2, "device": "cpu", "workers": 0, "optimizer": "SGD"}
    options |= {"plots": False, "verbose": False, "project": str(tmp_path), "seed": 0}

    def train(name, *callbacks, path="yolo11n.yaml", **others):
        yolo = YOLO(path, verbose=False)
        for event, callback in callbacks:
            yolo.add_callback(event, callback)
        yolo.train(data=str(data), name=name, **options | others)
        return yolo.trainer

    use = ("on_train_epoch_start", use_eman)
    theirs, ours = train("theirs"), train("ours", use)
    assert type(ours.ema) is ModelEMAN
    assert ours.ema.updates == theirs.ema.updates == 4
    for name, tensor in ours.ema.ema.state_dict().items():
        if tensor.is_floating_point():
            assert_same_bits(tensor, theirs.ema.ema.state_dict()[name], name)
    assert {int(n) for n in counters(ours.ema.ema)} == {4}

    with pytest.raises(Interrupted):
        train("stopped", use, ("on_model_save", stop))
    last = tmp_path / "stopped" / "weights" / "last.pt"
    resumed = train("stopped", use, path=str(last), resume=True)
    assert type(resumed.ema) is ModelEMAN
    assert resumed.ema.updates == 4

    with pytest.raises(pickle.UnpicklingError, match="weights_only"):  # as the guide says
        torch.load(last, weights_only=True)
    checkpoint = torch.load(tmp_path / "ours" / "weights" / "last.pt", weights_only=False)
    teacher = EMANTeacher(ours.model, dtype=torch.float32)
    load_ema_checkpoint(teacher, checkpoint["ema"] or checkpoint["model"])
    weight = next(ours.ema.ema.parameters())
    torch.testing.assert_close(next(teacher.module.parameters()), weight, rtol=1e-3, atol=1e-4)  # stored in float16


def test_examples_run(monkeypatch):
    trainings = []

    def train(yolo, **options):
        trainer = SimpleNamespace(ema=ModelEMA(yolo.model))
        for callback in yolo.callbacks["on_train_epoch_start"]:
            callback(trainer)
        trainings.append((type(trainer.ema), options))

    monkeypatch.setattr(YOLO, "train", train)
    (example,) = examples(adapter.__doc__)
    exec(example, {"data": "data.yaml", "options": {"epochs": 1}})
    exec(adapters_example("ultralytics"), {})
    assert [ema for ema, _ in trainings] == [ModelEMAN, ModelEMAN]
    assert trainings[0][1] == {"data": "data.yaml", "epochs": 1}
