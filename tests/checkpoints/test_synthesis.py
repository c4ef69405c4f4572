"""synthesize, against averages that were really tracked in float64 during the same run."""

import copy
import os
import re

import pytest
import torch
from conftest import ROOT, assert_same_bits
from safetensors.torch import save_file
from torch import nn

from eman_kernels import EMANTeacher, EMANTeachers, Snapshots, synthesize
from eman_kernels.checkpoints import folders
from eman_kernels.checkpoints.folders import StoredNetwork, read_folder
from eman_kernels.checkpoints.profiles import solve_coefficients
from eman_kernels.checkpoints.synthesis import find_reachable
from eman_kernels.schedules import PowerFunction

MOMENTA = [PowerFunction(0.05), PowerFunction(0.10)]
UPDATES, EVERY = 480, 30  # 16 snapshots
BETWEEN = UPDATES - EVERY // 2
TRACKED = (0.03, 0.07, 0.15, 0.2)


def net(hidden=12):
    return nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 2))


class Run:
    """A short training with snapshots in float16 and float32, the students' checkpoints, and tracked averages."""

    def __init__(self, folder):
        torch.manual_seed(0)
        student, target = net(), nn.Linear(4, 2)
        teachers = EMANTeachers(student, MOMENTA)
        self.half, self.single, self.students = folder / "half", folder / "single", folder / "students"
        self.students.mkdir()
        stores = [
            Snapshots(teachers, self.half, every=EVERY),
            Snapshots(teachers, self.single, every=EVERY, dtype=torch.float32),
        ]
        optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
        self.tracked = dict.fromkeys(TRACKED)
        self.at = {}  # step -> the two averages
        for step in range(UPDATES):
            inputs = torch.randn(16, 4)
            loss = nn.functional.mse_loss(student(inputs), target(inputs).abs())
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            teachers.update(student)
            for store in stores:
                store.store_if_due()
            state = {name: t.double() for name, t in student.state_dict().items() if t.is_floating_point()}
            for sigma_rel, average in self.tracked.items():
                momentum = PowerFunction(sigma_rel)(step)
                before = state if average is None else average
                self.tracked[sigma_rel] = {n: momentum * before[n] + (1 - momentum) * t for n, t in state.items()}
            if (step + 1) % EVERY == 0 or step + 1 == BETWEEN:
                self.at[step + 1] = [copy.deepcopy(teacher.module.state_dict()) for teacher in teachers]
            if (step + 1) % EVERY == 0:
                torch.save({"state_dict": student.state_dict()}, self.students / f"checkpoint-{step + 1}.pt")
        for store in stores:
            store.wait()
        self.student = student


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return Run(tmp_path_factory.mktemp("run"))


def largest_error(average, expected):
    return max(float((average[n] - t).norm() / t.norm()) for n, t in expected.items())


@pytest.mark.parametrize(("sigma_rel", "bound"), [(0.03, 0.02), (0.07, 1e-3), (0.15, 2e-3), (0.2, 3e-3)])
@pytest.mark.parametrize("dtype", ["half", "single"])
def test_close_to_the_average_that_was_tracked(sigma_rel, bound, dtype, run):
    average = synthesize(getattr(run, dtype), sigma_rel)
    assert largest_error(average, run.tracked[sigma_rel]) < bound
    # Much closer than the stored averages are.
    stored = [{n: t for n, t in state.items() if t.is_floating_point()} for state in run.at[UPDATES]]
    nearest = min(largest_error(state, run.tracked[sigma_rel]) for state in stored)
    assert largest_error(average, run.tracked[sigma_rel]) < nearest / 3


@pytest.mark.parametrize("step", [None, 240])
def test_a_stored_average_is_returned(step, run):
    for i, sigma_rel in enumerate((0.05, 0.10)):
        average = synthesize(run.single, sigma_rel, step=step)
        expected = run.at[step or UPDATES][i]
        assert average.keys() == expected.keys()
        for name, tensor in expected.items():
            assert average[name].dtype == tensor.dtype
            torch.testing.assert_close(average[name], tensor, rtol=1e-6, atol=1e-7)
            half = synthesize(run.half, sigma_rel, step=step)[name]
            torch.testing.assert_close(half, tensor, rtol=2**-11, atol=2**-25)


def test_the_result_is_the_state_dict_of_the_network(run):
    network = net()
    network.load_state_dict(synthesize(run.half, 0.07))
    assert network[1].num_batches_tracked == UPDATES


def test_counters_are_those_of_the_last_snapshot_that_takes_part(run):
    assert synthesize(run.half, 0.07, step=300)["1.num_batches_tracked"] == 300


