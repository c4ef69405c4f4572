"""The guide's pages by field: the loops of named projects, in our words or by the real library, against the line that
replaces them."""

import copy
import math
from importlib.util import find_spec

import pytest
import torch
import torchvision
from conftest import ROOT, assert_same_bits, examples
from torch import nn
from torch.optim.swa_utils import AveragedModel

from eman_kernels import EMANTeacher, EMANTeachers, ema_update_, eman_update_, load_ema_checkpoint, schedules

M = 0.99


def net(dtype=torch.float32):
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2)).to(dtype)


def pair(dtype=torch.float32):
    """A teacher, and a student that has moved away from it."""
    teacher = net(dtype)
    student = copy.deepcopy(teacher)
    change(student)
    return teacher.requires_grad_(False), student


def change(student):
    student(torch.randn(32, 4, dtype=next(student.parameters()).dtype) + 1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def difference(one, other):
    """The largest difference of two state dicts, relative to the mean of the tensor, without counters."""
    return max(
        ((one[name].double() - other[name].double()).abs().max() / other[name].double().abs().mean()).item()
        for name in one
        if one[name].is_floating_point()
    )


# ---------------------------------------------------------------- loops over two networks


@torch.no_grad()
def scale_and_add(teacher, student):
    """improved-diffusion, DiT, DINO, mean-teacher, stable-baselines3 without its second call."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.mul_(M).add_(s, alpha=1 - M)


@torch.no_grad()
def weighted_sum(teacher, student):
    """cleanrl, byol-pytorch, solo-learn, MoCo."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.copy_((1 - M) * s + M * t)


@torch.no_grad()
def copy_buffers(teacher, student):
    for t, s in zip(teacher.buffers(), student.buffers(), strict=True):
        t.copy_(s)


def with_copied_buffers(teacher, student):
    """FixMatch-pytorch, k-diffusion."""
    scale_and_add(teacher, student)
    copy_buffers(teacher, student)


def with_lerp(teacher, student):
    """EDM2."""
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.lerp_(s, 1 - M)
    copy_buffers(teacher, student)


@torch.no_grad()
def floats_of_the_state_dict(teacher, student):
    """YOLOX, yolov5."""
    followed = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        if tensor.is_floating_point():
            tensor *= M
            tensor += (1 - M) * followed[name]


# A loop, and the option that the guide's table gives for it.
LOOPS = [
    (scale_and_add, "skip"),
    (weighted_sum, "skip"),
    (with_copied_buffers, "copy"),
    (with_lerp, "copy"),
    (floats_of_the_state_dict, "ema"),
]


@pytest.mark.parametrize(("loop", "buffers"), LOOPS, ids=[loop.__name__ for loop, _ in LOOPS])
def test_a_loop_equals_the_line_that_replaces_it(loop, buffers):
    for dtype, most in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        teacher, student = pair(dtype)
        theirs, ours, other = (copy.deepcopy(teacher) for _ in range(3))
        for _ in range(3):
            loop(theirs, student)
            eman_update_(ours, student, M, buffers=buffers)
            eman_update_(other, student, M, buffers="copy" if buffers == "skip" else "skip")
            change(student)
        assert difference(ours.state_dict(), theirs.state_dict()) < most
        assert difference(other.state_dict(), theirs.state_dict()) > 0.1, "with another option the statistics differ"
        if loop is with_lerp:
            assert difference(ours.state_dict(), theirs.state_dict()) == 0
        if loop is not floats_of_the_state_dict:
            assert torch.equal(ours[1].num_batches_tracked, theirs[1].num_batches_tracked)


def test_mocos_key_encoder_needs_skip():
    query = torchvision.models.resnet18(num_classes=128)
    query.fc = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), query.fc)
    key = copy.deepcopy(query)
    query(torch.randn(4, 3, 32, 32))
    with torch.no_grad():
        for parameter in query.parameters():
            parameter += 0.1
    theirs, skipped, averaged = (copy.deepcopy(key) for _ in range(3))
    with torch.no_grad():
        for t, s in zip(theirs.parameters(), query.parameters(), strict=True):
            t.mul_(0.999).add_(s, alpha=1 - 0.999)
    eman_update_(skipped, query, 0.999, buffers="skip")
    eman_update_(averaged, query, 0.999)

    def differing(network):
        states = network.state_dict(), theirs.state_dict()
        return [name for name in states[0] if not torch.allclose(states[0][name].double(), states[1][name].double())]

    assert len(theirs.state_dict()) == 124
    assert differing(skipped) == []
    assert len(differing(averaged)) == 60
    assert skipped.training, "MoCo's key encoder normalizes with its own batch"
    text = " ".join((ROOT / "docs" / "switching.md").read_text().split())
    assert "60 of the 124 tensors of MoCo's key encoder" in text


