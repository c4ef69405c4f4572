"""Which backend updates a device, and what happens if the requested one is not available."""

import pytest
import torch
from torch import nn

from eman_kernels import backends, ema_update_, eman_update_, plan_for
from eman_kernels.backends import extension


def test_an_unavailable_backend_requested_by_name_raises_with_the_reason(monkeypatch):
    t, s = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot update tensors on cpu: it updates CUDA tensors only"):
        ema_update_([t], [s], 0.5, backend="cuda")
    with pytest.raises(ValueError, match="unknown backend='fast': it must be one of 'auto', 'cuda'"):
        ema_update_([t], [s], 0.5, backend="fast")
    monkeypatch.setenv("EMAN_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match="unknown EMAN_KERNELS_BACKEND='fast': it must be one of"):
        ema_update_([t], [s], 0.5)
    assert torch.equal(t, torch.zeros(3))


def test_backend_priority_is_argument_environment_auto(monkeypatch):
    teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
    teacher.requires_grad_(False)

    def used(**kwargs):
        eman_update_(teacher, student, 0.5, **kwargs)
        return plan_for(teacher, student).works[0][0].NAME

    auto = "foreach" if extension.missing else "cpu"
    assert used() == used(backend="auto") == auto
    monkeypatch.setenv("EMAN_KERNELS_BACKEND", "reference")
    assert used() == "reference"
    assert used(backend="foreach") == "foreach"
    assert used(backend="auto") == auto


def test_without_the_extension_auto_falls_back_and_a_name_raises(monkeypatch):
    monkeypatch.setattr("eman_kernels.backends.cpu.missing", "the compiled extension is not in this installation")
    teacher, student = torch.zeros(3), torch.ones(3)
    assert backends.choose(torch.device("cpu"), None).NAME == "foreach"
    ema_update_([teacher], [student], 0.5)
    assert torch.equal(teacher, torch.full((3,), 0.5))
    with pytest.raises(RuntimeError, match="compiled extension is not in this installation"):
        ema_update_([teacher], [student], 0.5, backend="cpu")
