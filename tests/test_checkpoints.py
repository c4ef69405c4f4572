"""load_ema_checkpoint on files written by the libraries themselves, and our own files in other formats."""

import copy
import io
from pathlib import Path

import pytest
import torch
from conftest import assert_same_bits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from eman_kernels import EMANTeacher, EMANTeachers, eman_update_, load_ema_checkpoint, schedules


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
    with pytest.raises(ValueError, match=r"only the student has been found, under 'student\.'.* prefix='student\.'"):
        load_ema_checkpoint(teacher, {"student": student.state_dict()})
    assert_has_values(teacher, average.state_dict())
    for selected in ({"prefix": "student."}, {"key": "student"}):
        assert load_ema_checkpoint(teacher, {"student": student.state_dict()}, **selected).layout == "a student"
        assert_has_values(teacher, student.state_dict())


def test_missing_num_batches_tracked_is_tolerated(student, teacher):
    state = {name: t for name, t in student.state_dict().items() if not name.endswith("num_batches_tracked")}
    load_ema_checkpoint(teacher, state)
    assert_has_values(teacher, state)


def is_buffer(name):
    return "running" in name or "num_batches" in name


def joined(state, separator=""):
    """The parameters as latent-diffusion's LitEma registers them: buffers whose names have no dots."""
    return {name.replace(".", separator): tensor for name, tensor in state.items() if not is_buffer(name)}


def parameters_of(state):
    return [tensor for name, tensor in state.items() if not is_buffer(name)]


# Where libraries store an average B beside its student A: the file, what is found, and the values that must be loaded.
AVERAGES = {
    # A library's key each.
    **{
        f"{student}/{average}": (lambda A, B, keys=(student, average): {keys[0]: A, keys[1]: B}, f"{average}.", None)
        for student, average in [
            ("state_dict", "ema_state_dict"),  # FixMatch-pytorch, mean-teacher
            ("encoder", "target_encoder"),  # I-JEPA
            ("params", "params_ema"),  # BasicSR
            ("base_encoder", "momentum_encoder"),  # MoCo v3
            ("online_network", "target_network"),  # BYOL
            ("G", "G_ema"),  # StyleGAN
            ("critic", "critic_target"),  # TD3
            ("model", "ema_state"),  # detectron2
            ("weights", "averagedWeights"),  # not a library's: recognized by its words
            ("net", "net_EMA"),
        ]
    },
    "flat": (
        lambda A, B: {f"critic.{n}": t for n, t in A.items()} | {f"critic_target.{n}": t for n, t in B.items()},
        "critic_target.",
        None,
    ),
    "moco v3 in DDP": (
        lambda A, B: {
            "state_dict": {f"module.base_encoder.{n}": t for n, t in A.items()}
            | {f"module.momentum_encoder.{n}": t for n, t in B.items()}
        },
        "state_dict.module.momentum_encoder.",
        None,
    ),
    "mmengine": (
        lambda A, B: {
            "meta": {"epoch": 1},
            "state_dict": B,  # swapped by EMAHook before saving
            "ema_state_dict": {f"module.{n}": t for n, t in A.items()} | {"steps": torch.tensor(40)},
        },
        "state_dict.",
        40,
    ),
    "edm2": (
        lambda A, B: {"net": A, "ema": {"stds": [0.05], "emas": [B]}},
        "ema.emas.0.",
        None,
    ),
    "list": (lambda A, B: {"net": A, "emas": [B]}, "emas.0.", None),
    "nested lists": (lambda A, B: {"net": A, "runs": [{"ema": (B,)}]}, "runs.0.ema.0.", None),
    "yolo": (
        lambda A, B: {"date": "", "version": "8", "license": "", "model": None, "ema": module_of(B), "updates": 12},
        "ema.",
        12,
    ),
    "yolo's trained module": (lambda A, B: {"model": module_of(A), "ema": module_of(B)}, "ema.", None),
    "module": (lambda A, B: {"model": A, "ema": module_of(B)}, "ema.", None),
    "state_dict and module": (lambda A, B: {"state_dict": A, "ema": module_of(B)}, "ema.", None),
    "rt-detr": (
        lambda A, B: {"model": A, "ema": {"module": B, "updates": 7}, "last_epoch": 3},
        "ema.module.",
        7,
    ),
    "averaged model object": (lambda A, B: {"model": A, "swa": AveragedModel(module_of(B))}, "swa.module.", 0),
    "optimizer": (
        lambda A, B: {
            "model": A,
            "opt": torch.optim.Adam(module_of(A).parameters()),
            "ema": B,
            "optimizer": {"state": {0: {"exp_avg": A["0.weight"]}}, "param_groups": [{"params": [0]}]},
        },
        "ema.",
        None,
    ),
}


