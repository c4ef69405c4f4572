"""Takes over the average in a checkpoint that another library wrote."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .pairing import check
from .teacher import EMANTeacher

# What leads the names of the averaged network, the step's name beside it, and who writes it so.
_WITH_STEP = [
    ("ema_model.", "step", "ema-pytorch"),
    ("state_dict.", "averaging_state.n_averaged", "Lightning's WeightAveraging"),
    ("module.", "n_averaged", "torch's AveragedModel"),
    ("module.", "_extra_state", "EMANTeacher"),
]
# Names under which an average lies, and who gives them.
_AVERAGES = {
    "state_dict_ema": "timm",
    "model_ema": "timm",
    "ema_model": "ema-pytorch",
    "encoder_k": "EMAN's MoCo",
    "target_net": "EMAN's BYOL",
    "ema": "EMAN's FixMatch",
    "teacher": "a teacher",
}
# And those under which the student lies beside it.
_STUDENTS = {"online_model", "current_model_state", "encoder_q", "online_net", "main", "student"}
_LISTED = 5


@dataclass(frozen=True)
class Recognised:
    """What load_ema_checkpoint found in a file.

    layout: whose it is. prefix: what leads the network's names there, with a dot between what lies within another.
    step: the updates made, which the teacher has taken; None where the file has none. kept: the names of the teacher's
    tensors that such a file does not have, and which are as they were.
    """

    layout: str
    prefix: str
    step: int | None
    kept: tuple[str, ...] = ()


def load_ema_checkpoint(teacher: EMANTeacher, state_dict: Mapping[str, Any]) -> Recognised:
    """Load the average that a checkpoint holds into the teacher, whichever library wrote it, and the step if it has
    one.

    Known are the files of timm (``state_dict_ema``), torch's AveragedModel, ema-pytorch, torch_ema, diffusers'
    EMAModel, Lightning's WeightAveraging, the published EMAN code (MoCo, BYOL and FixMatch), EMANTeacher, and a plain
    network, at any depth and under any prefix, such as those of DDP, torch.compile and a LightningModule. Where the
    average and its student are in one file, the average is taken.

    Args:
        teacher: the teacher that is written. Without a step in the file its own stays as it is.
        state_dict: what ``torch.load(path, weights_only=True)`` or ``safetensors.torch.load_file(path)`` gives. The
            lists of torch_ema and diffusers have no names: they are paired with the parameters in order, and the
            buffers stay.

    Returns:
        What was recognised; print it.

    Raises:
        RuntimeError: the teacher is swapped.
        ValueError: nothing matches the teacher, several places match it, or the one that does lacks tensors, has others
            or has other shapes, all of which are listed. Nothing has been written.

    >>> student = nn.Linear(2, 2)
    >>> averaged = torch.optim.swa_utils.AveragedModel(student)
    >>> averaged.update_parameters(student)
    >>> found = load_ema_checkpoint(EMANTeacher(student), averaged.state_dict())
    >>> found.layout, found.step
    ("torch's AveragedModel", 1)
    """
    leaves = _leaves(state_dict)
    shadows = [path for path, value in leaves.items() if f".{path}".endswith(".shadow_params") and type(value) is list]
    if len(shadows) > 1:
        raise ValueError(_several(shadows))
    if shadows:
        found, tensors = _of_list(teacher.module, leaves, shadows[0])
    else:
        found, tensors = _of_names(teacher.module, leaves)
    where = f"under {found.prefix!r} " if found.prefix else ""
    head = f"what the checkpoint has {where}is not the teacher's network; nothing was written."
    check([], _differences(teacher.module.state_dict(keep_vars=True), tensors), head=head)
    state = {f"module.{name}": tensor for name, tensor in tensors.items()}
    if found.step is not None:
        state["_extra_state"] = torch.tensor(found.step)
    teacher.load_state_dict(state)
    return found


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """All that a nested checkpoint holds, by the names on the way there."""
    leaves: dict[str, Any] = {}
    for key, value in mapping.items():
        nested = isinstance(value, Mapping) and not str(key).endswith("_extra_state")
        leaves |= _leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return leaves


def _of_names(module: nn.Module, leaves: dict[str, Any]) -> tuple[Recognised, dict[str, Any]]:
    own = module.state_dict(keep_vars=True)
    # How many of the network's names follow each prefix.
    counts: dict[str, int] = {}
    for path in leaves:
        parts = path.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in own:
                prefix = "".join(f"{part}." for part in parts[:i])
                counts[prefix] = counts.get(prefix, 0) + 1
    if not counts:
        raise ValueError(
            f"nothing in the checkpoint matches the teacher; nothing was written. The checkpoint has {_some(leaves)}; "
            f"the teacher has {_some(own)}."
        )
    # A stray name is no place: "weight" may be anywhere.
    places = [_recognise(prefix, leaves) for prefix, n in counts.items() if 2 * n >= max(counts.values())]
    first = min(rank for rank, _ in places)
    known = {found: _network(found.prefix, leaves, own) for rank, found in places if rank == first}
    if len(known) > 1:
        whole = [found for found, tensors in known.items() if not _differences(own, tensors)]
        if len(whole) > 1:
            raise ValueError(_several([found.prefix for found in whole]))
        known = {found: known[found] for found in whole} or known
    found = max(known, key=lambda found: counts[found.prefix])
    return found, known[found]


def _recognise(prefix: str, leaves: dict[str, Any]) -> tuple[int, Recognised]:
    """Whose average lies there, if it is one, and how likely it is the one that is meant; 0 before 1 before 2."""
    parts = prefix.split(".")[:-1]
    beginnings = ["".join(f"{part}." for part in parts[:i]) for i in range(len(parts) + 1)]
    for beginning in reversed(beginnings):
        for lead, name, layout in _WITH_STEP:
            if prefix[len(beginning) :].startswith(lead) and beginning + name in leaves:
                return 0, Recognised(layout, prefix, int(leaves[beginning + name]))
    for part in reversed(parts):
        if part in _AVERAGES:
            return 0, Recognised(_AVERAGES[part], prefix, None)
        if part in _STUDENTS:
            return 2, Recognised("a student", prefix, None)
    return 1, Recognised("a plain network", prefix, None)


def _network(prefix: str, leaves: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What lies under the prefix, by the network's names."""
    under = {path.removeprefix(prefix): value for path, value in leaves.items() if path.startswith(prefix)}
    tensors = {name: value for name, value in under.items() if name in own or isinstance(value, Tensor)}
    # Of tied tensors safetensors writes one.
    present = {id(own[name]): value for name, value in tensors.items() if name in own}
    return tensors | {name: present[id(t)] for name, t in own.items() if name not in tensors and id(t) in present}


