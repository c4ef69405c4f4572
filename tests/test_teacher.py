"""EMANTeacher: what a training loop, a checkpoint and a debugger expect of it."""

import copy
import io
import pickle

import pytest
import torch
from conftest import assert_same_bits, lerp
from torch import nn

from eman_kernels import EMANTeacher, plan_for, schedules


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(4))


@pytest.fixture
def student():
    model = net()
    model(torch.randn(2, 3, 6, 6))
    return model


def train_step(student):
    student.train()
    student(torch.randn(4, 3, 6, 6)).pow(2).mean().backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= 0.1 * parameter.grad
    student.zero_grad()


def test_it_is_a_frozen_copy_in_eval_mode(student):
    student.train()
    teacher = EMANTeacher(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert student.training
    assert next(student.parameters()).requires_grad
    assert list(teacher.module.state_dict()) == list(student.state_dict())
    for mine, its in zip(teacher.module.state_dict().values(), student.state_dict().values(), strict=True):
        assert torch.equal(mine, its)
        assert mine.data_ptr() != its.data_ptr()


def test_train_does_not_change_its_mode(student):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = EMANTeacher(student)

    both = Both()
    for module in (both, both.teacher):
        module.train()
        assert not any(m.training for m in both.teacher.modules())


def test_its_output_for_a_sample_does_not_depend_on_the_rest_of_the_batch(student):
    train_step(student)
    teacher = EMANTeacher(student).train()
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(teacher(x)[:1], teacher(x[:1]))
    student.train()
    assert not torch.allclose(student(x)[:1], student(x[:2])[:1])


def test_forward_has_no_gradients(student):
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    assert not EMANTeacher(student)(x).requires_grad


def test_update_follows_parameters_and_statistics(student):
    teacher = EMANTeacher(student, momentum=0.9)
    for k in range(3):
        train_step(student)
        before = copy.deepcopy(teacher.module.state_dict())
        teacher.update(student)
        for name, tensor in teacher.module.state_dict().items():
            want = student.state_dict()[name]
            assert_same_bits(tensor, lerp(before[name], want, 0.9) if want.is_floating_point() else want, name)
        assert teacher.step == k + 1
    assert teacher.module[1].num_batches_tracked == student[1].num_batches_tracked > 0


def test_update_remembers_the_student_and_says_when_it_has_none(student):
    teacher = EMANTeacher(student, momentum=0.0)
    with pytest.raises(RuntimeError, match=r"no student has been seen yet.*update\(student\)"):
        teacher.update()
    teacher.update(student)
    train_step(student)
    teacher.update()
    assert torch.equal(teacher.module[0].weight, student[0].weight)
    with pytest.raises(RuntimeError, match="no student has been seen"):
        copy.deepcopy(teacher).update()


def test_momentum_may_be_a_schedule_and_be_overridden(student):
    asked = []

    def schedule(step):
        asked.append(step)
        return 0.5

    teacher = EMANTeacher(student, momentum=schedule)
    teacher.update(student)
    teacher.update(student, momentum=1.0)
    teacher.update(student)
    assert asked == [0, 2]
    assert teacher.step == 3
    with torch.no_grad():
        student[0].bias.fill_(5.0)
    teacher.update(student, momentum=0.0)
    assert (teacher.module[0].bias == 5).all()


def test_a_failed_update_is_no_step(student):
    teacher = EMANTeacher(student, momentum=lambda step: 2.0)
    with pytest.raises(ValueError, match="momentum must be in"):
        teacher.update(student)
    with pytest.raises(ValueError, match="cannot follow"):
        teacher.update(nn.Linear(2, 2), momentum=0.5)
    assert teacher.step == 0


def test_float32_teacher_of_a_bfloat16_student(student):
    student = student.to(torch.bfloat16)
    teacher = EMANTeacher(student, momentum=0.99, dtype=torch.float32)
    assert {t.dtype for t in teacher.module.state_dict().values()} == {torch.float32, torch.int64}
    with torch.no_grad():
        for tensor in student.parameters():
            tensor.mul_(1.05)
    before = copy.deepcopy(teacher.module.state_dict())
    teacher.update(student)
    for name, tensor in teacher.module.state_dict().items():
        if tensor.is_floating_point():
            assert_same_bits(tensor, lerp(before[name], student.state_dict()[name], 0.99), name)
    assert not plan_for(teacher.module, student).ineligible


@pytest.mark.parametrize("into", ["fresh", "planned"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_resumes_exactly(student, into, assign):
    schedule = schedules.Cosine(0.9, 20)
    teacher = EMANTeacher(student, schedule)
    for _ in range(5):
        train_step(student)
        teacher.update(student)
    file = io.BytesIO()
    torch.save({"student": student.state_dict(), "teacher": teacher.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second_student = copy.deepcopy(student)
    second = EMANTeacher(second_student, schedule)
    if into == "planned":
        for _ in range(2):
            train_step(second_student)
            second.update(second_student)
    second_student.load_state_dict(saved["student"])
    second.load_state_dict(saved["teacher"], assign=assign)
    assert second.step == 5
    for one, other in ((student, teacher), (second_student, second)):
        torch.manual_seed(1)
        for _ in range(4):
            train_step(one)
            other.update(one)
    assert second.step == teacher.step == 9
    for name, tensor in teacher.module.state_dict().items():
        assert torch.equal(tensor, second.module.state_dict()[name]), name


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda teacher: pickle.loads(pickle.dumps(teacher))])
def test_deepcopy_and_pickle(student, clone):
    teacher = EMANTeacher(student, schedules.WarmUp(0.99), rules={"0.*": "copy"}, buffers="copy", backend="reference")
    teacher.update(student)
    twin = clone(teacher)
    train_step(student)
    for each in (teacher, twin):
        each.update(student)
    assert twin.step == teacher.step == 2
    assert (twin.rules, twin.buffer_rule, twin.backend) == ({"0.*": "copy"}, "copy", "reference")
    for name, tensor in teacher.module.state_dict().items():
        assert torch.equal(tensor, twin.module.state_dict()[name]), name
        assert tensor.data_ptr() != twin.module.state_dict()[name].data_ptr()


def test_to_another_dtype_after_the_plan_was_made(student):
    teacher = EMANTeacher(student, momentum=0.5)
    teacher.update(student)
    teacher.to(torch.float64)
    train_step(student)
    before = teacher.module[0].weight.clone()
    teacher.update(student)
    assert_same_bits(teacher.module[0].weight, lerp(before, student[0].weight.detach(), 0.5))


def test_bad_arguments(student):
    for momentum in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="momentum must be in"):
            EMANTeacher(student, momentum)
    with pytest.raises(ValueError, match="backend='quick' is none of"):
        EMANTeacher(student, backend="quick")
    with pytest.raises(ValueError, match=r"floating-point dtype, and is torch\.int8"):
        EMANTeacher(student, dtype=torch.int8)
