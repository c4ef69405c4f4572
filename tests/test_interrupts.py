"""Ctrl-C at any moment of an update, a swap or a plan: no network stays exchanged, no step is uncounted, no flag stuck,
and the next update is right."""

import copy
import linecache
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import assert_same_bits
from torch import nn

from eman_kernels import EMANTeacher, EMANTeachers, available_backends

# `make fuzz` asks for more moments than the tests take.
TIMES = int(os.environ.get("EMAN_KERNELS_INTERRUPTS", "1"))


class Interrupted(BaseException):
    pass


@pytest.fixture
def interrupts():
    """A function that lets an exception come at some moment of what it is given. Returns whether it came."""

    due = []

    def handler(number, frame):
        if due:  # Python may only now look at a signal that came in time
            raise Interrupted

    before = signal.signal(signal.SIGALRM, handler)

    def interrupted(action, after):
        try:
            try:
                due.append(True)
                signal.setitimer(signal.ITIMER_REAL, after)
                action()
            finally:
                due.clear()
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            return True
        finally:
            torch.set_grad_enabled(True)  # torch's own no_grad() can be left without its end
        return False

    yield interrupted
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def compiled():
    # torch's own operations would be the update itself: one tensor after the other.
    if reason := available_backends()["cpu"]:
        pytest.skip(reason)


class Caching(nn.Linear):
    """Keeps its transposed weight in eval mode."""

    def train(self, mode=True):
        super().train(mode)
        self.kept = None if mode else self.weight.detach().t().contiguous()
        return self


def network():
    return randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Caching(4, 4)))


def randomise(module):
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.uniform_(0.5, 1.5) if tensor.is_floating_point() else tensor.random_(1, 100)
    module[1].eval()  # as a frozen BatchNorm in a student that is trained
    return module