def module_of(state):
    network = net()
    network.load_state_dict(state)
    return network


@pytest.mark.parametrize("name", AVERAGES)
def test_average_beside_its_student(student, teacher, name):
    average = net().state_dict()
    make, prefix, step = AVERAGES[name]
    found = load_ema_checkpoint(teacher, make(student.state_dict(), average))
    assert (found.prefix, found.step) == (prefix, step)
    assert teacher.step == (3 if step is None else step)
    assert_has_values(teacher, average)


# The same, in forms that do not store buffers.
PARAMETER_AVERAGES = {
    "latent-diffusion": (
        lambda A, B: {
            "state_dict": {f"model.net.{n}": t for n, t in A.items()}
            | {f"model_ema.net{n}": t for n, t in joined(B).items()}
            | {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(9, dtype=torch.int)}
        },
        "state_dict.model_ema.net",
        9,
    ),
    "latent-diffusion without a count": (
        lambda A, B: (
            {f"model.{n}": t for n, t in A.items()}
            | {f"model_ema.{n}": t for n, t in joined(B).items()}
            | {"model_ema.num_updates": torch.tensor(-1, dtype=torch.int)}
        ),
        "model_ema.",
        None,
    ),
    "underscores": (lambda A, B: {"model": A, "ema": {"shadow": joined(B, "_")}}, "ema.shadow.", None),
    "shadow_": (
        lambda A, B: {"model": A, "ema": {f"shadow_{n}": t for n, t in joined(B, "_").items()}},
        "ema.shadow_",
        None,
    ),
    "named parameters": (
        lambda A, B: {"model": A, "ema": dict(module_of(B).named_parameters())},
        "ema.",
        None,
    ),
    "parameters alone": (lambda A, B: dict(module_of(B).named_parameters()), "", None),
    "a list": (lambda A, B: parameters_of(B), "", None),
    "parameters()": (lambda A, B: list(module_of(B).parameters()), "", None),
    "list under a key": (lambda A, B: {"model": A, "ema_params": parameters_of(B)}, "ema_params", None),
    "list in a list": (lambda A, B: {"model": A, "ema": [tuple(parameters_of(B))]}, "ema.0", None),
}


@pytest.mark.parametrize("name", PARAMETER_AVERAGES)
def test_average_of_the_parameters_keeps_the_buffers(student, teacher, name):
    average = net().state_dict()
    make, prefix, step = PARAMETER_AVERAGES[name]
    before = {name: buffer.clone() for name, buffer in teacher.module.named_buffers()}
    with torch.no_grad():
        student[1].running_mean += 1
    found = load_ema_checkpoint(teacher, make(student.state_dict(), average))
    assert (found.prefix, found.step) == (prefix, step)
    assert found.kept == ("1.running_mean", "1.running_var", "1.num_batches_tracked") == tuple(before)
    expected = {name: tensor for name, tensor in average.items() if name not in before}
    assert_has_values(teacher, expected | before)


@pytest.mark.parametrize("what", ["parameters", "state_dict"])
def test_nemo(student, teacher, what):
    """NeMo's callback stores a list of the parameters, or of the values of the state_dict, depending on its version."""
    average = net().state_dict()
    weights = list(average.values()) if what == "state_dict" else parameters_of(average)
    state = {"state_dict": student.state_dict(), "callbacks": {"EMA": {"cur_step": 8, "ema_weights": weights}}}
    found = load_ema_checkpoint(teacher, save_and_load(state))
    assert (found.layout, found.prefix, found.step) == ("NeMo", "callbacks.EMA.ema_weights", 8)
    assert len(found.kept) == (3 if what == "parameters" else 0)
    assert_has_values(teacher, {name: t for name, t in average.items() if name not in found.kept})


def test_latent_diffusion_names_without_dots_in_a_small_network():
    """The names of one layer have no dots in the first place; tied parameters are stored once."""
    teacher, average = EMANTeacher(nn.Linear(2, 2)), nn.Linear(2, 2)
    state = {f"model.net.{n}": t for n, t in nn.Linear(2, 2).state_dict().items()}
    state |= {f"model_ema.net{n}": t for n, t in average.state_dict().items()}
    assert load_ema_checkpoint(teacher, state).prefix == "model_ema.net"
    assert_has_values(teacher, average.state_dict())
    tied, other = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    tied[1].weight, other[1].weight = tied[0].weight, other[0].weight
    teacher = EMANTeacher(tied)
    state = {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in other.named_parameters()}
    assert len(state) == 3
    load_ema_checkpoint(teacher, state)
    assert_has_values(teacher, other.state_dict())