# ---------------------------------------------------------------- averages kept by a class


class ShadowsWithWarmUp:
    """latent-diffusion's LitEma in our words: counted before use, the decay in float32."""

    def __init__(self, model, decay):
        self.decay, self.updates = torch.tensor(decay), 0
        self.shadows = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model):
        self.updates += 1
        weight = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, parameter in model.named_parameters():
            self.shadows[name].sub_(weight * (self.shadows[name] - parameter))


def test_litema():
    model = net()
    theirs = ShadowsWithWarmUp(model, M)
    ours = EMANTeacher(model, schedules.WarmUp(M), buffers="copy")
    ours.step = 1  # their first update is number 1
    for _ in range(5):
        change(model)
        theirs.update(model)
        ours.update(model)
    state = ours.module.state_dict()
    assert difference(theirs.shadows, state) < 1e-6
    evaluated = copy.deepcopy(model)  # with the shadows, and its own buffers
    evaluated.load_state_dict(model.state_dict() | theirs.shadows)
    images = torch.randn(3, 4)
    torch.testing.assert_close(ours(images), evaluated.eval()(images))

    exact = 1 - 0.9999
    assert ((1.0 - torch.tensor(0.9999)).item() - exact) / exact == pytest.approx(1.7e-4, rel=0.05)


def test_torch_ema():
    torch_ema = pytest.importorskip("torch_ema", reason="torch_ema is not installed: pip install '.[bench]'")
    model = net()
    theirs, ours = (
        torch_ema.ExponentialMovingAverage(model.parameters(), decay=M, use_num_updates=False) for _ in range(2)
    )
    for _ in range(5):
        change(model)
        theirs.update(model.parameters())
        ema_update_(ours.shadow_params, list(model.parameters()), M)
    for our, their in zip(ours.shadow_params, theirs.shadow_params, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-7)


