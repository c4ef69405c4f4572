"""Tensors that share memory: ties, and overlaps, which are errors."""

import pytest
import torch

from eman_kernels import ema_update_


def test_shared_memory_is_an_error_and_nothing_is_written():
    memory = torch.zeros(100)
    before = memory.clone()
    other = torch.ones(30)
    for teacher, student, words in [
        ([memory[:30]], [memory[20:50]], "share memory"),
        ([memory[:30]], [memory[:30]], "share memory"),
        ([memory[:30], memory[20:50]], [other, other], "share memory"),
        ([memory[:1].expand(30)], [other], "expanded or overlapping"),
        ([memory.as_strided((10, 3), (1, 1))], [torch.ones(10, 3)], "expanded or overlapping"),
        ([memory[:30], memory[:30]], [other, other + 1], "ties"),
    ]:
        with pytest.raises(ValueError, match=words) as error:
            ema_update_(teacher, student, 0.5)
        assert "teacher_tensors[" in str(error.value)
        assert torch.equal(memory, before)


def test_tied_tensors_are_updated_once():
    teacher, student = torch.zeros(10), torch.ones(10)
    ema_update_([teacher, teacher], [student, student], 0.5)
    assert torch.equal(teacher, torch.full((10,), 0.5))


def test_adjacent_teachers_and_overlapping_students_are_allowed():
    memory, student = torch.zeros(20), torch.ones(15)
    ema_update_([memory[:10], memory[10:]], [student[:10], student[5:]], 0.5)
    assert torch.equal(memory, torch.full((20,), 0.5))
