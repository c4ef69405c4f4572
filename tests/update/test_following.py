"""teacher.follow: one update per optimizer step that is actually taken, compared with manual updates."""

import pytest
import torch
from conftest import assert_same_bits
from torch import nn

from eman_kernels import EMANTeacher, EMANTeachers, schedules


def setting(**options: object) -> tuple[nn.Module, EMANTeacher, torch.optim.Optimizer]:
    student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    teacher = EMANTeacher(student, schedules.WarmUp(0.99))
    return student, teacher, torch.optim.SGD(student.parameters(), lr=0.1, **options)


def step(student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    student(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    for name, tensor in expected.state_dict().items():
        assert_same_bits(actual.state_dict()[name], tensor, name)


def test_each_step_updates_until_the_handle_is_removed():
    student, teacher, optimizer = setting()
    expected = EMANTeacher(student, schedules.WarmUp(0.99))
    handle = teacher.follow(optimizer, student)
    for k in range(4):
        step(student, optimizer)
        expected.update(student)
        assert teacher.step == k + 1
        assert_same(teacher, expected)
    handle.remove()
    step(student, optimizer)
    assert teacher.step == 4


@pytest.mark.parametrize(
    ("every", "start", "after"),
    [(1, 0, [1, 2, 3, 4, 5, 6, 7]), (3, 0, [3, 6]), (1, 4, [5, 6, 7]), (2, 3, [4, 6])],
)
def test_every_and_start_count_real_steps(every: int, start: int, after: list[int]):
    student, teacher, optimizer = setting()
    teacher.follow(optimizer, student, every=every, start=start)
    updated = []
    for k in range(1, 8):
        before = teacher.step
        step(student, optimizer)
        if teacher.step > before:
            updated.append(k)
    assert updated == after


def test_a_resumed_teacher_does_not_wait_for_start_again():
    student, teacher, optimizer = setting()
    teacher.update(student)
    resumed = EMANTeacher(student)
    resumed.follow(optimizer, student, start=100)
    resumed.load_state_dict(teacher.state_dict())  # works before and after follow()
    step(student, optimizer)
    assert resumed.step == 2


@pytest.mark.parametrize("load_first", [False, True])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("every", "start", "stop"), [(4, 0, 6), (1, 10, 6), (1, 10, 14), (3, 5, 7)])
def test_the_count_of_steps_is_resumed(every: int, start: int, stop: int, several: bool, load_first: bool):
    """The updates are those of a run that was not interrupted: after the steps k > start that every divides."""
    torch.manual_seed(0)
    student, _, optimizer = setting()
    make = (lambda: EMANTeachers(student, [0.9, 0.5])) if several else (lambda: EMANTeacher(student, 0.9))
    teacher, expected = make(), make()
    teacher.follow(optimizer, student, every=every, start=start)
    for k in range(1, 21):
        step(student, optimizer)
        if k > start and k % every == 0:
            expected.update(student)
        if k == stop:
            state = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
            teacher, optimizer = make(), torch.optim.SGD(student.parameters(), lr=0.1)
            if load_first:
                teacher.load_state_dict(state)
            teacher.follow(optimizer, student, every=every, start=start)
            if not load_first:
                teacher.load_state_dict(state)
    assert_same(teacher, expected)


def test_a_file_without_the_count_is_loaded():
    student, teacher, optimizer = setting()
    teacher.update(student)
    assert set(teacher.state_dict()) == {"_extra_state", *(f"module.{name}" for name in student.state_dict())}
    resumed = EMANTeacher(student)
    resumed.follow(optimizer, student, every=2)
    resumed.load_state_dict(teacher.state_dict())
    for expected in (1, 2, 2, 3):
        step(student, optimizer)
        assert resumed.step == expected


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("every", "start"), [(1, 0), (2, 0), (1, 2), (2, 1)])
def test_steps_skipped_by_grad_scaler_do_not_count(fused: bool, every: int, start: int):
    student, teacher, optimizer = setting(fused=fused)
    expected = EMANTeacher(student, schedules.WarmUp(0.99))
    teacher.follow(optimizer, student, every=every, start=start)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    real = 0
    for k in range(12):
        before = student[0].weight.clone()
        loss = student(torch.randn(8, 3)).square().sum()
        if k in (1, 4, 5):
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        # A step was taken if the weights changed.
        if not torch.equal(before, student[0].weight):
            real += 1
            if real > start and real % every == 0:
                expected.update(student)
        assert teacher.step == expected.step, k
        assert_same(teacher, expected)
        if (every, start) != (1, 0):
            assert teacher.state_dict()["_optimizer_steps"] == real
    assert real == 9


class Decaying(torch.optim.SGD):
    """Changes the weights again after super().step()."""

    def step(self, closure=None):
        if closure is not None:
            closure()
        super().step()
        with torch.no_grad():
            torch._foreach_mul_(self.param_groups[0]["params"], 0.9)


class Twice(Decaying):
    def step(self, closure=None):
        super().step(closure)
        super().step()