def test_edm2():
    """Its rule: beta = (1 - batch_size / images so far) ** (gamma + 1), with lerp_."""
    model, batch_size, stds = net(), 256, (0.05, 0.10)
    theirs = [copy.deepcopy(model) for _ in stds]
    ours = EMANTeachers(model, momenta=[schedules.PowerFunction(std) for std in stds], buffers="copy")
    for step in range(1, 6):
        change(model)
        ours.update(model)
        for ema, teacher in zip(theirs, ours, strict=True):
            beta = (1 - batch_size / (step * batch_size)) ** (teacher.momentum.gamma + 1)
            with torch.no_grad():
                for t, s in zip(ema.parameters(), model.parameters(), strict=True):
                    t.lerp_(s, 1 - beta)
    for ema, teacher in zip(theirs, ours, strict=True):
        for our, their in zip(teacher.module.parameters(), ema.parameters(), strict=True):
            assert_same_bits(our, their)

    file = {"ema": {"stds": list(stds), "emas": [ema.state_dict() for ema in theirs]}}
    resumed = EMANTeachers(net(), momenta=[schedules.PowerFunction(std) for std in stds], buffers="copy")
    for index, teacher in enumerate(resumed):
        load_ema_checkpoint(teacher, file, index=index, step=1280 // batch_size)
        assert teacher.step == 5
        assert_same_bits(teacher.module[0].weight, theirs[index][0].weight)


def test_torchvisions_references():
    """They average counters too, in floating point, and truncate them."""
    model = net()
    theirs = AveragedModel(model, avg_fn=lambda t, s, n: M * t + (1 - M) * s, use_buffers=True)
    names = {"torch": torch, "model": model, "update": None}
    (block,) = [b for b in examples((ROOT / "docs" / "fine-tuning.md").read_text()) if "integrations" in b]
    exec(block.replace("0.999", str(M)), names)  # it updates once
    ours = names["model_ema"]
    theirs.update_parameters(model)
    for _ in range(5):
        change(model)
        theirs.update_parameters(model)
        ours.update_parameters(model)
    assert difference(ours.module.state_dict(), theirs.module.state_dict()) < 1e-6
    assert ours.module[1].num_batches_tracked == 5
    assert theirs.module[1].num_batches_tracked < 5


def test_a_class_with_shadows_is_evaluated_with_the_models_buffers():
    """TorchSSL: the averaged parameters are put into the model, whose buffers stay."""
    model = net()
    shadows = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = EMANTeacher(model, M, buffers="copy")
    for _ in range(3):
        change(model)
        shadows = {name: (1.0 - M) * p.detach() + M * shadows[name] for name, p in model.named_parameters()}
        average.update(model)
    evaluated = copy.deepcopy(model).eval()
    evaluated.load_state_dict(model.state_dict() | shadows)
    images = torch.randn(3, 4)
    expected = evaluated(images)
    torch.testing.assert_close(average(images), expected)
    model.eval()
    with average.swapped(model):
        torch.testing.assert_close(model(images), expected)


# ---------------------------------------------------------------- reinforcement learning


def blocks_of(library):
    """The examples of the page that need a library, after those that need none."""
    page = examples((ROOT / "docs" / "reinforcement-learning.md").read_text())
    return [b for b in page if library in b or not any(name in b for name in ("stable_baselines3", "torchrl"))]


def test_stable_baselines3(monkeypatch):
    sb3 = pytest.importorskip("stable_baselines3", reason="stable_baselines3 is not installed: pip install '.[test]'")
    dqn = pytest.importorskip("stable_baselines3.dqn.dqn")
    their_update = dqn.polyak_update

    def train():
        options = {"learning_starts": 20, "train_freq": 1, "target_update_interval": 1, "tau": 0.05}
        return sb3.DQN("MlpPolicy", "CartPole-v1", seed=0, device="cpu", **options).learn(60)

    theirs = train()
    monkeypatch.setattr(dqn, "polyak_update", their_update)  # restored afterwards
    scope = {}
    for block in blocks_of("stable_baselines3"):
        exec(block, scope)
    assert dqn.polyak_update is scope["polyak_update"]
    ours = train()
    for our, their in ((ours.q_net, theirs.q_net), (ours.q_net_target, theirs.q_net_target)):
        assert difference(our.state_dict(), their.state_dict()) < 1e-4
    assert difference(ours.q_net_target.state_dict(), ours.q_net.state_dict()) > 1e-3
    network = copy.deepcopy(ours.q_net_target)
    found = load_ema_checkpoint(network, ours.policy.state_dict())
    assert found.prefix == "q_net_target."

    # The second call, with tau=1, copies the statistics exactly.
    target, online = torch.zeros(3), torch.tensor([0.1, torch.inf, -3.0])
    dqn.polyak_update([online], [target], 1.0)
    assert torch.equal(target, online)


@pytest.mark.skipif(find_spec("torchrl") is None, reason="torchrl is not installed: pip install torchrl")
@pytest.mark.filterwarnings("ignore")  # torchrl's own
def test_torchrl():
    from torchrl.data import OneHot
    from torchrl.modules import QValueActor
    from torchrl.objectives import DQNLoss, SoftUpdate

    scope = {}
    for block in blocks_of("torchrl"):
        exec(block, scope)
    network, averages = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), []
    for kind in (SoftUpdate, scope["FusedSoftUpdate"]):
        torch.manual_seed(0)
        actor = QValueActor(copy.deepcopy(network), in_keys=["observation"], spec=OneHot(2))
        loss = DQNLoss(actor, action_space=OneHot(2), delay_value=True)
        updater = kind(loss, tau=0.1)
        for _ in range(5):
            for value in loss.value_network_params.values(True, True):
                if value.is_floating_point():
                    value.data.add_(torch.randn_like(value))
            updater.step()
        averages.append({name: value.clone() for name, value in loss.target_value_network_params.items(True, True)})
    for name, value in averages[0].items():
        assert_same_bits(averages[1][name], value, str(name))


