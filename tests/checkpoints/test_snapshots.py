"""Snapshots: what is stored and when, and what is left of a run that was killed, resumed or changed."""

import copy
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same_bits
from processes import World, why_none
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from eman_kernels import EMANTeacher, EMANTeachers, Snapshots, checkpoints
from eman_kernels.checkpoints import snapshots as snapshots_module
from eman_kernels.checkpoints.folders import read_folder
from eman_kernels.schedules import CopyFirst, PowerFunction

MOMENTA = [PowerFunction(0.05), PowerFunction(0.10)]


def net(hidden=6):
    return nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, 2))


def train_step(student):
    student.train()
    student(torch.randn(8, 4))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def run(student, teachers, snapshots, updates):
    for _ in range(updates):
        train_step(student)
        teachers.update(student)
        snapshots.store_if_due()
    snapshots.wait()


def steps(folder):
    return [(network.sigma_rel, network.step) for network in read_folder(folder)]


def both(*steps):
    return [(sigma_rel, step) for step in steps for sigma_rel in (0.05, 0.1)]


@pytest.fixture
def student():
    return net()


@pytest.fixture
def teachers(student):
    return EMANTeachers(student, MOMENTA)


# ---------------------------------------------------------------- what is stored


def test_a_snapshot_holds_the_averages(student, teachers, tmp_path):
    run(student, teachers, Snapshots(teachers, tmp_path, every=3), 7)
    assert steps(tmp_path) == both(3, 6)
    snapshots = Snapshots(teachers, tmp_path / "a run" / "now", every=100)
    snapshots.store()
    snapshots.wait()
    for teacher, sigma_rel in zip(teachers, (0.05, 0.1), strict=True):
        path = tmp_path / "a run" / "now" / f"sigma_rel-{sigma_rel}-step-000000007.safetensors"
        stored = load_file(path)
        for name, tensor in teacher.module.state_dict().items():
            is_parameter = name in dict(student.named_parameters())
            assert_same_bits(stored.pop(name), tensor.half() if is_parameter else tensor, name)
        assert not stored
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "step": "7", "sigma_rel": repr(sigma_rel), "copied": "[]"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype, student, teachers, tmp_path):
    run(student, teachers, Snapshots(teachers, tmp_path, every=2, dtype=dtype), 2)
    for network in read_folder(tmp_path):
        kinds = {name: tensor.dtype for name, tensor in network.tensors()}
        assert kinds["0.weight"] == kinds["1.bias"] == dtype
        assert (kinds["1.running_var"], kinds["1.num_batches_tracked"]) == (torch.float32, torch.int64)


def test_a_parameter_that_float16_cannot_hold_is_stored_in_float32(student, teachers, tmp_path):
    with torch.no_grad():
        student[0].weight[0, 0] = 1e5
        student[0].bias[0] = torch.inf
        student[1].weight.mul_(1e-6)
        student[1].bias[0] = 1e-9  # the others are 0
        student[2].weight[0, 0] = 1e-9
    teachers.update(student)
    with Snapshots(teachers, tmp_path, every=1) as snapshots:
        snapshots.store()
    stored = dict(read_folder(tmp_path)[0].tensors())
    kept = {name for name, parameter in student.named_parameters() if stored[name].dtype == parameter.dtype}
    assert kept == {"0.weight", "1.weight", "1.bias"}
    for name in kept:
        assert_same_bits(stored[name], teachers[0].module.get_parameter(name))


def test_tensors_that_are_not_averaged_are_named(tmp_path):
    student = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4))
    teachers = EMANTeachers(student, MOMENTA, rules={"1.weight": "copy", "1.bias": "skip"})
    run(student, teachers, Snapshots(teachers, tmp_path, every=2), 2)
    (first, _) = read_folder(tmp_path)
    vectors = {f"0.parametrizations.weight.0._{which}" for which in "uv"}
    assert first.copied == {"1.weight", "1.bias", *vectors}
    assert dict(first.tensors())["1.weight"].dtype == torch.float32


def test_tied_weights_are_stored_under_each_name(tmp_path):
    student = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    student["head"].weight = student["embed"].weight
    teacher = EMANTeacher(student, PowerFunction(0.1))
    teacher.update(student)
    with Snapshots(teacher, tmp_path, every=1) as snapshots:
        snapshots.store()
    stored = dict(read_folder(tmp_path)[0].tensors())
    for name in ("embed.weight", "head.weight"):
        assert_same_bits(stored[name], student["embed"].weight.half())