def _of_list(module: nn.Module, leaves: dict[str, Any], path: str) -> tuple[Recognised, dict[str, Any]]:
    beginning = path.removesuffix("shadow_params")
    layout, step = "torch_ema", leaves.get(f"{beginning}num_updates")
    if f"{beginning}optimization_step" in leaves:
        layout, step = "diffusers", leaves[f"{beginning}optimization_step"]
    tensors, names = leaves[path], [name for name, _ in module.named_parameters()]
    if len(tensors) != len(names):
        raise ValueError(
            f"{layout}'s list has {len(tensors)} tensors and the teacher {len(names)} parameters: they are paired by "
            f"position, and must be as many. Nothing was written."
        )
    loaded = dict(zip(names, tensors, strict=True))
    own = module.state_dict(keep_vars=True)
    parameters = {id(parameter) for parameter in module.parameters()}
    kept = tuple(name for name, value in own.items() if id(value) not in parameters)
    by_id = {id(parameter): loaded[name] for name, parameter in module.named_parameters()}
    return Recognised(layout, path, step, kept), {name: by_id.get(id(value), value) for name, value in own.items()}


def _differences(own: dict[str, Any], tensors: dict[str, Any]) -> list[str]:
    """What load_state_dict would say, which writes what fits before it raises. A counter that is missing it bears."""
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    differences = [f"{name}: the checkpoint has none" for name in missing]
    differences += [f"{name}: the teacher has none" for name in tensors if name not in own]
    for name, value in own.items():
        shapes = [tuple(getattr(each, "shape", ())) for each in (value, tensors.get(name, value))]
        if shapes[0] != shapes[1]:
            differences.append(f"{name}: the teacher's shape is {shapes[0]}, the checkpoint's {shapes[1]}")
    return differences


def _several(places: list[str]) -> str:
    return (
        f"the checkpoint has the teacher's network in several places: {', '.join(map(repr, places))}. Pass one of "
        "them. Nothing was written."
    )


def _some(names: Mapping[str, Any]) -> str:
    listed = ", ".join(list(names)[:_LISTED])
    return f"{len(names)} names, like {listed}" if names else "none"
