"""What a plan says of itself: counts, bytes and reasons, at most a screen."""

import copy
import re

import pytest
import torch
from conftest import skip_unless_selectable
from torch import nn

from eman_kernels import EMANTeacher, EMANTeachers, available_backends, eman_update_, plan_for
from eman_kernels.plan.plan import Plan


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))


def sizes(*networks: nn.Module) -> int:
    return sum(tensor.nbytes for net in networks for tensor in net.state_dict().values())


def described_bytes(plan: Plan) -> tuple[int, int]:
    """The bytes read and written, as the description of a small network says them."""
    found = re.findall(r"reads (\d+) bytes, writes (\d+) bytes", plan.describe())
    return sum(int(read) for read, _ in found), sum(int(written) for _, written in found)


@pytest.mark.parametrize("backend", [None, "foreach", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_reads_and_writes_each_tensor_once(backend, dtype):
    """Averaged tensors of the teacher are read and written, copied ones (the counters) only written."""
    skip_unless_selectable(dtype)
    student = network().to(dtype)
    teacher = EMANTeacher(student, dtype=torch.float32, backend=backend)
    teacher.update(student)
    counters = 2 * 8
    expected = (sizes(teacher.module, student) - counters, sizes(teacher.module))
    assert described_bytes(plan_for(teacher.module, student)) == expected


def test_bytes_of_several_teachers_and_of_a_low_precision_copy():
    student = network()
    teachers = EMANTeachers(student, [0.9, 0.99, 0.999], backend="foreach")
    teachers.update(student)
    plan = plan_for(teachers[0].module, student)
    averaged = sizes(student) - 2 * 8
    assert described_bytes(plan) == (3 * (sizes(student) + averaged), 3 * sizes(student))  # foreach: one by one
    assert "updates 42 tensors of 3 teachers" in plan.describe()

    teacher = EMANTeacher(student, cast=torch.bfloat16, backend="reference")
    teacher(torch.ones(1, 3, 8, 8))
    teacher.update(student)
    weights = sum(parameter.numel() for layer in student[::2] for parameter in layer.parameters())
    plan = plan_for(teacher.module, student)
    assert described_bytes(plan) == (sizes(student) + averaged, sizes(student) + 2 * weights)


def test_one_pass_reads_the_student_once_for_all_teachers():
    if reason := available_backends()["cpu"]:
        pytest.skip(reason)
    student = network()
    teachers = EMANTeachers(student, [0.9, 0.99, 0.999], backend="cpu")
    teachers.update(student)
    averaged = sizes(student) - 2 * 8
    expected = (sizes(student) + 3 * averaged, 3 * sizes(student))
    assert described_bytes(plan_for(teachers[0].module, student)) == expected


def test_skipped_and_shared_tensors_are_counted():
    student = network()
    rules = {"0.*": "share", "2.weight": "skip", "*.num_batches_tracked": "skip"}
    teacher = EMANTeacher(student, rules=rules)
    teacher.update(student)
    described = plan_for(teacher.module, student).describe().splitlines()
    assert len(described) == 2
    assert described[1] == "  3 skipped, 2 shared"
    assert "updates 9 tensors" in described[0]
    # A tensor with two names is one tensor.
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    eman_update_(teacher := copy.deepcopy(tied).requires_grad_(False), tied, 0.9, rules={"*.weight": "skip"})
    assert "  1 skipped" in plan_for(teacher, tied).describe().splitlines()


def test_the_description_of_a_large_network_fits_on_a_screen():
    student = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(100)))
    teacher = copy.deepcopy(student).requires_grad_(False)
    student.to(memory_format=torch.channels_last)
    eman_update_(teacher, student, 0.9)
    plan = plan_for(teacher, student)
    assert len(plan.describe().splitlines()) == 2 + 5 + 1
    assert "  and 95 more by the reference" in plan.describe().splitlines()
    reason = "the teacher's strides are (36, 9, 3, 1), the student's (36, 1, 12, 4)"
    assert f"  0.weight: by the reference, because {reason}" in plan.describe().splitlines()
    assert len(plan.ineligible) == 100


def test_megabytes():
    teacher, student = nn.Linear(1000, 1000).requires_grad_(False), nn.Linear(1000, 1000)
    eman_update_(teacher, student, 0.9)
    assert plan_for(teacher, student).describe().endswith("; reads 8.0 MB, writes 4.0 MB")


def test_print_of_a_teacher_shows_the_plan_of_its_last_update():
    student = network()
    teacher = EMANTeacher(student, 0.9)
    first = repr(teacher)
    assert "updates" not in first, "no plan is made for it"
    assert plan_for(teacher.module, student) is None
    teacher.update(student)
    plan = plan_for(teacher.module, student).describe()
    assert repr(teacher) == first.replace("step=0, buffers='ema'", f"step=1, buffers='ema'\n  {plan}")
    # Nested, every line is indented; the network's own lines are as before.
    outer = repr(nn.ModuleDict({"teacher": teacher}))
    assert f"\n    {plan}\n    (module): Sequential(\n      (0): Conv2d(3, 8" in outer


def test_print_of_a_teacher_whose_student_is_gone():
    student = network()
    teacher = EMANTeacher(student, 0.9)
    teacher.update(student)
    copied = copy.deepcopy(teacher)
    del student
    for each in (teacher, copied):
        assert "updates" not in repr(each)
        assert "step=1" in repr(each)
