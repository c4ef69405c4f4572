"""Loads the average from a checkpoint that another library wrote; averages of any length from stored snapshots."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from ..networks.errors import NOTHING_WRITTEN, raise_differences
from ..networks.names import unwrap
from ..teacher import EMANTeacher, EMANTeachers
from ..update.loading import all_or_nothing, needs_step
from ..update.state import check_step_number
from .layouts import OPTIMIZER_KEYS, Rank, names_average
from .parts import Names, Part, Recognised, find_parts, flatten_keys, is_checkpoint
from .snapshots import Snapshots
from .synthesis import synthesize

__all__ = ["Recognised", "Snapshots", "load_ema_checkpoint", "synthesize"]

_MAX_LISTED = 5  # names in an error message


def load_ema_checkpoint(
    teacher: nn.Module,
    state_dict: Mapping[str, Any] | Sequence[Any] | nn.Module,
    *,
    key: str | None = None,
    prefix: str | None = None,
    index: int | None = None,
    step: int | None = None,
) -> Recognised:
    """Load the average from a checkpoint into the teacher, and the step if the file stores one.

    Supports files of timm (``state_dict_ema``), torch's AveragedModel, ema-pytorch, torch_ema, diffusers' EMAModel,
    Lightning's WeightAveraging, NeMo, mmengine, latent-diffusion, EDM2, YOLO, FixMatch-pytorch, mean-teacher, I-JEPA,
    BasicSR, MoCo v3, the published EMAN code (MoCo, BYOL and FixMatch), EMANTeacher, other files in which the average
    has a telling name, and plain networks. The average may be nested at any depth, in lists too, and have any prefix,
    such as those of DDP, torch.compile and a LightningModule. If a file holds both an average and its student, the
    average is loaded. A plain network is loaded only if nothing else in the file could be its average, and a student
    only if ``key`` or ``prefix`` selects it.

    Args:
        teacher: the teacher to write to. It keeps its step if neither the file nor ``step`` gives one. The plain
            network of ``eman_update_`` is accepted too; its step is only returned.
        state_dict: the result of ``torch.load(path, weights_only=True)`` or ``safetensors.torch.load_file(path)``.
            Networks in it, and a network in its place, count as their state_dict(). Lists of tensors without names,
            such as those of torch_ema and diffusers, are paired with the parameters in order. If there are no buffers,
            those of the teacher are left unchanged.
        key: use only what is stored under this key; nested keys are joined with dots: ``"ema.emas.1"``.
        prefix: what precedes the network's tensor names, such as ``"critic_target."``. Keys above it may be omitted.
        index: which average to load if several match, such as those of a list: its position among the parts that match.
        step: the number of updates that the average has had; default: that of the file. Required if the file has none,
            the teacher's step is 0 and its momentum is a schedule that depends on the step: starting at 0, WarmUp would
            keep a tenth of the loaded average at the first update, and others nothing. The alternative is to set
            ``teacher.step`` before.

    Returns:
        A description of what was found, readable when printed.

    Raises:
        RuntimeError: the teacher is swapped.
        TypeError: the teacher is not a network, or state_dict is not a loaded checkpoint.
        ValueError: nothing in the checkpoint matches the teacher, several parts match it, the matching part has missing
            tensors, unexpected tensors or other shapes, which the message lists, only the student has been found, or
            ``step`` is required. Nothing has been written.

    >>> student = nn.Linear(2, 2)
    >>> averaged = torch.optim.swa_utils.AveragedModel(student)
    >>> averaged.update_parameters(student)
    >>> found = load_ema_checkpoint(EMANTeacher(student), averaged.state_dict())
    >>> found.layout, found.step
    ("torch's AveragedModel", 1)
    """
    network = _find_network(teacher)
    if not is_checkpoint(state_dict):
        raise TypeError(
            f"state_dict must be a loaded checkpoint, but is a {type(state_dict).__name__}: pass "
            f"torch.load(path, weights_only=True) or safetensors.torch.load_file(path). {NOTHING_WRITTEN}"
        )
    if step is not None:
        check_step_number(step)
    names, leaves = Names(network), flatten_keys(state_dict)
    part = _choose_part(names, leaves, key, prefix, index)
    found = part.found if step is None else Recognised(part.found.layout, part.found.prefix, step, part.found.kept)
    if not isinstance(teacher := unwrap(teacher), EMANTeacher):
        with all_or_nothing(network, [], part.tensors):
            network.load_state_dict(part.tensors)
        return found
    if found.step is None and needs_step(teacher.state):
        raise ValueError(
            f"the checkpoint has no step, and the momentum {teacher.momentum} depends on it: the next update would be "
            "the first of the schedule and could discard the loaded average. Pass step=, the number of updates that "
            f"the average has had; a large number such as 1_000_000 if it is unknown. {NOTHING_WRITTEN}"
        )
    state = {f"module.{name}": tensor for name, tensor in part.tensors.items()}
    if found.step is not None:
        state["_extra_state"] = torch.tensor(found.step)
    teacher.load_state_dict(state)
    return found


def _find_network(teacher: object) -> nn.Module:
    """The plain network to write to."""
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be an EMANTeacher or a network, but is a {type(teacher).__name__}")
    teacher = unwrap(teacher)
    if isinstance(teacher, EMANTeachers):
        raise TypeError("pass one of the EMANTeachers, such as teachers[0]")
    return teacher.module if isinstance(teacher, EMANTeacher) else teacher


def _choose_part(names: Names, leaves: dict[str, Any], key: str | None, prefix: str | None, index: int | None) -> Part:
    """The part of the checkpoint to load. Raises ValueError if it is not certain, or does not match."""

    def selects(place: str) -> bool:
        place = f".{place.rstrip('.')}."
        ends = place.endswith(f".{prefix.rstrip('.')}.") if prefix else prefix is None or place == ".."
        return ends and (key is None or f".{key}." in place)

    explicit = key is not None or prefix is not None
    parts = find_parts(names, leaves, selects, anywhere=explicit)
    if not parts:
        others = find_parts(names, leaves, lambda place: True, anywhere=False) if explicit else []
        raise ValueError(_no_match_message(names, leaves, others, key, prefix))
    best = min(part.rank for part in parts)
    complete = [part for part in parts if not part.mismatches]
    candidates = [part for part in complete if part.rank == best]
    if not candidates:
        part = max((part for part in parts if part.rank == best), key=lambda part: part.matched)
        where = f" under {part.found.prefix!r}" if part.found.prefix else ""
        remedy = f"To load another network of this file instead, pass {_list_prefixes(complete)}." if complete else ""
        head = f"the checkpoint's network{where} does not match the teacher's; nothing was written."
        raise_differences(part.mismatches, remedy, head)
    if index is None and len(candidates) > 1:
        raise ValueError(
            f"several parts of the checkpoint match the teacher: {_list_prefixes(candidates, '')}. Choose one by key=, "
            f"by prefix=, or by its position in this list, index=. {NOTHING_WRITTEN}"
        )
    if index is not None and not -len(candidates) <= index < len(candidates):
        raise ValueError(
            f"index is {index}, but the parts that match are {_list_prefixes(candidates, '')}. {NOTHING_WRITTEN}"
        )
    part = candidates[index or 0]
    if not explicit and best == Rank.STUDENT:
        raise ValueError(
            f"only the student has been found, under {part.found.prefix!r}, and no average that matches the teacher. "
            f"To load the student, pass {_list_prefixes([part])}. {NOTHING_WRITTEN}"
        )
    if not explicit and best == Rank.PLAIN and (suspects := _find_unrecognised_averages(names, leaves, part)):
        raise ValueError(
            f"the network under {part.found.prefix!r} matches the teacher, but the average may be another part, which "
            f"is not recognized: {', '.join(suspects[:_MAX_LISTED])}. Pass the state_dict() of the average alone, or "
            f"{_list_prefixes([part])} to load the network that matches. {NOTHING_WRITTEN}"
        )
    return part


def _find_unrecognised_averages(names: Names, leaves: dict[str, Any], part: Part) -> list[str]:
    """What else than the part could be an average: by its name, or because it has the shapes of the network."""
    prefix, suspects = part.found.prefix, []
    # The shapes of the tensors beside the part, by the outermost key that is not one of the part's.
    shapes: dict[str, list[torch.Size]] = {}
    for path, value in leaves.items():
        if path.startswith(prefix) if prefix else path in names.own:
            continue
        keys = path.split(".")
        if not OPTIMIZER_KEYS.isdisjoint(keys):
            continue
        if _may_hold_network(value) and any(map(names_average, keys)):
            suspects.append(repr(path) if isinstance(value, Tensor) else f"{path!r} ({type(value).__name__})")
        elif isinstance(value, Tensor) and value.dim():
            pairs = zip(keys, prefix.split("."), strict=False)
            common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
            shapes.setdefault(".".join(keys[: common + 1]), []).append(value.shape)
    networks = [names.parameters, [t for t in names.own.values() if isinstance(t, Tensor)]]
    own = [[tensor.shape for tensor in tensors if tensor.dim()] for tensors in networks]
    return suspects + [f"{place!r} (tensors of the same shapes)" for place, each in shapes.items() if each in own]


def _may_hold_network(value: object) -> bool:
    """Whether the value is a tensor, an unknown object, or a list of such, and not a setting."""
    if isinstance(value, Tensor):
        return value.numel() > 1
    if isinstance(value, list | tuple | set):
        return any(map(_may_hold_network, value))
    return not isinstance(value, int | float | complex | str | bytes | torch.dtype | torch.device | type | None)


def _no_match_message(
    names: Names, leaves: dict[str, Any], others: list[Part], key: str | None, prefix: str | None
) -> str:
    given = [f"{name}={value!r}" for name, value in (("key", key), ("prefix", prefix)) if value is not None]
    where = f" under {' and '.join(given)}" if given else ""
    objects = [f"{path!r} is a {type(v).__name__}" for path, v in leaves.items() if _is_opaque(v)]
    return (
        f"nothing in the checkpoint{where} matches the teacher; nothing was written. The checkpoint has "
        f"{_summarize_names(leaves)}; the teacher has {_summarize_names(names.own)}."
        + (f" Parts that match: {_list_prefixes(others)}." if others else "")
        + (f" {', '.join(objects[:_MAX_LISTED])}: pass the state_dict() of the network in it." if objects else "")
    )


def _is_opaque(value: object) -> bool:
    return not isinstance(value, Tensor | list | tuple | set | Mapping) and _may_hold_network(value)


def _list_prefixes(parts: list[Part], argument: str = "prefix=") -> str:
    return ", ".join(f"{argument}{part.found.prefix!r}" for part in parts)


def _summarize_names(names: Mapping[str, Any]) -> str:
    listed = ", ".join(list(names)[:_MAX_LISTED])
    return f"{len(names)} names, such as {listed}" if names else "no names"