def test_a_hard_update_copies():
    teacher, student = pair()
    eman_update_(teacher, student, 0.0)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, student.state_dict()[name]), name


# ---------------------------------------------------------------- files


def prefixed(prefix, network):
    return {prefix + name: tensor for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("project", ["MoCo", "DINO", "I-JEPA", "byol-pytorch", "FixMatch-pytorch"])
def test_the_average_is_found_in_the_files_of_the_pages(project):
    average, student = pair()
    both = prefixed("module.encoder_q.", student) | prefixed("module.encoder_k.", average)
    online, target = prefixed("online_encoder.net.", student), prefixed("target_encoder.net.", average)
    files = {
        "MoCo": {"epoch": 1, "arch": "resnet50", "state_dict": both | {"module.queue": torch.zeros(2, 8)}},
        "DINO": {"student": prefixed("module.backbone.", student), "teacher": prefixed("backbone.", average)},
        "I-JEPA": {"encoder": prefixed("module.", student), "target_encoder": prefixed("module.", average)},
        "byol-pytorch": prefixed("net.", student) | online | target,
        "FixMatch-pytorch": {"state_dict": student.state_dict(), "ema_state_dict": average.state_dict()},
    }
    teacher = EMANTeacher(net())
    load_ema_checkpoint(teacher, files[project])
    for name, tensor in teacher.module.state_dict().items():
        assert_same_bits(tensor, average.state_dict()[name], name)


# ---------------------------------------------------------------- what the guide says about numbers


def train_byol(update, dtype, steps):
    """A small BYOL on noise. Returns the state of teacher and student."""
    torch.manual_seed(0)
    student = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16)),
    ).to(dtype)
    teacher = copy.deepcopy(student).requires_grad_(False)
    predictor = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16)).to(dtype)
    optimizer = torch.optim.SGD([*student.parameters(), *predictor.parameters()], lr=0.5, momentum=0.9)
    noise = torch.Generator().manual_seed(1)
    for _ in range(steps):
        images = torch.randn(16, 3, 8, 8, generator=noise)
        views = [(images + 0.3 * torch.randn(images.shape, generator=noise)).to(dtype) for _ in range(2)]
        with torch.no_grad():
            keys = teacher(views[1])
        loss = 2 - 2 * nn.functional.cosine_similarity(predictor(student(views[0])), keys).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update(teacher, student)
    return {f"{i}.{name}": t for i, n in enumerate((teacher, student)) for name, t in n.state_dict().items()}


def replaced(teacher, student):
    eman_update_(teacher, student, M, buffers="skip")


def test_a_teacher_that_trains_its_student_drifts_as_after_any_change_of_rounding():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        original, ours, reordered = (
            train_byol(update, torch.float32, 300) for update in (weighted_sum, replaced, scale_and_add)
        )
        exact = [train_byol(update, torch.float64, 300) for update in (weighted_sum, replaced)]
    finally:
        torch.set_num_threads(threads)
    # After one step it is 2e-7.
    assert difference(ours, original) > 1e-6
    assert difference(reordered, original) > 1e-6, "the same formula in another order"
    assert difference(*exact) < 1e-9


def test_the_weight_of_the_first_model_after_a_short_training():
    assert pytest.approx(0.37, abs=0.005) == 0.999**1000
    teacher = EMANTeacher(nn.Linear(1, 1, bias=False, dtype=torch.float64), 0.999)
    nn.init.ones_(teacher.module.weight)
    student = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(student.weight)
    for _ in range(1000):
        teacher.update(student)
    assert teacher.module.weight.item() == pytest.approx(math.exp(1000 * math.log(0.999)))
