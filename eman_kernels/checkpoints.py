"""Loads the average from a checkpoint that another library wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .networks.errors import raise_differences
from .teacher import EMANTeacher


class _CountedLayout(NamedTuple):
    """How a library stores an average together with its number of updates."""

    prefix: str  # precedes the tensor names of the averaged network
    step_key: str  # the key of the number of updates, at the same nesting level as the prefix
    library: str  # reported as Recognised.layout


_COUNTED_LAYOUTS = [
    _CountedLayout("ema_model.", "step", "ema-pytorch"),
    _CountedLayout("state_dict.", "averaging_state.n_averaged", "Lightning's WeightAveraging"),
    _CountedLayout("module.", "n_averaged", "torch's AveragedModel"),
    _CountedLayout("module.", "_extra_state", "EMANTeacher"),
]
# Keys that hold an average without a number of updates -> the library that uses the key.
_AVERAGE_KEYS = {
    "state_dict_ema": "timm",
    "model_ema": "timm",
    "ema_model": "ema-pytorch",
    "encoder_k": "EMAN's MoCo",
    "target_net": "EMAN's BYOL",
    "ema": "EMAN's FixMatch",
    "teacher": "a teacher",
}
# Keys that hold the student, which files store beside the average.
_STUDENT_KEYS = {"online_model", "current_model_state", "encoder_q", "online_net", "main", "student"}
_MAX_LISTED = 5  # names in an error message


@dataclass(frozen=True)
class Recognised:
    """What load_ema_checkpoint found in a file.

    Attributes:
        layout: the library or kind of network that the average comes from.
        prefix: what precedes the network's tensor names in the file; nested keys are joined with dots.
        step: the number of updates, now also the teacher's; None if the file does not store it.
        kept: names of the teacher's tensors that this layout does not store, and which were left unchanged.
    """

    layout: str
    prefix: str
    step: int | None
    kept: tuple[str, ...] = ()


def load_ema_checkpoint(teacher: EMANTeacher, state_dict: Mapping[str, Any]) -> Recognised:
    """Load the average from a checkpoint into the teacher, and the step if the file stores one.

    Supports files of timm (``state_dict_ema``), torch's AveragedModel, ema-pytorch, torch_ema, diffusers' EMAModel,
    Lightning's WeightAveraging, the published EMAN code (MoCo, BYOL and FixMatch) and EMANTeacher, and plain networks.
    The average may be nested at any depth and have any prefix, such as those of DDP, torch.compile and a
    LightningModule. If a file holds both an average and its student, the average is loaded.

    Args:
        teacher: the teacher to write to. It keeps its step if the file does not store one.
        state_dict: the result of ``torch.load(path, weights_only=True)`` or ``safetensors.torch.load_file(path)``. The
            lists of torch_ema and diffusers have no names, so they are paired with the parameters in order, and
            buffers are left unchanged.

    Returns:
        A description of what was found, readable when printed.

    Raises:
        RuntimeError: the teacher is swapped.
        ValueError: nothing in the checkpoint matches the teacher, several parts match it, or the matching part has
            missing tensors, unexpected tensors or other shapes, which the message lists. Nothing has been written.

    >>> student = nn.Linear(2, 2)
    >>> averaged = torch.optim.swa_utils.AveragedModel(student)
    >>> averaged.update_parameters(student)
    >>> found = load_ema_checkpoint(EMANTeacher(student), averaged.state_dict())
    >>> found.layout, found.step
    ("torch's AveragedModel", 1)
    """
    leaves = _flatten_keys(state_dict)
    shadows = [path for path, value in leaves.items() if f".{path}".endswith(".shadow_params") and type(value) is list]
    if len(shadows) > 1:
        raise ValueError(_ambiguity_message(shadows))
    if shadows:
        found, tensors = _find_by_position(teacher.module, leaves, shadows[0])
    else:
        found, tensors = _find_by_names(teacher.module, leaves)
    where = f" under {found.prefix!r}" if found.prefix else ""
    head = f"the checkpoint's network{where} does not match the teacher's; nothing was written."
    raise_differences(_list_mismatches(teacher.module.state_dict(keep_vars=True), tensors), head=head)
    state = {f"module.{name}": tensor for name, tensor in tensors.items()}
    if found.step is not None:
        state["_extra_state"] = torch.tensor(found.step)
    teacher.load_state_dict(state)
    return found


def _flatten_keys(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested checkpoint, keyed by their path: keys joined with dots."""
    leaves: dict[str, Any] = {}
    for key, value in mapping.items():
        nested = isinstance(value, Mapping) and not str(key).endswith("_extra_state")
        leaves |= _flatten_keys(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return leaves


def _find_by_names(module: nn.Module, leaves: dict[str, Any]) -> tuple[Recognised, dict[str, Any]]:
    """Find the part of the checkpoint whose tensor names match the network's; prefer averages to students."""
    own = module.state_dict(keep_vars=True)
    # For each prefix: how many of the network's tensor names occur under it.
    counts: dict[str, int] = {}
    for path in leaves:
        parts = path.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in own:
                prefix = "".join(f"{part}." for part in parts[:i])
                counts[prefix] = counts.get(prefix, 0) + 1
    if not counts:
        raise ValueError(
            f"nothing in the checkpoint matches the teacher; nothing was written. The checkpoint has "
            f"{_summarize_names(leaves)}; the teacher has {_summarize_names(own)}."
        )
    # Ignore prefixes matched by only a few names; "weight" occurs everywhere.
    ranked = [_rank_prefix(prefix, leaves) for prefix, n in counts.items() if 2 * n >= max(counts.values())]
    best = min(rank for rank, _ in ranked)
    candidates = {found: _select_tensors(found.prefix, leaves, own) for rank, found in ranked if rank == best}
    if len(candidates) > 1:
        complete = [found for found, tensors in candidates.items() if not _list_mismatches(own, tensors)]
        if len(complete) > 1:
            raise ValueError(_ambiguity_message([found.prefix for found in complete]))
        candidates = {found: candidates[found] for found in complete} or candidates
    found = max(candidates, key=lambda found: counts[found.prefix])
    return found, candidates[found]


def _rank_prefix(prefix: str, leaves: dict[str, Any]) -> tuple[int, Recognised]:
    """Identify what is stored under the prefix, and rank it: 0 for an average, 1 for a plain network, 2 for a student.

    The lowest rank in a file is loaded.
    """
    parts = prefix.split(".")[:-1]
    parents = ["".join(f"{part}." for part in parts[:i]) for i in range(len(parts) + 1)]
    for parent in reversed(parents):
        for layout in _COUNTED_LAYOUTS:
            if prefix[len(parent) :].startswith(layout.prefix) and parent + layout.step_key in leaves:
                return 0, Recognised(layout.library, prefix, int(leaves[parent + layout.step_key]))
    for part in reversed(parts):
        if part in _AVERAGE_KEYS:
            return 0, Recognised(_AVERAGE_KEYS[part], prefix, None)
        if part in _STUDENT_KEYS:
            return 2, Recognised("a student", prefix, None)
    return 1, Recognised("a plain network", prefix, None)


def _select_tensors(prefix: str, leaves: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The tensors under the prefix, keyed by the network's names."""
    under = {path.removeprefix(prefix): value for path, value in leaves.items() if path.startswith(prefix)}
    tensors = {name: value for name, value in under.items() if name in own or isinstance(value, Tensor)}
    # safetensors stores only one of several tied tensors: use it for the others.
    present = {id(own[name]): value for name, value in tensors.items() if name in own}
    return tensors | {name: present[id(t)] for name, t in own.items() if name not in tensors and id(t) in present}


def _find_by_position(module: nn.Module, leaves: dict[str, Any], path: str) -> tuple[Recognised, dict[str, Any]]:
    """Pair the list of torch_ema or diffusers at ``path`` with the network's parameters."""
    parent = path.removesuffix("shadow_params")
    layout, step = "torch_ema", leaves.get(f"{parent}num_updates")
    if f"{parent}optimization_step" in leaves:
        layout, step = "diffusers", leaves[f"{parent}optimization_step"]
    tensors, names = leaves[path], [name for name, _ in module.named_parameters()]
    if len(tensors) != len(names):
        raise ValueError(
            f"{layout}'s list has {len(tensors)} tensors and the teacher has {len(names)} parameters: they are paired "
            "by position, so the numbers must be equal. Nothing was written."
        )
    loaded = dict(zip(names, tensors, strict=True))
    own = module.state_dict(keep_vars=True)
    parameters = {id(parameter) for parameter in module.parameters()}
    kept = tuple(name for name, value in own.items() if id(value) not in parameters)
    by_id = {id(parameter): loaded[name] for name, parameter in module.named_parameters()}
    return Recognised(layout, path, step, kept), {name: by_id.get(id(value), value) for name, value in own.items()}


def _list_mismatches(own: dict[str, Any], tensors: dict[str, Any]) -> list[str]:
    """The errors of load_state_dict, found before anything is written. A missing num_batches_tracked is tolerated."""
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    mismatches = [f"{name}: missing from the checkpoint" for name in missing]
    mismatches += [f"{name}: missing from the teacher" for name in tensors if name not in own]
    for name, value in own.items():
        shapes = [tuple(getattr(each, "shape", ())) for each in (value, tensors.get(name, value))]
        if shapes[0] != shapes[1]:
            mismatches.append(f"{name}: the teacher's shape is {shapes[0]}, the checkpoint's is {shapes[1]}")
    return mismatches


def _ambiguity_message(prefixes: list[str]) -> str:
    return (
        f"several parts of the checkpoint match the teacher: {', '.join(map(repr, prefixes))}. Pass only one of them. "
        "Nothing was written."
    )


def _summarize_names(names: Mapping[str, Any]) -> str:
    listed = ", ".join(list(names)[:_MAX_LISTED])
    return f"{len(names)} names, such as {listed}" if names else "no names"