def test_a_swapped_teacher_is_stored_with_its_own_values(student, teachers, tmp_path):
    teachers.update(student)
    train_step(student)
    with Snapshots(teachers, tmp_path, every=1) as snapshots, teachers.swapped(0, student):
        snapshots.store()
    stored = dict(read_folder(tmp_path)[0].tensors())
    assert_same_bits(stored["0.weight"], teachers[0].module[0].weight.half())


def test_the_training_continues_while_a_snapshot_is_written(student, teachers, tmp_path, monkeypatch):
    may_write, write = threading.Event(), snapshots_module.write_network

    def wait_and_write(*args):
        assert may_write.wait(30)
        write(*args)

    monkeypatch.setattr(snapshots_module, "write_network", wait_and_write)
    teachers.update(student)
    expected = copy.deepcopy(teachers[0].module.state_dict())
    snapshots = Snapshots(teachers, tmp_path, every=1)
    snapshots.store()
    for _ in range(3):
        train_step(student)
        teachers.update(student)
    assert steps(tmp_path) == []
    may_write.set()
    snapshots.wait()
    stored = dict(read_folder(tmp_path)[0].tensors())
    for name, tensor in expected.items():
        assert_same_bits(stored[name], tensor.to(stored[name].dtype), name)


# ---------------------------------------------------------------- when


def test_after_follow_with_skipped_steps(student, teachers, tmp_path):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    teachers.follow(optimizer, student, every=2)
    snapshots = Snapshots(teachers, tmp_path, every=5)
    for _ in range(21):
        student(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        snapshots.store_if_due()
    snapshots.wait()
    assert steps(tmp_path) == both(5, 10)


def test_a_step_on_the_device_is_read_only_when_a_snapshot_may_be_due(student, tmp_path, monkeypatch):
    teachers = EMANTeachers(student, MOMENTA, capturable=True)
    snapshots = Snapshots(teachers, tmp_path, every=10)
    teachers.update(student)
    snapshots.store_if_due()
    reads, looks, read = [], [], torch.Tensor.__int__
    for update in range(2, 32):
        # Two of these 30 updates are skipped, as by GradScaler.
        teachers.update(student, found_inf=torch.tensor(float(update in (3, 15))))
        reads.clear()
        monkeypatch.setattr(torch.Tensor, "__int__", lambda tensor: reads.append(0) or read(tensor))
        snapshots.store_if_due()
        monkeypatch.undo()
        if reads:
            looks.append((update, teachers[0].step))
    snapshots.wait()
    assert steps(tmp_path) == both(10, 20)
    assert looks == [(10, 9), (11, 10), (21, 19), (22, 20)]


def test_several_updates_between_calls(student, teachers, tmp_path):
    snapshots = Snapshots(teachers, tmp_path, every=4)
    for _ in range(4):
        for _ in range(3):
            teachers.update(student)
        snapshots.store_if_due()
    snapshots.wait()
    assert steps(tmp_path) == both(6, 9, 12)


def test_one_teacher_and_copy_first(student, tmp_path):
    teacher = EMANTeacher(student, CopyFirst(PowerFunction(0.1)))
    run(student, teacher, Snapshots(teacher, tmp_path, every=2), 4)
    assert steps(tmp_path) == [(0.1, 2), (0.1, 4)]


def test_keep_limits_the_number_of_steps(student, teachers, tmp_path):
    run(student, teachers, Snapshots(teachers, tmp_path, every=1, keep=8), 40)
    kept = sorted({step for _, step in steps(tmp_path)})
    assert (len(kept), kept[-1]) == (8, 40)
    assert steps(tmp_path) == both(*kept)
    low, high = checkpoints.synthesis.find_reachable(read_folder(tmp_path), 40)[0]
    evenly = fake_folder([5, 10, 15, 20, 25, 30, 35, 40])
    even_low, even_high = checkpoints.synthesis.find_reachable(evenly, 40)[0]
    assert high / low > 0.95 * even_high / even_low


def fake_folder(steps):
    stored = checkpoints.folders.StoredNetwork
    return [stored(Path(), step, sigma_rel, frozenset(), {}) for step in steps for sigma_rel in (0.05, 0.1)]


# ---------------------------------------------------------------- interrupted and resumed runs


def test_a_resumed_run_continues_the_folder(student, teachers, tmp_path):
    run(student, teachers, Snapshots(teachers, tmp_path, every=3), 6)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    resumed_student, resumed = copy.deepcopy(student), EMANTeachers(student, MOMENTA)
    snapshots = Snapshots(resumed, tmp_path, every=3)
    resumed.load_state_dict(teachers.state_dict())
    snapshots.store_if_due()  # at step 6, which is stored
    run(resumed_student, resumed, snapshots, 3)
    assert steps(tmp_path) == both(3, 6, 9)
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.parametrize("damaged", [False, True])
def test_a_lost_half_of_a_snapshot_is_stored_on_resuming(damaged, student, teachers, tmp_path):
    run(student, teachers, Snapshots(teachers, tmp_path, every=3), 3)
    lost = tmp_path / "sigma_rel-0.1-step-000000003.safetensors"
    expected = {name: tensor.clone() for name, tensor in load_file(lost).items()}  # load_file maps the file
    if damaged:
        os.truncate(lost, lost.stat().st_size - 10)
        with pytest.warns(UserWarning, match=f"{lost} is damaged"):
            resume_at_a_stored_step(teachers, tmp_path)
    else:
        lost.unlink()
        resume_at_a_stored_step(teachers, tmp_path)
    stored = load_file(lost)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())