class Shadow:
    """An average of a class that has no state_dict."""

    def __init__(self, tensors):
        self.tensors = tensors


UNRECOGNISED = {
    "object": lambda A, B: {"net": A, "ema": Shadow(B)},
    "objects in a list": lambda A, B: {"net": A, "emas": [Shadow(B)]},
    "other names": lambda A, B: {"net": A, "ema": {f"shadow.x{n}": t for n, t in B.items()}},
    "other names in a list": lambda A, B: {"net": A, "emas": [{f"x{n}": t for n, t in B.items()}]},
    "incomplete joined names": lambda A, B: (
        {f"net.{n}": t for n, t in A.items()} | {f"model_ema.{n}": t for n, t in list(joined(B).items())[1:]}
    ),
    "one vector": lambda A, B: {"net": A, "ema": torch.cat([t.flatten() for t in parameters_of(B)])},
    "a few names only": lambda A, B: {"net": A, "ema": {"0.weight": B["0.weight"]}},
    "no telling name": lambda A, B: {"net": A, "second": {f"p{i}": t for i, t in enumerate(parameters_of(B))}},
    "no telling name, buffers too": lambda A, B: {"net": A, "second": {f"p{i}": t for i, t in enumerate(B.values())}},
    "student, too": lambda A, B: {"student": A, "best": [Shadow(B)], "online": B},
    "two plain networks": lambda A, B: {"net": A, "second": B},
    "two plain networks in lists": lambda A, B: {"nets": [A, B]},
    "module without a telling name": lambda A, B: {"net": A, "second": module_of(B)},
}


@pytest.mark.parametrize("name", UNRECOGNISED)
def test_student_is_not_loaded_beside_something_that_could_be_the_average(student, teacher, name):
    before, average = copy.deepcopy(teacher.state_dict()), net().state_dict()
    state = UNRECOGNISED[name](student.state_dict(), average)
    with pytest.raises(ValueError, match=r"key=|prefix=") as error:
        load_ema_checkpoint(teacher, state)
    assert "othing was written" in str(error.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in teacher.state_dict().items())
    prefix = {"student, too": "student.", "two plain networks in lists": "nets.0."}.get(name, "net.")
    assert load_ema_checkpoint(teacher, state, prefix=prefix).prefix == prefix
    assert_has_values(teacher, student.state_dict())


def test_what_cannot_be_an_average_does_not_matter(student, teacher):
    optimizer = torch.optim.Adam(student.parameters())
    student(torch.randn(2, 3, 6, 6)).sum().backward(), optimizer.step()
    own = {"state": {0: {"ema_grad": torch.ones(3)}}, "param_groups": []}
    by_name = {f"state.{name}.exp_avg": torch.zeros_like(p) for name, p in student.named_parameters()}
    state = {
        "net": student.state_dict(), "optimizer": optimizer.state_dict(), "optimizers": [optimizer.state_dict()],
        "flat_optimizer": by_name, "own_optimizer": own,
        "ema": None, "ema_decay": 0.99, "ema_rate": torch.tensor([0.9]), "avg_losses": [0.1],
        "hyper_parameters": {"target": "mean", "use_ema": True, "momentum": [0.9, 0.99]}, "shadow": {}, "teacher": "x",
    }  # fmt: skip
    assert load_ema_checkpoint(teacher, state).prefix == "net."
    assert_has_values(teacher, student.state_dict())