def values(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_values(module, expected):
    now = module.state_dict()
    assert now.keys() == expected.keys()
    for name, tensor in now.items():
        assert_same_bits(tensor, expected[name])


def modes(module):
    return [each.training for each in module.modules()]


def averaged(own, theirs, momentum):
    """By torch, not by us."""
    return {
        name: torch.lerp(value, theirs[name], 1 - momentum) if value.is_floating_point() else theirs[name]
        for name, value in own.items()
    }


def assert_idle(teacher):
    assert teacher._turn.exchange is None
    assert not teacher._turn.lock._is_owned()


# The handler may also run where Python can but report what it raised.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("backend", ["cpu", "foreach"])
def test_interrupts_of_a_swap(interrupts, backend):
    student = network()
    teacher = EMANTeacher(student, 0.5, backend=backend)
    teacher.module.load_state_dict(network().state_dict())
    own, theirs, mode = values(teacher.module), values(student), modes(student)

    def once():
        with teacher.swapped(student):
            pass

    once()
    came = 0
    for i in range(2000 * TIMES):
        if i % 10 == 0:
            teacher.module[1].running_mean = teacher.module[1].running_mean.clone()  # a plan is made anew
        came += interrupts(once, 1e-6 + (i % 150) * 4e-6)
        assert_values(teacher.module, own)
        assert_values(student, theirs)
        assert modes(student) == mode
        assert not any(modes(teacher.module))
        assert_idle(teacher)
    teacher.update(student)
    assert came > 300


@pytest.mark.parametrize(("backend", "several"), [("cpu", False), ("cpu", True), ("foreach", False)])
def test_interrupts_of_an_update(interrupts, backend, several):
    student = nn.Linear(3, 3)
    with torch.no_grad():
        student.weight.fill_(0)
    options = {"backend": backend}
    teachers = EMANTeachers(student, [0.5, 0.75], **options) if several else one(student, **options)
    members = list(teachers) if several else [teachers]
    teachers.update(student)
    came = 0
    for i in range(3000 * TIMES):
        for member in members:
            member.module.weight.fill_(1)
            member.step = 0
        came += interrupts(lambda: teachers.update(student), 1e-6 + (i % 60) * 2e-6)
        for member, factor in zip(members, (0.5, 0.75), strict=False):
            assert member.step in (0, 1)
            assert torch.equal(member.module.weight, torch.full((3, 3), factor**member.step)), i
        assert len({member.step for member in members}) == 1
    assert came > 300


def one(student, **options):
    return EMANTeacher(student, 0.5, **options)


# What a plan is made for; with a copy in bfloat16 its tensors are made with it.
TEACHERS = {
    "one": one,
    "several": lambda student: EMANTeachers(student, [0.5, 0.75]),
    "a copy": lambda student: one(student, cast=torch.bfloat16),
    "counters": lambda student: one(student, nonfinite="skip", capturable=True),
}


def another_student(teachers, student):
    return randomise(copy.deepcopy(student))


def another_layer(teachers, student):
    """Of another shape: its copies are no longer of the old one's."""
    width = random.randint(1, 9)
    for net in (student, *(member.module for member in teachers)):
        net.add_module("last", nn.Linear(4, width).requires_grad_(net is student).train(net is student))
    return student


def other_options(teachers, student):
    names = random.sample([name for name, _ in student.named_parameters()], 4)
    for member in teachers:
        member.rules = dict.fromkeys(names, "ema")
    return student


def a_swap_first(teachers, student):
    """Made anew, and then the teachers' memory is the student's for a while."""
    student = another_student(teachers, student)
    with teachers[0].swapped(student):
        pass
    return student


NEW_PLANS = [another_student, another_layer, other_options, a_swap_first]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("make", TEACHERS.values(), ids=TEACHERS)
def test_interrupts_of_a_plan(interrupts, make):
    random.seed(0)
    student, x = network(), torch.ones(2, 4)
    teachers = make(student)
    members = list(teachers) if isinstance(teachers, EMANTeachers) else [teachers]
    took, came = 1e-3, 0
    for i in range(250 * TIMES):
        student = NEW_PLANS[i % len(NEW_PLANS)](members, student)
        before, theirs, mode = [values(member.module) for member in members], values(student), modes(student)
        steps = [member.step for member in members]
        if members[0].cast is not None:
            members[0](x)
        for last in (False, True):
            begin = time.perf_counter()
            if last:
                teachers.update(student)
                took = 0.8 * took + 0.2 * (time.perf_counter() - begin)
            else:
                came += interrupts(lambda s=student: teachers.update(s), random.uniform(1e-6, 3 * took))
            assert_values(student, theirs)
            assert modes(student) == mode
            made = [member.step - step for member, step in zip(members, steps, strict=True)]
            assert made in ([last] * len(members), [last + 1] * len(members))
            for member, own, momentum in zip(members, before, (0.5, 0.75), strict=False):
                for _ in range(member.step - steps[members.index(member)]):
                    own = averaged(own, theirs, momentum)
                assert_values(member.module, own)
                assert not any(modes(member.module))
                assert torch.equal(member.module[2].kept, member.module[2].weight.t())
                assert_idle(member)
                if member.cast is not None:
                    low = member._low_precision().tensors
                    for name, tensor in low.items():
                        assert_same_bits(tensor, member.module.get_parameter(name).to(member.cast))
    assert came > 50 * TIMES


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_of_a_teachers_making(interrupts):
    """The student is as it was, and a teacher that is made next is right. So is a network that was to be a teacher's:
    it has its own values or the student's."""
    student = network()
    theirs, mode = values(student), modes(student)
    ids = [id(tensor) for tensor in student.parameters()]
    came = 0
    for i in range(250 * TIMES):
        module = network() if i % 2 else None
        options = {"rules": {"0.*": "share"}} if i % 4 > 1 else {}
        came += interrupts(lambda m=module, o=options: one(student, module=m, **o), random.uniform(1e-6, 3e-3))
        assert_values(student, theirs)
        assert modes(student) == mode
        assert ids == [id(tensor) for tensor in student.parameters()]
        assert all(parameter.requires_grad for parameter in student.parameters())
        if i % 10 < 4:
            teacher = one(student, module=module, **options)
            assert_values(teacher.module, theirs)
            teacher.update(student)
            assert teacher.step == 1
            assert_values(student, theirs)
    assert came > 50 * TIMES


class AtLine:
    """Raises before the line of this number that a function of these files comes to: a moment that a timer may miss."""

    FILES = ("low_precision.py", "known.py", "swap.py", "caches.py")

    def __init__(self, number):
        self.left = number

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._calls)
        return self

    def __exit__(self, kind, error, traceback):
        sys.settrace(self._before)
        return kind is Interrupted

    def _calls(self, frame, event, arg):
        code = frame.f_code
        return self._lines if Path(code.co_filename).name in self.FILES and code.co_name[0] != "<" else None

    def _lines(self, frame, event, arg):
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        # Where Python looks for no signal: before it leaves a `with`, at the begin of a `try` and of a `finally`.
        if event == "line" and not line.startswith(("with ", "try:", "exhaust(")):
            self.left -= 1
            if self.left == -1:
                self.where = f"{frame.f_code.co_name}: {line}"  # for whom reads of a failure
                raise Interrupted
        return self._lines


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("what", "make"), [("update", TEACHERS["a copy"]), ("swap", one)], ids=["update", "swap"])
def test_interrupts_at_each_line_of_a_plan(make, what):
    random.seed(0)
    student, x = network(), torch.ones(2, 4)
    teacher = make(student)
    number = 0
    while True:
        if teacher.cast is not None:
            teacher(x)
        student = another_layer([teacher], another_student([teacher], student))
        own, theirs, mode, step = values(teacher.module), values(student), modes(student), teacher.step
        with AtLine(number) as at:
            if what == "update":
                teacher.update(student)
            else:
                with teacher.swapped(student):
                    pass
        for last in (False, True):
            if last:
                teacher.update(student)
            assert teacher.step - step in ([last, last + 1] if what == "update" else [last])
            want = own
            for _ in range(teacher.step - step):
                want = averaged(want, theirs, 0.5)
            assert_values(teacher.module, want)
            assert_values(student, theirs)
            assert modes(student) == mode
            assert not any(modes(teacher.module))
            assert torch.equal(teacher.module[2].kept, teacher.module[2].weight.t())
            assert_idle(teacher)
            if teacher.cast is not None:
                assert_same_bits(teacher(x), copy.deepcopy(teacher)(x))
        if at.left >= 0:
            break
        number += 1
    assert number > 50


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_at_each_line_of_a_swap_by_hooks():
    """`swap` leaves nothing behind when it does not come to its end: no `with` does it."""
    student = network()
    teacher = EMANTeacher(student, 0.5)
    teacher.module.load_state_dict(network().state_dict())
    own, theirs, mode = values(teacher.module), values(student), modes(student)
    number = 0
    while True:
        with AtLine(number) as at:
            teacher.swap(student)
        if at.left >= 0:
            break
        assert_idle(teacher)
        assert_values(teacher.module, own)
        assert_values(student, theirs)
        assert modes(student) == mode
        number += 1
    assert_values(teacher.module, theirs)
    teacher.swap_back()
    assert_values(teacher.module, own)
    assert number > 20
