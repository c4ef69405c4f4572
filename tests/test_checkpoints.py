"""load_ema_checkpoint on files written by the libraries themselves, and our own files in other formats."""

import copy
import io

import pytest
import torch
from conftest import assert_same_bits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from eman_kernels import EMANTeacher, load_ema_checkpoint


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 4))


def train_step(student):
    student.train()
    student(torch.randn(4, 3, 6, 6))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def save_and_load(state):
    """The state after torch.save and torch.load(weights_only=True)."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_has_values(teacher, tensors):
    actual = teacher.module.state_dict()
    assert tensors
    for name, tensor in tensors.items():
        assert_same_bits(actual[name], tensor, name)


@pytest.fixture
def student():
    return net()


@pytest.fixture
def teacher():
    torch.manual_seed(1)
    teacher = EMANTeacher(net())
    teacher.step = 3
    return teacher


def differs(one, other):
    return any(one[name].ne(other[name]).any() for name in one)


def test_timm(student, teacher, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    model_ema = timm.utils.ModelEmaV3(student, 0.9)
    for step in range(1, 4):
        train_step(student)
        model_ema.update(student, step=step)
    optimizer = torch.optim.AdamW(student.parameters())
    student(torch.randn(2, 3, 6, 6)).sum().backward(), optimizer.step()
    saver = timm.utils.CheckpointSaver(student, optimizer, model_ema=model_ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0)
    checkpoint = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert differs(checkpoint["state_dict_ema"], checkpoint["state_dict"])
    found = load_ema_checkpoint(teacher, checkpoint)
    assert (found.layout, found.prefix, found.step) == ("timm", "state_dict_ema.", None)
    assert_has_values(teacher, checkpoint["state_dict_ema"])
    assert teacher.step == 3, "timm does not store the step"


@pytest.mark.parametrize("wrapped", [False, True])
def test_averaged_model(student, teacher, wrapped):
    model = nn.DataParallel(student).cpu() if wrapped else student
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(5):
        train_step(student)
        averaged.update_parameters(student)
    found = load_ema_checkpoint(teacher, save_and_load({"model": student.state_dict(), "ema": averaged.state_dict()}))
    assert (found.layout, found.step, teacher.step) == ("torch's AveragedModel", 5, 5)
    network = averaged.module.module if wrapped else averaged.module
    assert_has_values(teacher, network.state_dict())


def test_ema_pytorch(student, teacher):
    ema_pytorch = pytest.importorskip("ema_pytorch", reason="ema-pytorch is not installed")
    ema = ema_pytorch.EMA(student, beta=0.9, update_after_step=0, update_every=1)
    for _ in range(6):
        train_step(student)
        ema.update()
    assert differs(student.state_dict(), ema.ema_model.state_dict())
    for state in (ema.state_dict(), {"step": 77, "model": student.state_dict(), "ema": ema.state_dict()}):
        teacher.step = 0
        found = load_ema_checkpoint(teacher, save_and_load(state))
        assert (found.layout, found.step, teacher.step) == ("ema-pytorch", 6, 6)
        assert_has_values(teacher, ema.ema_model.state_dict())


def test_torch_ema(student, teacher):
    torch_ema = pytest.importorskip("torch_ema", reason="torch_ema is not installed")
    ema = torch_ema.ExponentialMovingAverage(student.parameters(), decay=0.9)
    for _ in range(4):
        train_step(student)
        ema.update()
    before = {name: buffer.clone() for name, buffer in teacher.module.named_buffers()}
    state = {"model": student.state_dict(), "ema": ema.state_dict()}
    found = load_ema_checkpoint(teacher, save_and_load(state))
    assert (found.layout, found.prefix, found.step, teacher.step) == ("torch_ema", "ema.shadow_params", 4, 4)
    assert found.kept == ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    names = [name for name, _ in student.named_parameters()]
    assert_has_values(teacher, dict(zip(names, ema.shadow_params, strict=True)) | before)
    with ema.average_parameters():
        found = load_ema_checkpoint(teacher, ema.state_dict())  # the state now holds the student's values too
    assert_has_values(teacher, dict(zip(names, ema.shadow_params, strict=True)))


def test_diffusers(student, teacher):
    training_utils = pytest.importorskip("diffusers.training_utils", reason="diffusers is not installed")
    ema = training_utils.EMAModel(student.parameters(), decay=0.9)
    for _ in range(4):
        train_step(student)
        ema.step(student.parameters())
    found = load_ema_checkpoint(teacher, save_and_load(ema.state_dict()))
    assert (found.layout, found.step, teacher.step) == ("diffusers", 4, 4)
    names = [name for name, _ in student.named_parameters()]
    assert_has_values(teacher, dict(zip(names, ema.shadow_params, strict=True)))


@pytest.mark.filterwarnings("ignore")  # Lightning's warnings about a run this small
def test_lightning(student, teacher, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")
    from lightning.pytorch.callbacks import EMAWeightAveraging

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = student

        def training_step(self, batch):
            return self.network(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[EMAWeightAveraging(decay=0.9)],
    )  # fmt: skip
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(16, 3, 6, 6), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    found = load_ema_checkpoint(teacher, checkpoint)
    assert (found.layout, found.prefix) == ("Lightning's WeightAveraging", "state_dict.network.")
    assert found.step == teacher.step == 4
    assert_has_values(teacher, {name.removeprefix("network."): t for name, t in checkpoint["state_dict"].items()})
    whole = EMANTeacher(Module())
    assert load_ema_checkpoint(whole, checkpoint).prefix == "state_dict."
    assert_has_values(whole, checkpoint["state_dict"])


@pytest.mark.parametrize(
    ("student_key", "teacher_key", "layout"),
    [
        ("encoder_q", "encoder_k", "EMAN's MoCo"),
        ("online_net", "target_net", "EMAN's BYOL"),
        ("online_net.backbone", "target_net.backbone", "EMAN's BYOL"),
        ("main", "ema", "EMAN's FixMatch"),
    ],
)
@pytest.mark.parametrize("ddp", ["module.", ""])
def test_published_eman_layouts(student, teacher, student_key, teacher_key, layout, ddp):
    average = net()
    states = {student_key: student.state_dict(), teacher_key: average.state_dict()}
    state = {f"{ddp}{key}.{name}": t for key, tensors in states.items() for name, t in tensors.items()}
    state[f"{ddp}queue"] = torch.randn(4, 16)
    checkpoint = {"epoch": 3, "arch": "resnet50", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}
    found = load_ema_checkpoint(teacher, save_and_load(checkpoint))
    assert (found.layout, found.prefix, found.step) == (layout, f"state_dict.{ddp}{teacher_key}.", None)
    assert_has_values(teacher, average.state_dict())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_plain_network_under_any_prefix(student, teacher, prefix, key):
    state = {f"{prefix}{name}": tensor for name, tensor in student.state_dict().items()}
    found = load_ema_checkpoint(teacher, save_and_load({key: state, "epoch": 5} if key else state))
    assert (found.layout, found.step, teacher.step) == ("a plain network", None, 3)
    assert found.prefix == (f"{key}.{prefix}" if key else prefix)
    assert_has_values(teacher, student.state_dict())


def test_eman_teacher_nested_in_a_training_checkpoint(student, teacher):
    ours = EMANTeacher(student)
    for _ in range(2):
        train_step(student)
        ours.update(student)
    state = {"student": student.state_dict(), "teacher": ours.state_dict(), "optimizer": {"lr": 0.1}}
    found = load_ema_checkpoint(teacher, save_and_load(state))
    assert (found.layout, found.prefix, found.step, teacher.step) == ("EMANTeacher", "teacher.module.", 2, 2)
    assert_has_values(teacher, ours.module.state_dict())


def test_student_is_loaded_only_if_there_is_no_average(student, teacher):
    average = net()
    found = load_ema_checkpoint(teacher, {"student": student.state_dict(), "shadow": average.state_dict()})
    assert found.prefix == "shadow."
    assert_has_values(teacher, average.state_dict())
    assert load_ema_checkpoint(teacher, {"student": student.state_dict()}).layout == "a student"
    assert_has_values(teacher, student.state_dict())


def test_missing_num_batches_tracked_is_tolerated(student, teacher):
    state = {name: t for name, t in student.state_dict().items() if not name.endswith("num_batches_tracked")}
    load_ema_checkpoint(teacher, state)
    assert_has_values(teacher, state)


def mismatched_checkpoints():
    """Test id, checkpoint, and the error message that loading it gives."""
    state = net().state_dict()
    incomplete = {name: tensor for name, tensor in state.items() if name != "3.bias"}
    yield (
        "no match",
        {"epoch": 3, "weights": torch.ones(2)},
        r"nothing in the checkpoint matches .* such as epoch, weights;",
    )
    yield "empty", {}, "The checkpoint has no names"
    yield (
        "other names",
        {"features.conv": torch.ones(2), "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        "nothing in the checkpoint matches",
    )
    yield "missing", incomplete, "3.bias: missing from the checkpoint"
    yield "unexpected", state | {"4.weight": torch.ones(2)}, "4.weight: missing from the teacher"
    yield (
        "shape",
        state | {"3.bias": torch.ones(5)},
        r"3.bias: the teacher's shape is \(4,\), the checkpoint's is \(5,\)",
    )
    # If the average does not match, the student must not be loaded instead.
    yield (
        "incomplete average",
        {"state_dict": state, "state_dict_ema": incomplete},
        "network under 'state_dict_ema.' does not match the teacher's",
    )
    yield "ambiguous", {"one": state, "other": state}, "several parts .*: 'one.', 'other.'"
    yield "short list", {"shadow_params": [torch.ones(2)]}, "list has 1 tensors and the teacher has 6 parameters"
    shadows = [p.detach() for p in net().parameters()]
    yield "shape in a list", {"shadow_params": [torch.ones(2), *shadows[1:]]}, "0.weight: the teacher's shape"
    yield "two lists", {"a": {"shadow_params": shadows}, "b": {"shadow_params": shadows}}, "several parts"


@pytest.mark.parametrize(
    ("state", "message"), [pytest.param(*rest, id=name) for name, *rest in mismatched_checkpoints()]
)
def test_mismatch_raises_and_writes_nothing(teacher, state, message):
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        load_ema_checkpoint(teacher, state)
    assert "othing was written" in str(error.value)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_loading_into_a_swapped_teacher_raises(student, teacher):
    """A swapped teacher's tensors hold the student's values; leaving the context would overwrite the loaded ones."""
    before = copy.deepcopy(student.state_dict())
    with teacher.swapped(student), pytest.raises(RuntimeError, match="swapped"):
        load_ema_checkpoint(teacher, net().state_dict())
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_load_state_dict_without_a_step_keeps_the_step(student, teacher):
    state = {name: tensor for name, tensor in EMANTeacher(student).state_dict().items() if "extra" not in name}
    teacher.load_state_dict(state)
    assert teacher.step == 3
    assert_has_values(teacher, student.state_dict())
    assert "_extra_state" not in state, "the caller's dict must not change"
    holder = nn.ModuleDict({"teacher": EMANTeacher(net())})
    holder.load_state_dict({f"teacher.{name}": tensor for name, tensor in state.items()})
    assert_has_values(holder["teacher"], student.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*module\.3\.bias"):
        teacher.load_state_dict({name: tensor for name, tensor in state.items() if name != "module.3.bias"})


@pytest.mark.parametrize("tied", [False, True])
def test_safetensors_round_trip(student, teacher, tied, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    if tied:
        student, other = (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)) for _ in range(2))
        student[2].weight, other[2].weight = student[0].weight, other[0].weight
        teacher = EMANTeacher(other)
    ours = EMANTeacher(student)
    ours.update(student)
    safetensors.save_model(ours, tmp_path / "teacher.safetensors")
    for load in (
        lambda: safetensors.load_model(teacher, tmp_path / "teacher.safetensors"),
        lambda: load_ema_checkpoint(teacher, safetensors.load_file(tmp_path / "teacher.safetensors")),
    ):
        teacher.step = 9
        nn.init.zeros_(teacher.module[0].weight)
        load()
        assert teacher.step == 1
        assert_has_values(teacher, student.state_dict())
    if tied:
        assert teacher.module[0].weight is teacher.module[2].weight
    else:
        safetensors.save_file(ours.state_dict(), tmp_path / "dict.safetensors")
        teacher.load_state_dict(safetensors.load_file(tmp_path / "dict.safetensors"))
    load_ema_checkpoint(teacher, save_and_load(ours.state_dict()))
    teacher.load_state_dict(save_and_load(ours.state_dict()))
