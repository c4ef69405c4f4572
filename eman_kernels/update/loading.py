"""Loading a checkpoint all or nothing: torch itself copies what fits before it refuses the rest."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin

from ..networks.errors import warn_user
from ..networks.names import iterate_names
from .state import TeacherState

# Schedules are compared at these steps.
_STEPS = (0, *(10**n for n in range(8)))


def check_any_name_matches(network: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Raises RuntimeError if a teacher's state_dict has no name of this network."""
    own = {f"module.{name}" for name, _ in iterate_names(network)}
    if own and not own & state_dict.keys():
        raise RuntimeError(
            "nothing was loaded: no name of the teacher is in the state_dict, which has "
            f"{', '.join(list(state_dict)[:3]) or 'none'}; the teacher has {', '.join(sorted(own)[:3])}. Load the "
            "state_dict of a plain network by load_ema_checkpoint(teacher, state_dict)"
        )


def needs_step(state: TeacherState) -> bool:
    """Whether the step is still 0 and the momentum depends on it, so that a loaded average also needs its step."""
    if state.step_is_given or int(state.step) or not callable(state.momentum):
        return False
    try:
        return len({float(state.momentum(step)) for step in _STEPS}) > 1
    except Exception:  # a schedule that does not take numbers, or not these
        return True


def fill_in_step(state_dict: dict[str, Any], prefix: str, state: TeacherState) -> None:
    """A file without a step leaves the teacher's unchanged. Warn if the step is 0 and the momentum depends on it."""
    name = f"{prefix}_extra_state"
    if name in state_dict:
        return
    if needs_step(state) and any(each.startswith(f"{prefix}module.") for each in state_dict):
        warn_user(
            f"the state_dict has no step ({name}), and the momentum {state.momentum} depends on it: the next update is "
            "the first of the schedule and may discard the loaded average. Set teacher.step to the number of updates "
            "that the average has had; if it is set before loading, this warning is not shown"
        )
    state_dict[name] = torch.tensor(int(state.step), device="cpu")


@contextmanager
def all_or_nothing(module: nn.Module, states: Iterable[TeacherState]) -> Iterator[None]:
    """If loading into the module raises, restore it and the steps of the teachers in it."""
    recorded = [(state, int(state.step), state.lock.unrestored) for state in states]
    try:
        with _restore_tensors_on_error(module):
            yield
    except BaseException:
        for state, step, unrestored in recorded:
            state.set_step(step)
            state.lock.unrestored = unrestored
        raise


@contextmanager
def _restore_tensors_on_error(module: nn.Module) -> Iterator[None]:
    """Holds a copy of every tensor in the meantime."""
    held = [(own, dict(own)) for child in module.modules() for own in (child._parameters, child._buffers)]
    tensors = {
        id(t): t for _, own in held for t in own.values() if not isinstance(t, UninitializedTensorMixin | NoneType)
    }
    values = [(t, _version_of(t), t.detach().clone()) for t in tensors.values()]
    try:
        yield
    except BaseException:
        for own, recorded in held:
            own.clear()
            own.update(recorded)
        with torch.no_grad():
            for tensor, version, value in values:
                if _version_of(tensor) != version or version is None:
                    tensor.copy_(value)
        raise


def _version_of(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
