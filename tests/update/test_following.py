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
    assert real == 9


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