def test_a_step_between_two_snapshots(run):
    """Closer than the nearest stored average, and with a warning."""
    with pytest.warns(UserWarning, match="profile would differ by 25% of its norm"):
        average = synthesize(run.single, 0.1, step=BETWEEN)
    assert average["1.num_batches_tracked"] == UPDATES
    expected = {name: t for name, t in run.at[BETWEEN][1].items() if t.is_floating_point()}
    nearest = min(largest_error(run.at[step][1], expected) for step in (UPDATES - EVERY, UPDATES))
    assert largest_error(average, expected) < 0.75 * nearest


def test_several_lengths_in_one_pass(run, monkeypatch):
    lengths = [0.05, 0.07, 0.1]
    single = [synthesize(run.half, length) for length in lengths]
    opened = []
    read = folders.StoredNetwork.tensors
    monkeypatch.setattr(folders.StoredNetwork, "tensors", lambda self: opened.append(self.path) or read(self))
    together = synthesize(run.half, lengths)
    assert len(opened) == len(set(opened)) == 32
    for one, other in zip(single, together, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-7)


def test_the_same_length_by_gamma_and_by_half_life(run):
    expected = synthesize(run.half, 0.07)
    gamma = PowerFunction(0.07).gamma
    half_life = UPDATES * (1 - 0.5 ** (1 / (gamma + 1)))
    for other in (synthesize(run.half, gamma=gamma), synthesize(run.half, half_life=half_life)):
        for name, tensor in expected.items():
            torch.testing.assert_close(other[name], tensor)
    assert len(synthesize(run.half, gamma=[3, 9])) == 2


def test_tensors_that_are_not_averaged(tmp_path):
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    teachers = EMANTeachers(student, MOMENTA, rules={"0.bias": "copy"})
    with Snapshots(teachers, tmp_path, every=1, dtype=torch.float32) as snapshots:
        for step in range(4):
            with torch.no_grad():
                student[0].bias.fill_(step)
                student[1].running_mean.fill_(step)
            teachers.update(student)
            snapshots.store_if_due()
    average = synthesize(tmp_path, 0.07)
    assert average["0.bias"].tolist() == [3.0] * 3
    assert average["0.bias"].dtype == average["1.running_mean"].dtype == torch.float64
    assert average["0.weight"].dtype == torch.float32
    # The mean of 0, 1, 2, 3 with the exact weights of the updates.
    gamma = PowerFunction(0.07).gamma
    mean = sum(k * ((k + 1) ** (gamma + 1) - k ** (gamma + 1)) for k in range(4)) / 4 ** (gamma + 1)
    assert average["1.running_mean"].tolist() == pytest.approx([mean] * 3, abs=0.02)


# ---------------------------------------------------------------- variances


def test_a_variance_is_not_negative(tmp_path):
    """A variance that falls from 1 to 1e-8: coefficients of both signs bring it below 0."""
    student = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    teachers = EMANTeachers(student, MOMENTA)
    with Snapshots(teachers, tmp_path, every=10, dtype=torch.float32) as snapshots:
        for step in range(80):
            with torch.no_grad():
                student[1].running_var.copy_(torch.tensor([1.0 if step < 30 else 1e-8, 1.0]))
            teachers.update(student)
            snapshots.store_if_due()
    networks, gamma = read_folder(tmp_path), PowerFunction(0.07).gamma
    coefficients, _ = solve_coefficients([n.step for n in networks], [n.gamma for n in networks], 80, [gamma])
    variances = torch.stack([dict(network.tensors())["1.running_var"] for network in networks])
    raw = float(coefficients[:, 0].float() @ variances[:, 0])
    assert -1e-3 < raw < 0
    with pytest.warns(UserWarning, match=r"1\.running_var: 1 of 2 variances were negative, down to -"):
        average = synthesize(tmp_path, 0.07)
    assert average["1.running_var"].tolist() == [0.0, pytest.approx(1)]


# ---------------------------------------------------------------- what cannot be made


def test_a_length_that_is_not_reachable(run):
    reason = r"0\.004 at step 480.* differ by \d\d% of its norm\. Within 5%: sigma_rel 0\.028 to 0\.2"
    with pytest.raises(ValueError, match=reason):
        synthesize(run.half, 0.004)
    with pytest.warns(UserWarning, match=r"sigma_rel 0\.02 at step 480: its profile would differ by 12% of its norm"):
        synthesize(run.half, 0.02)


