"""The update of teachers: eager, or in a graph that is being traced."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import step
from .state import TeacherState

_PROXY_MODE = torch._C._TorchDispatchModeKey.PROXY


def is_tracing() -> bool:
    """Whether torch.compile, torch.export or make_fx traces the caller. make_fx records operations of torch only."""
    return torch.compiler.is_compiling() or torch._C._get_dispatch_mode(_PROXY_MODE) is not None


def update_teachers(
    networks: Sequence[nn.Module],
    states: Sequence[TeacherState],
    student: nn.Module | None,
    momentum: float | Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Let the teachers' networks follow the student by one step. momentum: for this step, instead of their own."""
    if is_tracing():
        from . import traced

        return traced.trace_teachers(networks, states, student, momentum, found_inf)
    step.step_teachers(networks, states, student, momentum, found_inf)