class Wrapper(torch.optim.Optimizer):
    """Changes the weights after the step of the optimizer inside, as Lookahead does."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.optimizer = optimizer

    def step(self, closure=None):
        self.optimizer.step(closure)
        with torch.no_grad():
            torch._foreach_mul_(self.optimizer.param_groups[0]["params"], 0.9)


OPTIMIZERS = {
    "subclass": lambda parameters: Decaying(parameters, lr=0.1),
    "subclass of it": lambda parameters: Twice(parameters, lr=0.1),
    "wrapper": lambda parameters: Wrapper(torch.optim.SGD(parameters, lr=0.1)),
    "wrapper of a subclass": lambda parameters: Wrapper(Decaying(parameters, lr=0.1)),
}


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_update_after_the_outermost_step(kind: str, compiled: bool, every: int):
    """torch runs the hooks of a base class too, once a plain instance of it exists. At momentum 0 the teacher equals
    the student if the update came last."""
    student, _, _ = setting()
    optimizer = OPTIMIZERS[kind](student.parameters())
    Decaying(student.parameters(), lr=0.1)
    teacher = EMANTeacher(student, 0.0)
    teacher.follow(optimizer, student, every=every)
    run = torch.compile(lambda: optimizer.step(), backend="eager") if compiled else optimizer.step
    for k in range(1, 5):
        student(torch.randn(8, 3)).square().sum().backward()
        run()
        optimizer.zero_grad()
        assert teacher.step == k // every
        if k % every == 0:
            assert_same(teacher.module, student)
    torch.compiler.reset()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_that_raised_does_not_disturb_the_next(kind: str):
    student, _, _ = setting()
    optimizer = OPTIMIZERS[kind](student.parameters())
    teacher = EMANTeacher(student, 0.0)
    teacher.follow(optimizer, student)
    with pytest.raises(ZeroDivisionError) as held:  # the traceback keeps the frames of the step alive
        optimizer.step(lambda: 1 / 0)
    step(student, optimizer)
    assert teacher.step == 1
    assert held.value.__traceback__ is not None


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("accelerate.optimizer", "AcceleratedOptimizer"),
        ("lightning.pytorch.core.optimizer", "LightningOptimizer"),
        ("pytorch_lightning.core.optimizer", "LightningOptimizer"),
        ("lightning.fabric.wrappers", "_FabricOptimizer"),
        ("lightning_fabric.wrappers", "_FabricOptimizer"),
    ],
)
@pytest.mark.parametrize("inside", ["plain", "wrapper"])
def test_wrappers_of_training_libraries_are_stripped(package: str, name: str, inside: str):
    module = pytest.importorskip(package)
    student, _, optimizer = setting()
    if inside == "wrapper":
        optimizer = Wrapper(optimizer)
    if name == "AcceleratedOptimizer":
        pytest.importorskip("accelerate").Accelerator(cpu=True)
        wrapped = module.AcceleratedOptimizer(optimizer)
    else:
        wrapped = getattr(module, name)(optimizer, *([None] if name == "_FabricOptimizer" else []))
    teacher = EMANTeacher(student, 0.0)
    teacher.follow(wrapped, student)
    for _ in range(2):
        step(student, optimizer)  # which the wrapper's step does, unless it accumulates gradients
        assert_same(teacher.module, student)
    assert teacher.step == 2


@pytest.mark.parametrize("every", [1, 2])
def test_a_second_call_replaces_the_first(every: int):
    student, teacher, optimizer = setting()
    teachers = EMANTeachers(student, [0.9, 0.99])
    first = teacher.follow(optimizer, student)
    teacher.follow(optimizer, student)
    teachers.follow(optimizer, student)
    teachers.follow(optimizer, student, every=every)
    handle = teacher.follow(optimizer, student, every=every)
    first.remove()  # has been replaced: nothing to remove
    for _ in range(4):
        step(student, optimizer)
    assert teacher.step == teachers[0].step == teachers[1].step == 4 // every
    handle.remove()
    step(student, optimizer)
    assert teacher.step == 4 // every


def test_optimizers_without_hooks():
    student, teacher, optimizer = setting()

    class Private(torch.optim.Optimizer):
        """As opacus' DPOptimizer: does not call super().__init__, but passes attributes on."""

        def __init__(self, optimizer):
            self.original_optimizer = optimizer

        def __getattr__(self, name):
            return getattr(vars(self)["original_optimizer"], name)

        def step(self, closure=None):
            self.original_optimizer.step(closure)

    class SAM(torch.optim.SGD):
        def first_step(self):
            pass

        def second_step(self):
            pass

    private = Private(optimizer)
    with pytest.raises(TypeError, match=r"Private has not called Optimizer.__init__.*follow its original_optimizer"):
        teacher.follow(private, student)
    with pytest.raises(TypeError, match=r"teacher.update\(student\) after second_step\(\) instead"):
        teacher.follow(SAM(student.parameters(), lr=0.1), student)
    step(student, optimizer)
    assert teacher.step == 0
    teacher.follow(private.original_optimizer, student)
    step(student, private)
    assert teacher.step == 1


def test_several_teachers_follow():
    student, _, optimizer = setting()
    teachers = EMANTeachers(student, [0.9, 0.99])
    handle = teachers.follow(optimizer, student, every=2)
    for _ in range(5):
        step(student, optimizer)
    assert [teacher.step for teacher in teachers] == [2, 2]
    handle.remove()


def test_a_compiled_step_is_followed():
    student, teacher, optimizer = setting()
    teacher.follow(optimizer, student)
    expected = EMANTeacher(student, schedules.WarmUp(0.99))
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for k in range(3):
        student(torch.randn(8, 3)).square().sum().backward()
        compiled()
        optimizer.zero_grad()
        expected.update(student)
        assert teacher.step == k + 1
    assert_same(teacher, expected)
    torch.compiler.reset()


def test_bad_arguments():
    student, teacher, optimizer = setting()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer, not a StepLR"):
        teacher.follow(schedule, student)
    with pytest.raises(TypeError, match="not a Sequential"):
        teacher.follow(student, optimizer)
    for wrong in ({"every": 0}, {"start": -1}):
        with pytest.raises(ValueError, match="at least"):
            teacher.follow(optimizer, student, **wrong)