def test_the_range_is_where_the_error_is_small(run):
    networks = read_folder(run.half)
    ((low, high),) = find_reachable(networks, UPDATES)
    lengths = [0.97 * low, low, high, min(1.03 * high, 0.288)]
    _, errors = solve_coefficients(
        [n.step for n in networks], [n.gamma for n in networks], UPDATES, [PowerFunction(s).gamma for s in lengths]
    )
    assert [error <= 0.05 for error in errors.tolist()] == [False, True, True, False]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "not none"),
        ({"sigma_rel": 0.1, "gamma": 9.0}, "not sigma_rel and gamma"),
        ({"sigma_rel": 0.3}, r"sigma_rel must be in \(0, 0\.2887\)"),
        ({"gamma": -1.0}, "gamma must be positive"),
        ({"half_life": 240}, "half_life must be"),
        ({"sigma_rel": 0.1, "step": 481}, "step is 481, but what is stored is of step 30 to 480"),
        ({"sigma_rel": 0.1, "step": 29}, "step is 29"),
    ],
)
def test_arguments_out_of_range(arguments, match, run):
    with pytest.raises(ValueError, match=match):
        synthesize(run.half, **arguments)


# ---------------------------------------------------------------- damaged folders


@pytest.fixture
def folder(run, tmp_path):
    for path in run.half.iterdir():
        os.link(path, tmp_path / path.name)
    return tmp_path


def test_a_missing_file_is_named_and_the_others_are_used(folder, run):
    (folder / "sigma_rel-0.1-step-000000240.safetensors").unlink()
    with pytest.warns(UserWarning, match=r"the snapshot with sigma_rel 0\.1 of step 240 is missing"):
        average = synthesize(folder, 0.07)
    assert largest_error(average, run.tracked[0.07]) < 2e-3


