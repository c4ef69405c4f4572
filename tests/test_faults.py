"""External failures: damaged or foreign checkpoints, memory that runs out, and killed processes. An update that fails
changes nothing."""

import io
import os
import signal
import time
import zipfile
from datetime import timedelta
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from conftest import assert_same_bits
from processes import World, why_none
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from eman_kernels import EMANTeacher, EMANTeachers, available_backends

MAKERS = {
    "one": lambda student: EMANTeacher(student, 0.5),
    "on the device": lambda student: EMANTeacher(student, 0.5, capturable=True),
    "several": lambda student: EMANTeachers(student, [0.5, 0.9]),
}


def network(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 4), nn.Linear(4, 4))


@pytest.fixture
def student():
    return network()


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def teacher(request, student):
    teacher = request.param(student)
    move(student)
    teacher.update(student)
    return teacher


def move(net):
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.normal_() if tensor.is_floating_point() else tensor.random_(0, 100)


def state(module):
    """The module's tensors, their values and the step, none of which may change."""
    tensors = [*module.parameters(), *module.buffers()]
    steps = [child.step for child in module.modules() if isinstance(child, EMANTeacher)]
    return [id(tensor) for tensor in tensors], [tensor.detach().clone() for tensor in tensors], steps


def assert_state(module, expected):
    ids, values, steps = state(module)
    assert (ids, steps) == (expected[0], expected[2])
    for value, want in zip(values, expected[1], strict=True):
        assert_same_bits(value, want)


def saved(module):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.getvalue()


# ---------------------------------------------------------------- checkpoints


def another_width(teacher, checkpoint):
    """The last layers fit, so a naive load would copy them before it refuses the others."""
    wider = MAKERS["several" if isinstance(teacher, EMANTeachers) else "one"](network(width=9))
    wider.update(network(width=9))
    return wider.state_dict()


def one_less(teacher, checkpoint):
    return dict(list(checkpoint.items())[:-1])


def one_more(teacher, checkpoint):
    return checkpoint | {"module.more": torch.zeros(3)}


def no_tensor(teacher, checkpoint):
    return checkpoint | {next(reversed(checkpoint)): "text"}


def a_wrong_step(teacher, checkpoint):
    """The step is loaded first and refused; the previous state stays."""
    name = next(name for name in checkpoint if name.endswith("_extra_state"))
    return checkpoint | {name: torch.tensor(-3)}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("wrong", [another_width, one_less, one_more, no_tensor, a_wrong_step])
def test_a_checkpoint_of_another_model_changes_nothing(teacher, student, wrong, assign):
    later = torch.load(io.BytesIO(saved(teacher)))
    move(student)
    teacher.update(student)
    before = state(teacher)
    with pytest.raises(
        (RuntimeError, ValueError), match=r"size mismatch|Missing key|Unexpected key|While copying|step|expected"
    ):
        teacher.load_state_dict(wrong(teacher, later), assign=assign)
    assert_state(teacher, before)
    teacher.update(student)
    assert state(teacher)[2] == [step + 1 for step in before[2]]


def test_a_refused_load_writes_back_only_what_it_has_written(student):
    """A tensor that it has not written keeps its version, so that autograd does not take it for changed."""
    teacher = EMANTeacher(student, 0.5)
    before, bias = state(teacher), teacher.module[3].bias
    version = bias._version
    wrong = {name: tensor + 1 for name, tensor in teacher.state_dict().items()} | {"module.3.bias": torch.zeros(77)}
    with pytest.raises(RuntimeError, match=r"size mismatch for module\.3\.bias"):
        teacher.load_state_dict(wrong)
    assert_state(teacher, before)
    assert bias._version == version


def test_a_refused_load_restores_inference_tensors(student):
    """They have no versions to compare."""
    with torch.inference_mode():
        teacher = EMANTeacher(student, 0.5)
        before = state(teacher)
        wrong = {name: tensor + 1 for name, tensor in teacher.state_dict().items()} | {"module.3.bias": torch.zeros(77)}
        with pytest.raises(RuntimeError, match=r"size mismatch for module\.3\.bias"):
            teacher.load_state_dict(wrong)
        assert teacher.module[0].weight.is_inference()
        assert_state(teacher, before)


def load(teacher, checkpoint):
    """Load as the README recommends: torch.load verifies no checksum and would accept a flipped bit in a weight."""
    assert zipfile.ZipFile(io.BytesIO(checkpoint)).testzip() is None
    teacher.load_state_dict(torch.load(io.BytesIO(checkpoint)))


@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.9, 0.99, 0.999])
def test_a_truncated_checkpoint_is_refused(teacher, left):
    checkpoint, before = saved(teacher), state(teacher)
    checkpoint = checkpoint[: int(left * len(checkpoint))]
    with pytest.raises(zipfile.BadZipFile):
        load(teacher, checkpoint)
    with pytest.raises((RuntimeError, EOFError, ValueError)):
        teacher.load_state_dict(torch.load(io.BytesIO(checkpoint)))
    assert_state(teacher, before)


def test_a_flipped_bit_is_refused_or_has_no_effect(student):
    teacher = EMANTeacher(student, 0.5)
    teacher.update(student)
    checkpoint, before = saved(teacher), state(teacher)
    refused = 0
    for at in range(0, len(checkpoint), 37):
        damaged = bytearray(checkpoint)
        damaged[at] ^= 1 << at % 8
        try:
            load(teacher, damaged)
        except Exception:  # zipfile, torch and pickle raise many types
            refused += 1
        assert_state(teacher, before)
    assert refused > 20


