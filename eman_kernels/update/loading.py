"""Loading a checkpoint all or nothing: torch itself copies what fits before it refuses the rest."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from ..networks.errors import warn_user
from ..networks.names import iterate_names
from .caching import find_caching_modules, renew_caches
from .copying import dtype_of_kind
from .state import TeacherState

# Schedules are compared at these steps.
_STEPS = (0, *(10**n for n in range(8)))


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
def all_or_nothing(module: nn.Module, states: Iterable[TeacherState], state_dict: Mapping[str, Any]) -> Iterator[None]:
    """If loading this state_dict into the module raises, or loads no tensor, restore the module and the teachers in it.

    Raises RuntimeError if no tensor was loaded.
    """
    recorded = [(state, int(state.step), state.counts(), state.lock.unrestored) for state in states]

    # Hooks may rename what state_dict holds, so torch's loading itself reports what was missing.
    def check_anything_loaded(module: nn.Module, keys: Any) -> None:
        own = set(_iterate_saved_names(module))
        if own and own <= {*keys.missing_keys}:
            raise RuntimeError(
                "nothing was loaded: no name of the teacher is in the state_dict, which has "
                f"{', '.join(list(state_dict)[:3]) or 'none'}; the teacher has {', '.join(sorted(own)[:3])}. Load the "
                "state_dict of a plain network by load_ema_checkpoint(teacher, state_dict)"
            )

    handle = module.register_load_state_dict_post_hook(check_anything_loaded)
    try:
        with _restore_extra_states_on_error(module), _restore_tensors_on_error(module):
            yield
    except BaseException:
        for state, step, counts, unrestored in recorded:
            state.set_step(step)
            state.set_counts(counts)
            state.lock.unrestored = unrestored
        raise
    finally:
        handle.remove()


def keep_dtypes(network: nn.Module, dtype: torch.dtype, state_dict: dict[str, Any], prefix: str) -> None:
    """Convert the values of a state_dict that will replace the network's tensors to the dtypes of those tensors.

    Values whose name is not one of the network's, which a hook may rename, get the given dtype. prefix: of the
    network's names.
    """
    own = {prefix + name: tensor.dtype for name, tensor in iterate_names(network)}
    for name, value in state_dict.items():
        if name.startswith(prefix) and isinstance(value, Tensor):
            state_dict[name] = value.to(dtype_of_kind(value, own.get(name, dtype)))


def renew_caches_after_load(teacher: nn.Module, _: object) -> None:
    """A post-hook of load_state_dict: what the teacher's modules have cached was derived from other values."""
    renew_caches(find_caching_modules(teacher.module))


def _iterate_saved_names(module: nn.Module) -> Iterator[str]:
    """The names of the module's tensors while it loads. num_batches_tracked is left out, because BatchNorm never
    reports it as missing from a state_dict without versions."""
    for prefix, child in module.named_modules(remove_duplicate=False):
        skipped = child._non_persistent_buffers_set | {"num_batches_tracked"}
        for name, tensor in [*child._parameters.items(), *child._buffers.items()]:
            if tensor is not None and name not in skipped:
                yield f"{prefix}.{name}".lstrip(".")


@contextmanager
def _restore_extra_states_on_error(module: nn.Module) -> Iterator[None]:
    """Attributes too, which a child's own set_extra_state or _load_from_state_dict may assign."""
    held = [(attributes, dict(attributes)) for attributes in map(vars, module.modules())]
    modules = [(attributes, dict(attributes)) for attributes in (child._modules for child in module.modules())]
    extra = [
        (child, deepcopy(child.get_extra_state()))
        for child in module.modules()
        if type(child).get_extra_state is not nn.Module.get_extra_state
    ]
    try:
        yield
    except BaseException:
        for attributes, recorded in [*held, *modules]:
            for name in attributes.keys() - recorded.keys():
                del attributes[name]
            attributes.update(recorded)
        for child, state in extra:
            child.set_extra_state(state)
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