def resume_at_a_stored_step(teachers, folder):
    with Snapshots(teachers, folder, every=3) as snapshots:
        snapshots.store_if_due()


def test_a_run_that_resumes_from_before_a_snapshot_replaces_it(student, teachers, tmp_path):
    start = copy.deepcopy(teachers)
    run(student, teachers, Snapshots(teachers, tmp_path, every=2), 4)
    snapshots = Snapshots(start, tmp_path, every=2)
    with pytest.warns(UserWarning, match="has snapshots up to step 4, and the teachers are at step 1"):
        run(student, start, snapshots, 2)
    assert steps(tmp_path) == both(2, 4)
    stored = dict(read_folder(tmp_path)[0].tensors())
    assert_same_bits(stored["0.weight"], start[0].module[0].weight.half())


KILLED = """
import os, signal, sys
import safetensors.torch
from torch import nn
from eman_kernels import EMANTeachers, Snapshots, schedules

student = nn.Linear(4, 4)
teachers = EMANTeachers(student, [schedules.PowerFunction(0.05), schedules.PowerFunction(0.1)])
snapshots = Snapshots(teachers, sys.argv[1], every=1)
teachers.update(student)
snapshots.store_if_due()
snapshots.wait()
save, written = safetensors.torch.save_file, []

def save_until_killed(tensors, path, metadata):
    save(tensors, path, metadata)
    written.append(path)
    if len(written) == 2:
        os.truncate(path, os.stat(path).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

safetensors.torch.save_file = save_until_killed
teachers.update(student)
snapshots.store_if_due()
snapshots.wait()
"""