# ---------------------------------------------------------------- memory


class NoMemory(TorchDispatchMode):
    """Run out of memory at the operation with this number."""

    def __init__(self, number):
        super().__init__()
        self.left = number

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if self.left == 0:
            self.left = -1
            raise torch.OutOfMemoryError("no memory is left")
        self.left -= 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("what", ["update", "update with a copy", "several", "swap"])
def test_out_of_memory_at_any_operation_of_a_new_plan(student, what):
    if reason := available_backends()["cpu"]:
        pytest.skip(reason)  # without it, torch's operations are the update itself
    for number in range(1000):
        if what == "several":
            teacher = EMANTeachers(student, [0.5, 0.9], backend="cpu")
        else:
            cast = torch.bfloat16 if what == "update with a copy" else None
            teacher = EMANTeacher(student, 0.5, backend="cpu", cast=cast)
            if cast:
                teacher(torch.ones(2, 4))
        teacher.update(student)
        student[0] = nn.Linear(4, 8)  # forces a new plan
        move(student)
        before, theirs = state(teacher), state(student)
        try:
            with NoMemory(number) as mode:
                if what == "swap":
                    with teacher.swapped(student):
                        pass
                else:
                    teacher.update(student)
        except torch.OutOfMemoryError:
            pass
        else:
            assert mode.left >= 0
            break
        assert_state(teacher, before)
        assert_state(student, theirs)
        teacher.update(student)
        members = [teacher] if isinstance(teacher, EMANTeacher) else list(teacher)
        assert [member.step for member in members] == [2] * len(members)
        want = torch.lerp(before[1][0], student[0].weight.detach(), 0.5)
        assert_same_bits(members[0].module[0].weight, want)
    assert number > 0  # at least one operation failed


# ---------------------------------------------------------------- processes

STEPS, SAVED, LAST = 8, 3, 5
TIMEOUT = 6  # seconds that a process waits for the others; far less than that of the World


def wait_for_the_others(folder):
    """Hang until each of the other processes has ended with an error."""
    while len(list(folder.glob("ended-*"))) < dist.get_world_size() - 1:
        time.sleep(0.1)


def train(folder, resume=False, its_end=""):
    """Train in several processes, with a checkpoint at step 3. its_end: how the last process ends during the run.

    Returns the final state, or the error that ended the run.
    """
    student = DistributedDataParallel(network(), process_group=dist.new_group(timeout=timedelta(seconds=TIMEOUT)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.1)
    teacher = EMANTeacher(student, 0.9, sync_buffers="mean")
    everything = {"student": student.module, "optimizer": optimizer, "teacher": teacher}
    rank = dist.get_rank()
    # DDP reorders its gradient buckets after the first pass, which changes the order of the sums.
    student(torch.ones(6, 4)).sum().backward()
    optimizer.zero_grad()
    if resume:
        saved = torch.load(folder / "checkpoint", weights_only=True)
        for name, its in everything.items():
            its.load_state_dict(saved[name])
        assert teacher.step == SAVED
    for step in range(teacher.step, STEPS):
        torch.manual_seed(10 * step + rank)
        student(torch.randn(6, 4) + rank).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if its_end and step == LAST and rank == dist.get_world_size() - 1:
            if its_end == "it hangs":
                wait_for_the_others(folder)
            os.kill(os.getpid(), signal.SIGKILL)
        before = state(teacher)
        try:
            teacher.update(student)
        except RuntimeError as error:
            assert_state(teacher, before)
            assert teacher.step == LAST
            (folder / f"ended-{rank}").touch()
            return str(error)
        if teacher.step == SAVED and rank == 0:
            torch.save({name: its.state_dict() for name, its in everything.items()}, folder / "checkpoint")
    return teacher.step, state(teacher)[1], state(student.module)[1]


@pytest.mark.parametrize(
    ("its_end", "size"),
    [
        ("it is killed", 2),
        pytest.param("it is killed", 4, marks=pytest.mark.slow),
        pytest.param("it hangs", 4, marks=pytest.mark.slow),
    ],
)
def test_if_a_process_dies_the_others_raise_and_the_run_can_be_resumed(tmp_path, its_end, size):
    if reason := why_none("gloo", size):
        pytest.skip(reason)
    for folder in ("first", "second", "never killed"):
        (tmp_path / folder).mkdir()
    first = World("gloo", size, tmp_path / "first")
    try:
        *others, last = first.answers(train, tmp_path, False, its_end)
    finally:
        first.stop()
    assert last == (False, "the process has gone")
    for fine, answer in others:
        assert fine, answer
        assert f"imed out waiting {1000 * TIMEOUT}ms" in answer or ("by peer" in answer and its_end == "it is killed")
    if its_end == "it hangs":
        return
    second = World("gloo", size, tmp_path / "second")
    try:
        resumed = second.run(train, tmp_path, True)
        whole = second.run(train, tmp_path / "never killed")
    finally:
        second.stop()
    for (step, *its), (_, *want) in zip(resumed, whole, strict=True):
        assert step == STEPS
        for one, other in zip(chain(*its), chain(*want), strict=True):
            assert_same_bits(one, other)