def test_a_truncated_file_is_named_and_the_others_are_used(folder, run):
    path = folder / "sigma_rel-0.1-step-000000240.safetensors"
    content = path.read_bytes()
    for length in (0, 4, len(content) // 2, len(content) - 1):
        path.unlink()
        path.write_bytes(content[:length])
        with pytest.warns(UserWarning, match="damaged|missing") as caught:
            average = synthesize(folder, 0.07)
        assert f"{path} is damaged" in str(caught[0].message)
        assert "of step 240 is missing" in str(caught[1].message)
        assert largest_error(average, run.tracked[0.07]) < 2e-3


def test_a_file_of_another_network(folder):
    other = EMANTeacher(net(13), PowerFunction(0.1))
    other.update(net(13))
    with Snapshots(other, folder / "other", every=1) as snapshots:
        snapshots.store()
    (path,) = (folder / "other").iterdir()
    path.rename(folder / path.name)
    with pytest.raises(ValueError, match=r"of another network.\n  0.bias: the shape is \(12,\) in .* and \(13,\)"):
        synthesize(folder, 0.07)


def test_a_checkpoint_among_snapshots(folder, run):
    save_file(net().state_dict(), folder / "checkpoint-10.safetensors")
    with pytest.raises(ValueError, match="use one folder for each kind"):
        synthesize(folder, 0.07)


def test_an_empty_folder_and_none(tmp_path):
    with pytest.raises(ValueError, match="no snapshots and no checkpoints"):
        synthesize(tmp_path, 0.1)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        synthesize(tmp_path / "none", 0.1)


# ---------------------------------------------------------------- a run's own checkpoints


def test_checkpoints_of_the_student(run):
    """The expected value: the profile's integral over each straight line between two checkpoints, by Simpson's rule."""
    average = synthesize(run.students, 0.1)
    gamma, n = PowerFunction(0.1).gamma, 2000
    states = [
        torch.load(run.students / f"checkpoint-{step}.pt")["state_dict"] for step in range(EVERY, UPDATES + 1, EVERY)
    ]
    points = torch.stack([state["0.weight"].double() for state in states])
    t = torch.linspace(0, 16, 16 * n + 1, dtype=torch.float64)
    place = (t - 1).clamp(min=0)
    low = place.floor().long().clamp(max=14)
    density = (gamma + 1) * (t / 16) ** gamma / 16
    line = points[low] + (place - low)[:, None, None] * (points[low + 1] - points[low])
    expected = torch.trapezoid(density[:, None, None] * line, t, dim=0)
    assert largest_error(average, {"0.weight": expected}) < 1e-6
    assert average["1.num_batches_tracked"] == UPDATES
    assert synthesize(run.students, 0.1, step=240)["1.num_batches_tracked"] == 240
    with pytest.raises(ValueError, match="there is no checkpoint of step 250"):
        synthesize(run.students, 0.1, step=250)


def test_lora_adapters_with_the_step_in_their_metadata(tmp_path):
    for i in range(1, 5):
        tensors = {"lora_A.weight": torch.full((2, 3), float(i)), "lora_A.alpha": torch.tensor(4.0)}
        name = f"adapter-{i:06}" if i < 4 else "adapter"  # the last one's name has no number
        save_file(tensors, tmp_path / f"{name}.safetensors", {"ss_steps": str(100 * i)})
    average = synthesize(tmp_path, 0.25)
    assert 1 < float(average["lora_A.weight"][0, 0]) < 4
    assert float(average["lora_A.alpha"]) == pytest.approx(4)


def test_checkpoints_without_a_step(tmp_path):
    torch.save(net().state_dict(), tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt: its name has no step, as in checkpoint-1000\.pt"):
        synthesize(tmp_path, 0.1)


def test_a_checkpoint_of_step_0_alone(tmp_path):
    torch.save(net().state_dict(), tmp_path / "checkpoint-0.pt")
    with pytest.raises(ValueError, match="step is 0, but what is stored is of step 0 to 0"):
        synthesize(tmp_path, 0.1)


def test_two_files_of_one_step(tmp_path):
    for name in ("a-100.pt", "b-100.pt"):
        torch.save(net().state_dict(), tmp_path / name)
    with pytest.raises(ValueError, match=r"a-100\.pt and .*b-100\.pt are both of step 100"):
        synthesize(tmp_path, 0.1)


def test_files_that_hold_no_network_are_left_out(run, tmp_path):
    for path in run.students.iterdir():
        os.link(path, tmp_path / path.name)
    optimizer = torch.optim.Adam(net().parameters())
    torch.save(optimizer.state_dict(), tmp_path / "optimizer-800.pt")
    torch.save({"state_dict": net()}, tmp_path / "pickled-800.pt")
    torch.save(torch.ones(3), tmp_path / "tensor-800.pt")
    with pytest.warns(UserWarning, match="left out") as caught:
        average = synthesize(tmp_path, 0.1)
    assert [str(w.message).split(": ")[0].rpartition("/")[2] for w in caught] == [
        "optimizer-800.pt holds no network. It is left out.",
        "pickled-800.pt cannot be loaded with weights_only=True",
        "tensor-800.pt holds no network. It is left out.",
    ]
    assert_same_bits(average["0.weight"], synthesize(run.students, 0.1)["0.weight"])


def test_a_folder_of_averages_of_unknown_length(tmp_path):
    teacher = EMANTeacher(net())
    teacher.update(net())
    torch.save(teacher.state_dict(), tmp_path / "teacher-1.pt")
    with pytest.raises(ValueError, match="an average of EMANTeacher, and its length is not known"):
        synthesize(tmp_path, 0.1)


# ---------------------------------------------------------------- ema-pytorch


def test_a_folder_of_ema_pytorch(tmp_path):
    """With the averages that it tracked, and with its own synthesis."""
    from ema_pytorch import PostHocEMA

    student = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    ours = EMANTeachers(student, [PowerFunction(0.05), PowerFunction(0.2), PowerFunction(0.12)])
    theirs = PostHocEMA(
        student,
        sigma_rels=(0.05, 0.2),
        update_every=1,
        checkpoint_every_num_steps=25,
        checkpoint_folder=str(tmp_path / "post-hoc"),
    )
    for _ in range(400):
        student(torch.randn(8, 4))
        with torch.no_grad():
            student[0].weight.add_(0.02 * torch.randn(6, 4))
        ours.update(student)
        theirs.update()
    average = synthesize(tmp_path / "post-hoc", 0.12, stored_sigma_rels=(0.05, 0.2))
    assert average.keys() == student.state_dict().keys()
    student.load_state_dict(average)
    tracked = ours[2].module.state_dict()
    own = theirs.synthesize_ema_model(sigma_rel=0.12).ema_model.state_dict()
    for name in ("0.weight", "1.running_mean", "1.running_var"):
        error, error_of_theirs = (
            float((x[name] - tracked[name]).norm() / tracked[name].norm()) for x in (average, own)
        )
        assert error < 0.02
        assert error < 1.5 * error_of_theirs
    with pytest.raises(ValueError, match="does not store the lengths of its averages: pass stored_sigma_rels="):
        synthesize(tmp_path / "post-hoc", 0.12)


def test_the_ranges_in_the_guide():
    rows = re.findall(r"^\| (\d+) \| (0\.\d{3}) to (0\.\d{3}) \|$", (ROOT / "docs" / "post-hoc.md").read_text(), re.M)
    assert [int(n) for n, _, _ in rows] == [4, 8, 16, 32, 64]
    for n, *interval in rows:
        steps = [1000 * (i + 1) / int(n) for i in range(int(n))]
        networks = [StoredNetwork(None, step, length, frozenset(), {}) for step in steps for length in (0.05, 0.1)]
        ((low, high),) = find_reachable(networks, 1000)
        assert [f"{low:.3f}", f"{high:.3f}"] == interval
