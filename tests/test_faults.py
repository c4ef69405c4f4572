"""What goes wrong outside: checkpoints that are damaged or another's, and memory that runs out. Nothing is changed."""

import io
import zipfile

import pytest
import torch
from conftest import assert_same_bits
from torch import nn
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
    """Which tensors it holds, what is in them, and the step: nothing of it may change."""
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
    """Its last layers fit, and would be copied before the others are refused."""
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
    """Set first, and refused; what was before it stays."""
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


def load(teacher, checkpoint):
    """As README says. torch.load itself asks for no checksum: it takes a flipped bit for a weight."""
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


def test_a_flipped_bit_is_refused_or_without_effect(student):
    teacher = EMANTeacher(student, 0.5)
    teacher.update(student)
    checkpoint, before = saved(teacher), state(teacher)
    refused = 0
    for at in range(0, len(checkpoint), 37):
        damaged = bytearray(checkpoint)
        damaged[at] ^= 1 << at % 8
        try:
            load(teacher, damaged)
        except Exception:  # whatever zipfile, torch and pickle say
            refused += 1
        assert_state(teacher, before)
    assert refused > 20


# ---------------------------------------------------------------- memory


class NoMemory(TorchDispatchMode):
    """The operation of this number finds no memory."""

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
def test_no_memory_at_any_operation_of_a_new_plan(student, what):
    if reason := available_backends()["cpu"]:
        pytest.skip(reason)  # torch's operations would be the update itself
    for number in range(1000):
        if what == "several":
            teacher = EMANTeachers(student, [0.5, 0.9], backend="cpu")
        else:
            cast = torch.bfloat16 if what == "update with a copy" else None
            teacher = EMANTeacher(student, 0.5, backend="cpu", cast=cast)
            if cast:
                teacher(torch.ones(2, 4))
        teacher.update(student)
        student[0] = nn.Linear(4, 8)  # a plan is made anew
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
    assert number > 1