def test_a_run_killed_while_it_writes_leaves_no_half_file(tmp_path):
    """Killed in the middle of the second file of step 2."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.glob("*.tmp"))) == 1
    assert steps(tmp_path) == [*both(1), (0.05, 2)]
    student = nn.Linear(4, 4)
    teachers = EMANTeachers(student, MOMENTA)
    for _ in range(2):
        teachers.update(student)
    with Snapshots(teachers, tmp_path, every=1) as snapshots:
        assert not list(tmp_path.glob("*.tmp"))
        snapshots.store_if_due()
    assert steps(tmp_path) == both(1, 2)


def test_a_failed_write_is_raised(student, teachers, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshots_module, "write_network", fail)
    teachers.update(student)
    snapshots = Snapshots(teachers, tmp_path, every=1)
    snapshots.store()
    with pytest.raises(OSError, match="No space left"):
        snapshots.store()
    monkeypatch.undo()
    with snapshots:
        snapshots.store()
    assert steps(tmp_path) == both(1)


# ---------------------------------------------------------------- errors


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (
            lambda: EMANTeachers(net(), [PowerFunction(0.05), PowerFunction(0.2)]),
            r"has sigma_rel 0.1, and the teachers",
        ),
        (
            lambda: EMANTeachers(net(7), MOMENTA),
            r"another network.\n  0.bias: the shape is \(7,\) in the teachers and \(6,",
        ),
        (lambda: EMANTeachers(net().append(nn.Linear(2, 2)), MOMENTA), r"3.bias: only in the teachers"),
    ],
)
def test_a_folder_of_another_run(other, match, student, teachers, tmp_path):
    run(student, teachers, Snapshots(teachers, tmp_path, every=2), 2)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=match):
        Snapshots(other(), tmp_path, every=2)
    assert contents(tmp_path) == before


def test_a_folder_of_checkpoints(teachers, student, tmp_path):
    torch.save(student.state_dict(), tmp_path / "checkpoint-10.pt")
    with pytest.raises(ValueError, match=r"checkpoint-10\.pt is no snapshot"):
        Snapshots(teachers, tmp_path, every=2)


@pytest.mark.parametrize("momentum", [0.999, CopyFirst(PowerFunction(0.1), 2), CopyFirst(0.9)])
def test_other_schedules(momentum, student, tmp_path):
    with pytest.raises(ValueError, match=r"only if the momentum is a schedules\.PowerFunction, but it is"):
        Snapshots(EMANTeacher(student, momentum), tmp_path, every=1)


def test_equal_lengths(student, tmp_path):
    with pytest.raises(ValueError, match="lengths must differ"):
        Snapshots(EMANTeachers(student, [PowerFunction(0.1)] * 2), tmp_path, every=1)


@pytest.mark.parametrize("arguments", [{"every": 0}, {"every": 1, "keep": 1}, {"every": 1, "dtype": torch.int8}])
def test_arguments_out_of_range(arguments, teachers, tmp_path):
    with pytest.raises(ValueError, match="must be"):
        Snapshots(teachers, tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_before_the_first_update(teachers, tmp_path):
    snapshots = Snapshots(teachers, tmp_path, every=1)
    snapshots.store_if_due()
    with pytest.raises(ValueError, match="have not been updated yet"):
        snapshots.store()


def test_teachers_that_are_not_updated_together(student, tmp_path):
    teachers = [EMANTeacher(student, momentum) for momentum in MOMENTA]
    teachers[0].update(student)
    with pytest.raises(ValueError, match=r"same number of updates, but have had \[1, 0\]"):
        Snapshots(teachers, tmp_path, every=1).store()


def test_without_safetensors(teachers, tmp_path, monkeypatch):
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'eman_kernels\[posthoc\]'"):
        Snapshots(teachers, tmp_path, every=1)


# ---------------------------------------------------------------- several processes


def store_in_each_process(folder, sharded):
    """Returns rank 0's first average, whole."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    student = net()
    teachers = [EMANTeacher(student, momentum) for momentum in MOMENTA]
    if sharded:
        mesh = dist.init_device_mesh("cpu", (2,))
        for network in (student, *(teacher.module for teacher in teachers)):
            fully_shard(network, mesh=mesh)
    with Snapshots(teachers, Path(folder, str(dist.get_rank())), every=1) as snapshots:
        for teacher in teachers:
            teacher.update(student)
        snapshots.store_if_due()
        snapshots.store()
    dist.barrier()
    state = teachers[0].module.state_dict()
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for name, t in state.items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("sharded", [False, True])
def test_rank_0_writes_whole_tensors(sharded, tmp_path):
    if reason := why_none("gloo", 2):
        pytest.skip(reason)
    world = World("gloo", 2, tmp_path)
    try:
        expected, _ = world.run(store_in_each_process, str(tmp_path / "snapshots"), sharded)
    finally:
        world.stop()
    (folder,) = (tmp_path / "snapshots").iterdir()
    assert (folder.name, steps(folder)) == ("0", both(1))
    stored = dict(read_folder(folder)[0].tensors())
    assert stored.keys() == expected.keys()
    for name, tensor in expected.items():
        is_parameter = name in dict(net().named_parameters())
        assert_same_bits(stored[name], tensor.half() if is_parameter else tensor, name)


def save_a_teacher_of_fsdp1(folder):
    from torch.distributed.fsdp import FullyShardedDataParallel

    student = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    module = FullyShardedDataParallel(net(), device_id=torch.device("cpu"))
    teacher = EMANTeacher(student, PowerFunction(0.1), module=module)
    with pytest.raises(ValueError, match="snapshots of networks of FSDP1 are not supported"):
        Snapshots(teacher, folder, every=1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fsdp1_is_refused(tmp_path):
    if reason := why_none("gloo", 2):
        pytest.skip(reason)
    world = World("gloo", 2, tmp_path)
    try:
        world.run(save_a_teacher_of_fsdp1, str(tmp_path / "snapshots"))
    finally:
        world.stop()
    assert not (tmp_path / "snapshots").exists()


@pytest.mark.cuda
def test_replays_of_a_captured_graph(tmp_path):
    student = net().cuda()
    teachers = EMANTeachers(student, MOMENTA, capturable=True)
    teachers.update(student)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        teachers.update(student)
    snapshots = Snapshots(teachers, tmp_path, every=4)
    for _ in range(10):
        graph.replay()
        snapshots.store_if_due()
    snapshots.wait()
    assert steps(tmp_path) == both(4, 8)