class Averaging(nn.Linear):
    """A network whose own names have the words of an average."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_buffer("ema_codebook", torch.randn(3, 2))
        self.momentum_encoder = nn.Linear(2, 2)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_own_names_with_the_words_of_an_average(prefix):
    teacher, network = EMANTeacher(Averaging()), Averaging()
    found = load_ema_checkpoint(teacher, {f"{prefix}{n}": t for n, t in network.state_dict().items()})
    assert (found.layout, found.prefix) == ("a plain network", prefix)
    assert_has_values(teacher, network.state_dict())


def test_several_averages_are_chosen_by_index_key_or_prefix(student, teacher):
    averages = [net().state_dict() for _ in range(3)]
    edm2 = {"net": student.state_dict(), "ema": {"stds": [0.05, 0.1, 0.2], "emas": averages}}
    names = r"'ema\.emas\.0\.', 'ema\.emas\.1\.', 'ema\.emas\.2\.'"
    with pytest.raises(ValueError, match=rf"several parts .*{names}.*index="):
        load_ema_checkpoint(teacher, edm2)
    for selected, i in (
        ({"index": 0}, 0), ({"index": 1}, 1), ({"index": -1}, 2), ({"key": "ema.emas.1"}, 1), ({"key": "emas.2"}, 2),
        ({"prefix": "ema.emas.1."}, 1), ({"prefix": "emas.0"}, 0), ({"key": "ema", "index": 2}, 2),
    ):  # fmt: skip
        assert load_ema_checkpoint(teacher, edm2, **selected).prefix == f"ema.emas.{i}."
        assert_has_values(teacher, averages[i])
    for index in (3, -4):
        with pytest.raises(ValueError, match=rf"index is {index}, but the parts that match are {names}"):
            load_ema_checkpoint(teacher, edm2, index=index)
    lists = {"ema": [parameters_of(average) for average in averages]}  # improved-diffusion: a list per rate
    load_ema_checkpoint(teacher, lists, index=1)
    assert_has_values(teacher, {name: tensor for name, tensor in averages[1].items() if not is_buffer(name)})
    ours = EMANTeachers(net(), [0.9, 0.99])
    train_step(student)
    ours.update(student)
    assert load_ema_checkpoint(teacher, ours.state_dict(), index=1).step == 1
    assert_has_values(teacher, ours[1].module.state_dict())


def test_key_and_prefix(student, teacher):
    average = net().state_dict()
    flat = {f"actor.{n}": t for n, t in student.state_dict().items()} | {f"slow.{n}": t for n, t in average.items()}
    with pytest.raises(ValueError, match="several parts"):
        load_ema_checkpoint(teacher, {"state_dict": flat})
    for selected in ({"prefix": "slow."}, {"prefix": "state_dict.slow."}, {"key": "slow"}):
        assert load_ema_checkpoint(teacher, {"state_dict": flat}, **selected).prefix == "state_dict.slow."
        assert_has_values(teacher, average)
    for selected in ({"prefix": "low."}, {"prefix": ""}, {"key": "optimizer"}, {"key": "slow", "prefix": "actor."}):
        with pytest.raises(
            ValueError, match=r"nothing in the checkpoint under .* prefix='state_dict\.actor\.', prefix="
        ):
            load_ema_checkpoint(teacher, {"state_dict": flat}, **selected)
    both = {"model": student.state_dict(), "ema": average}
    assert load_ema_checkpoint(teacher, both, key="model").layout == "a plain network"
    assert_has_values(teacher, student.state_dict())
    # An average that does not match names the parts that do.
    with pytest.raises(ValueError, match=r"'ema\.' does not match .*(?s:.*)pass prefix='model\.'"):
        load_ema_checkpoint(teacher, both | {"ema": average | {"5.weight": torch.ones(2)}})
    names = {f"average.{n}": t for n, t in joined(average).items()} | {"average.queue": torch.ones(2)}
    with pytest.raises(ValueError, match="queue: missing from the teacher"):
        load_ema_checkpoint(teacher, names)


def schedules_from_zero():
    yield schedules.WarmUp(0.999)
    yield schedules.InverseGamma(0.9999)
    yield schedules.Average()
    yield schedules.CopyFirst(0.9)
    yield schedules.CopyFirst(0.9, updates=10_000)
    yield schedules.PowerFunction(0.1)
    yield schedules.Cosine(0.99, 100)
    yield lambda step: 0.0 if step < 3 else 0.999
    yield lambda step: [0.5, 0.9, 0.99][min(step, 2)]
    yield lambda step: [0.5, 0.9][step]  # raises for later steps
    yield lambda step: torch.cos(step)  # takes tensors only


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("momentum", schedules_from_zero(), ids=lambda momentum: type(momentum).__name__)
def test_schedule_needs_a_step(student, momentum, capturable):
    """Otherwise the first update would replace the loaded average."""
    teacher, average = EMANTeacher(net(), momentum, capturable=capturable), net().state_dict()
    before = copy.deepcopy(teacher.state_dict())
    for state in ({"state_dict": {f"ema.{n}": t for n, t in average.items()}}, average):
        with pytest.raises(ValueError, match=r"has no step, and the momentum .*Pass step=.*Nothing was written"):
            load_ema_checkpoint(teacher, state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
        teacher.step = 0
    assert load_ema_checkpoint(teacher, average, step=7).step == teacher.step == 7
    assert_has_values(teacher, average)
    teacher.step = 5  # the other remedy
    assert load_ema_checkpoint(teacher, average).step is None
    assert teacher.step == 5
    teacher.step = 0
    assert load_ema_checkpoint(teacher, average, step=0).step == teacher.step == 0, "explicitly from the start"


def test_loaded_average_survives_the_first_update(student):
    teacher, average = EMANTeacher(student, schedules.WarmUp(0.999)), net().state_dict()
    load_ema_checkpoint(teacher, {"ema": average}, step=100_000)
    teacher.update(student)
    expected = torch.lerp(student[0].weight, average["0.weight"], 0.999)
    torch.testing.assert_close(teacher.module[0].weight, expected)


@pytest.mark.parametrize(
    "momentum",
    [0.9, torch.tensor(0.9), schedules.Constant(0.9), schedules.HalfLife(100), lambda step: 0.9],
    ids=lambda momentum: type(momentum).__name__,
)
def test_constant_momentum_needs_no_step(student, momentum):
    teacher = EMANTeacher(net(), momentum)
    assert load_ema_checkpoint(teacher, student.state_dict()).step is None
    teacher.load_state_dict({f"module.{name}": tensor for name, tensor in student.state_dict().items()})
    assert teacher.step == 0


def test_step_of_the_file_and_of_the_caller(student):
    averaged = AveragedModel(student)
    averaged.update_parameters(student)
    teacher = EMANTeacher(net(), schedules.WarmUp(0.99))
    assert load_ema_checkpoint(teacher, averaged.state_dict()).step == teacher.step == 1
    assert load_ema_checkpoint(teacher, averaged.state_dict(), step=20).step == teacher.step == 20
    for step in (-1, 2.5):
        with pytest.raises(ValueError, match="whole number from 0"):
            load_ema_checkpoint(teacher, averaged.state_dict(), step=step)
    assert teacher.step == 20


def test_load_state_dict_without_a_step_warns_if_the_schedule_depends_on_it(student):
    state = {f"module.{name}": tensor for name, tensor in student.state_dict().items()}
    teacher = EMANTeacher(net(), schedules.WarmUp(0.99))
    with pytest.warns(UserWarning, match=r"no step \(_extra_state\).*WarmUp.*Set teacher.step"):
        teacher.load_state_dict(state)
    holder = nn.ModuleDict({"teacher": teacher})
    with pytest.warns(UserWarning, match=r"teacher\._extra_state"):
        holder.load_state_dict({f"teacher.{name}": tensor for name, tensor in state.items()})
    teacher.step = 4
    teacher.load_state_dict(state)
    assert teacher.step == 4
    teacher.load_state_dict(state | {"_extra_state": torch.tensor(0)})
    assert teacher.step == 0


def test_plain_network_as_the_teacher(student):
    """The teacher of eman_update_. Its step is only returned."""
    averaged, network = AveragedModel(student), net()
    averaged.update_parameters(student)
    for target in (network, nn.DataParallel(network)):
        nn.init.zeros_(network[0].weight)
        assert load_ema_checkpoint(target, averaged.state_dict()).step == 1
        for name, tensor in network.state_dict().items():
            assert_same_bits(tensor, student.state_dict()[name], name)
    eman_update_(network, student, 0.9)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(ValueError, match="othing was written"):
        load_ema_checkpoint(network, {"module.0.weight": torch.zeros(1)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert load_ema_checkpoint(network, averaged.state_dict(), step=6).step == 6


@pytest.mark.parametrize("wrap", [nn.Sequential, nn.DataParallel, AveragedModel, EMANTeacher])
def test_network_as_the_checkpoint(student, teacher, wrap):
    load_ema_checkpoint(teacher, wrap(student))
    assert_has_values(teacher, student.state_dict())


@pytest.mark.parametrize(
    "state",
    ["last.pt", Path("last.pt"), io.BytesIO(), None, 3, torch.ones(2), (t for t in ())],
    ids=lambda state: type(state).__name__,
)
def test_what_is_no_checkpoint(teacher, state):
    with pytest.raises(TypeError, match=r"must be a loaded checkpoint, but is a .*: pass torch\.load\(path"):
        load_ema_checkpoint(teacher, state)


def test_what_is_no_teacher(student):
    with pytest.raises(TypeError, match="an EMANTeacher or a network, but is a list"):
        load_ema_checkpoint(list(student.parameters()), student.state_dict())
    with pytest.raises(TypeError, match=r"teachers\[0\]"):
        load_ema_checkpoint(EMANTeachers(student, [0.9]), student.state_dict())


def test_objects_are_named_where_nothing_matches(teacher):
    with pytest.raises(ValueError, match=r"'ema' is a Shadow: pass the state_dict\(\) of the network"):
        load_ema_checkpoint(teacher, {"date": "today", "version": "8", "license": "", "ema": Shadow({})})


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
