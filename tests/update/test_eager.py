"""The eager update: its warnings, and mappings of tensors."""

import copy
import warnings
from collections import UserDict

import pytest
import torch
from conftest import assert_same_bits
from torch import nn

from eman_kernels import EMANTeacher, ema_update_, plan_for


def warnings_of(updates, teacher, student):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(updates):
            teacher.update(student)
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


def with_other_layout(channels, **options):
    student = nn.Sequential(nn.Conv2d(channels, channels, 3, bias=False), nn.Linear(4, 4))
    teacher = EMANTeacher(student, 0.9, **options)
    return teacher, student.to(memory_format=torch.channels_last)


def test_a_slow_layout_is_reported_once_per_pair_of_networks():
    teacher, student = with_other_layout(256)  # 2.4 MB
    (message,) = warnings_of(2, teacher, student)
    assert "589824 elements take the slow path" in message
    assert "0.weight: (2304, 9, 3, 1) and (2304, 1, 768, 256)" in message
    student[1].weight = nn.Parameter(torch.ones(4, 4))  # a new plan
    assert warnings_of(1, teacher, student) == []
    teacher.rules = {"1.bias": "skip"}  # another one
    assert warnings_of(1, teacher, student) == []
    assert len(warnings_of(1, copy.deepcopy(teacher), student)) == 1, "another pair of networks"
    teacher.to(memory_format=torch.channels_last)
    teacher.update(student)
    assert not plan_for(teacher.module, student).ineligible, "the remedy in the message"


@pytest.mark.parametrize("channels", [8, 128])  # 2 kB, and 0.6 MB
def test_a_small_slow_layout_is_not_reported(channels):
    assert warnings_of(1, *with_other_layout(channels)) == []


def test_a_slow_layout_of_few_elements_is_not_reported():
    student = nn.Sequential(nn.Conv2d(256, 256, 3, bias=False), nn.Linear(4000, 2000))
    teacher = EMANTeacher(student, 0.9)
    assert warnings_of(1, teacher, student.to(memory_format=torch.channels_last)) == []


# ---------------------------------------------------------------- mappings


def mappings():
    teacher = {"a": torch.zeros(3), "b": {"c": torch.ones(2, 2), 4: torch.tensor(7)}}
    student = UserDict({"b": UserDict({4: torch.tensor(9), "c": torch.full((2, 2), 3.0)}), "a": torch.ones(3)})
    return teacher, student


def assert_values(teacher, a, c, counter):
    assert_same_bits(teacher["a"], torch.full((3,), a))
    assert_same_bits(teacher["b"]["c"], torch.full((2, 2), c))
    assert teacher["b"][4] == counter


@pytest.mark.parametrize("backend", [None, "foreach", "reference"])
def test_mappings_are_paired_by_key(backend):
    """Of any kind, nested, and in any order."""
    teacher, student = mappings()
    ema_update_(teacher, student, 0.75, backend=backend)
    assert_values(teacher, 0.25, 1.5, 9)
    ema_update_(teacher, student, 0.75, backend=backend)
    assert_values(teacher, 0.4375, 1.875, 9)


def test_mappings_in_a_compiled_graph():
    teacher, student = mappings()
    student = dict(student) | {"b": dict(student["b"])}
    torch.compile(lambda: ema_update_(teacher, student, 0.75), fullgraph=True, backend="eager")()
    assert_values(teacher, 0.25, 1.5, 9)


def test_generators_in_a_compiled_graph():
    teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = torch.lerp(teacher.weight, student.weight, 0.25)

    def update():
        ema_update_(teacher.parameters(), student.parameters(), 0.75)

    torch.compile(update, backend="eager")()
    assert_same_bits(teacher.weight, expected)


def test_a_state_dict_follows_another():
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    teacher = copy.deepcopy(student).requires_grad_(False)
    student(torch.randn(8, 4))
    expected = torch.lerp(teacher[1].running_mean, student[1].running_mean, 0.25)
    ema_update_(teacher.state_dict(), dict(reversed(student.state_dict().items())), 0.75)
    assert_same_bits(teacher[1].running_mean, expected)
    assert teacher[1].num_batches_tracked == 1


def test_a_missing_key_is_named_before_anything_is_written():
    teacher, student = mappings()
    student["b"]["d"] = torch.ones(1)
    del student["a"]
    with pytest.raises(
        ValueError, match=r"nothing was written\.\n  b\.d: the teacher has none\n  a: the student has none"
    ):
        ema_update_(teacher, student, 0.5)
    assert_values(teacher, 0.0, 1.0, 7)


def test_errors_name_the_key():
    teacher, student = mappings()
    student["b"]["c"] = torch.ones(5)
    with pytest.raises(ValueError, match=r"b\.c: the teacher's shape is \(2, 2\), the student's \(5,\)"):
        ema_update_(teacher, student, 0.5)
    student["b"]["c"] = 1.0
    with pytest.raises(TypeError, match=r"student_tensors\['b\.c'\] must be a tensor, not a builtins\.float"):
        ema_update_(teacher, student, 0.5)
    assert_values(teacher, 0.0, 1.0, 7)


def test_momentum_0_of_the_buffers_copies_them_and_leaves_the_parameters():
    """What mmengine and ignite call syncing the buffers."""
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    teacher = copy.deepcopy(student).requires_grad_(False)
    student(torch.randn(8, 4))
    nn.init.ones_(student[0].weight)
    before = copy.deepcopy(teacher.state_dict())
    ema_update_([*teacher.buffers()], [*student.buffers()], momentum=0)
    for name, tensor in teacher.state_dict().items():
        is_buffer = name in dict(student.named_buffers())
        assert_same_bits(tensor, student.state_dict()[name] if is_buffer else before[name], name)
