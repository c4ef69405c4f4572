"""KeyboardInterrupt at any moment of an update, a swap or planning: no network stays swapped, no flag stays set, and
the next update is right. An update that has been written may lose its count."""

import copy
import linecache
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_same_bits
from torch import nn

from eman_kernels import EMANTeacher, EMANTeachers, available_backends

# A larger number tests proportionally more moments.
TIMES = int(os.environ.get("EMAN_KERNELS_INTERRUPTS", "1"))


class Interrupted(BaseException):
    pass


class Interrupts:
    """Interrupts actions at random moments. The moments adapt, so that about every second action is interrupted."""

    def __init__(self):
        self.came, self.due, self.longest = 0, False, 1e-3

    def handler(self, number, frame):
        if self.due:  # Python may handle a signal late
            raise Interrupted

    def __call__(self, action):
        try:
            try:
                self.due = True
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, self.longest))
                action()
            finally:
                self.due = False
                signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupted:
            self.came += 1
            self.longest *= 1.05
        else:
            self.longest = max(2e-6, self.longest / 1.05)
        finally:
            torch.set_grad_enabled(True)  # an interrupt can leave torch's no_grad() without restoring the mode

    def until(self, number):
        """Counts upward until this many interrupts came."""
        for i in range(100 * number * TIMES):
            if self.came >= number * TIMES:
                return
            yield i
        pytest.fail(f"{self.came} interrupts came, of {number * TIMES}")


@pytest.fixture
def interrupts():
    random.seed(0)
    interrupts = Interrupts()
    before = signal.signal(signal.SIGALRM, interrupts.handler)
    yield interrupts
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def compiled():
    # Without the extension the update itself is a series of torch operations, which an interrupt can split.
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
    module[1].eval()  # like a frozen BatchNorm in a student in training mode
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
    """The expected average, computed by torch."""
    return {
        name: torch.lerp(value, theirs[name], 1 - momentum) if value.is_floating_point() else theirs[name]
        for name, value in own.items()
    }


def assert_updated(module, own, theirs, momentum, counted):
    """The values are those of `counted` updates, or of one more that an interrupt has kept from being counted."""
    for _ in range(counted):
        own = averaged(own, theirs, momentum)
    now = module.state_dict()
    uncounted = not all(torch.equal(now[name], tensor) for name, tensor in own.items())
    assert_values(module, averaged(own, theirs, momentum) if uncounted else own)
    return counted + uncounted


def assert_idle(teacher):
    assert teacher.state.lock.exchange is None
    assert not teacher.state.lock.lock._is_owned()


# The handler may run where Python can only report the exception, such as in a finalizer.
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
    for i in interrupts.until(600):
        if i % 10 == 0:
            teacher.module[1].running_mean = teacher.module[1].running_mean.clone()  # forces a new plan
        interrupts(once)
        assert_values(teacher.module, own)
        assert_values(student, theirs)
        assert modes(student) == mode
        assert not any(modes(teacher.module))
        assert_idle(teacher)
    teacher.update(student)


@pytest.mark.parametrize(("backend", "several"), [("cpu", False), ("cpu", True), ("foreach", False)])
def test_interrupts_of_an_update(interrupts, backend, several):
    student = nn.Linear(3, 3)
    with torch.no_grad():
        student.weight.fill_(0)
    options = {"backend": backend}
    teachers = EMANTeachers(student, [0.5, 0.75], **options) if several else one(student, **options)
    members = list(teachers) if several else [teachers]
    teachers.update(student)
    for i in interrupts.until(1000):
        for member in members:
            member.module.weight.fill_(1)
            member.step = 0
        interrupts(lambda: teachers.update(student))
        for member, factor in zip(members, (0.5, 0.75), strict=False):
            assert member.step in (0, 1)
            expected = [torch.full((3, 3), factor**n) for n in range(member.step, 2)]
            assert any(torch.equal(member.module.weight, each) for each in expected), i


def one(student, **options):
    return EMANTeacher(student, 0.5, **options)


# Planning for these; with a bfloat16 copy, it also allocates the copies.
TEACHERS = {
    "one": one,
    "several": lambda student: EMANTeachers(student, [0.5, 0.75]),
    "a copy": lambda student: one(student, cast=torch.bfloat16),
    "counters": lambda student: one(student, nonfinite="skip", capturable=True),
}


def another_student(teachers, student):
    return randomise(copy.deepcopy(student))


def another_layer(teachers, student):
    """A layer of another shape, so that the low-precision copies must be replaced."""
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
    """New plans, and then the teachers' memory is swapped with the student's."""
    student = another_student(teachers, student)
    with teachers[0].swapped(student):
        pass
    return student


NEW_PLANS = [another_student, another_layer, other_options, a_swap_first]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("make", TEACHERS.values(), ids=TEACHERS)
def test_interrupts_of_a_plan(interrupts, make):
    student, x = network(), torch.ones(2, 4)
    teachers = make(student)
    members = list(teachers) if isinstance(teachers, EMANTeachers) else [teachers]
    for i in interrupts.until(120):
        student = NEW_PLANS[i % len(NEW_PLANS)](members, student)
        before, theirs, mode = [values(member.module) for member in members], values(student), modes(student)
        steps = [member.step for member in members]
        if members[0].cast is not None:
            members[0](x)
        for last in (False, True):
            if last:
                teachers.update(student)
            else:
                interrupts(lambda s=student: teachers.update(s))
            assert_values(student, theirs)
            assert modes(student) == mode
            written = set()
            for member, step, own, momentum in zip(members, steps, before, (0.5, 0.75), strict=False):
                written.add(assert_updated(member.module, own, theirs, momentum, member.step - step))
                assert not any(modes(member.module))
                assert torch.equal(member.module[2].kept, member.module[2].weight.t())
                assert_idle(member)
                if member.cast is not None:
                    low = member.state.refresh_low_precision(member.module).tensors
                    for name, tensor in low.items():
                        assert_same_bits(tensor, member.module.get_parameter(name).to(member.cast))
            assert written in ({last}, {last + 1}), "all teachers are written in one pass"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_of_creating_a_teacher(interrupts):
    """The student is unchanged, and the next teacher is right. A given module has its own values or the student's."""
    student = network()
    theirs, mode = values(student), modes(student)
    ids = [id(tensor) for tensor in student.parameters()]
    for i in interrupts.until(120):
        module = network() if i % 2 else None
        options = {"rules": {"0.*": "share"}} if i % 4 > 1 else {}
        interrupts(lambda m=module, o=options: one(student, module=m, **o))
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


class AtLine:
    """Raise before the n-th line that runs in functions of these files: moments that a timer may miss."""

    FILES = ("low_precision.py", "cache.py", "swapping.py", "caching.py")

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
        # Python does not check for signals before leaving a `with` or at the start of a `try` or `finally`.
        if event == "line" and not line.startswith(("with ", "try:", "call_all(")):
            self.left -= 1
            if self.left == -1:
                self.where = f"{frame.f_code.co_name}: {line}"  # shown by a debugger or a failing test
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
            written = assert_updated(teacher.module, own, theirs, 0.5, teacher.step - step)
            assert written in ([last, last + 1] if what == "update" else [last])
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
    """An interrupted `swap` cleans up after itself, because no `with` does it."""
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
