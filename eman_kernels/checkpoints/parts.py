"""The parts of a checkpoint that may be the teacher's network."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .layouts import Rank, identify, names_average


@dataclass(frozen=True)
class Recognised:
    """What load_ema_checkpoint found in a file.

    Attributes:
        layout: the library or kind of network that the average comes from.
        prefix: what precedes the network's tensor names in the file; nested keys and the positions in lists are joined
            with dots.
        step: the number of updates, now also the teacher's; None if neither the file nor the caller gives it.
        kept: names of the teacher's tensors that this layout does not store, and which were left unchanged.
    """

    layout: str
    prefix: str
    step: int | None
    kept: tuple[str, ...] = ()


@dataclass
class Part:
    """A part of the checkpoint, paired with the network."""

    rank: Rank
    found: Recognised
    tensors: dict[str, Any]  # keyed by the network's names
    matched: int  # how many of the network's tensors the part has
    mismatches: list[str]  # why it cannot be loaded


class Names:
    """The names of a network's tensors in its state_dict, and in files of libraries that join them without dots."""

    def __init__(self, network: nn.Module) -> None:
        self.own: dict[str, Any] = network.state_dict(keep_vars=True)
        self.parameters = list(network.parameters())
        ids = {id(parameter) for parameter in self.parameters}
        # Everything that files of parameters do not store: buffers, and the extra state of modules.
        self.others = [name for name, value in self.own.items() if id(value) not in ids]
        # A library's spelling of the parameters -> the network's names, by what it replaces the dots with.
        self.joined = {
            separator: {name.replace(".", separator): name for name in self.own if name not in self.others}
            for separator in ("", "_")
        }
        if self.joined["_"] == self.joined[""]:  # the names have no dots
            del self.joined["_"]

    def count_prefixes(self, leaves: dict[str, Any]) -> dict[str, int]:
        """For each prefix: how many of the network's names are under it."""
        counts: dict[str, int] = {}
        for path, value in leaves.items():
            parts = path.split(".")
            for i in range(len(parts)):
                name = ".".join(parts[i:])
                if name in self.own and (isinstance(value, Tensor) or not isinstance(self.own[name], Tensor)):
                    prefix = "".join(f"{part}." for part in parts[:i])
                    counts[prefix] = counts.get(prefix, 0) + 1
        return counts

    def count_joined(self, leaves: dict[str, Any], anywhere: bool) -> dict[tuple[str, str], int]:
        """For each prefix and separator: how many parameters are under it with joined names. Unless ``anywhere``, only
        prefixes that name an average count."""
        counts: dict[tuple[str, str], int] = {}
        for path, value in leaves.items():
            *keys, last = path.split(".")
            if isinstance(value, Tensor) and (anywhere or any(map(names_average, keys))):
                for separator, names in self.joined.items():
                    for i in range(len(last)):
                        if last[i:] in names:
                            place = path[: len(path) - len(last) + i], separator
                            counts[place] = counts.get(place, 0) + 1
        return counts


def is_checkpoint(value: object) -> bool:
    """Whether it has entries: a mapping, a list, or a network or other object with a state_dict."""
    return isinstance(value, Mapping | list | tuple) or callable(getattr(value, "state_dict", None))


def flatten_keys(value: Any, path: str = "") -> dict[str, Any]:
    """The values of a nested checkpoint, keyed by their path: keys and positions in lists joined with dots.

    Networks are replaced by their state_dict, optimizers are left out, and lists of tensors are values.
    """
    if callable(getattr(value, "state_dict", None)):
        value = value.state_dict()
    if isinstance(value, Mapping) and not path.endswith("_extra_state"):
        if value.keys() >= {"state", "param_groups"}:
            return {}
        items = list(value.items())
    elif isinstance(value, list | tuple) and any(map(is_checkpoint, value)):
        items = list(enumerate(value))
    else:
        return {path: value}
    leaves: dict[str, Any] = {}
    for key, each in items:
        leaves |= flatten_keys(each, f"{path}.{key}" if path else str(key))
    return leaves


def find_parts(names: Names, leaves: dict[str, Any], selects: Callable[[str], bool], anywhere: bool) -> list[Part]:
    """All parts under the selected prefixes. ``anywhere``: joined names need no key that names an average."""
    parts = [
        _pair_list(names, leaves, path) for path in leaves if selects(path) and _is_network_list(names, leaves, path)
    ]
    counts = {prefix: n for prefix, n in names.count_prefixes(leaves).items() if selects(prefix)}
    # Ignore prefixes matched by only a few names; "weight" occurs everywhere.
    enough = max(counts.values(), default=0) / 2
    parts += [_pair_names(names, leaves, prefix, n) for prefix, n in counts.items() if n >= enough]
    for (prefix, separator), n in names.count_joined(leaves, anywhere).items():
        if prefix not in counts and selects(prefix) and n >= len(names.parameters):
            parts.append(_pair_joined(names, leaves, prefix, separator))
    return parts


def _pair_names(names: Names, leaves: dict[str, Any], prefix: str, matched: int) -> Part:
    under = {path.removeprefix(prefix): value for path, value in leaves.items() if path.startswith(prefix)}
    tensors = {name: value for name, value in under.items() if name in names.own or isinstance(value, Tensor)}
    return _complete(names, leaves, prefix, tensors, matched)


def _pair_joined(names: Names, leaves: dict[str, Any], prefix: str, separator: str) -> Part:
    spelled = names.joined[separator]
    tensors = {name: leaves[prefix + joined] for joined, name in spelled.items() if prefix + joined in leaves}
    # Without dots a prefix may end anywhere ("1" in "10weight"): it must account for all tensors beside it.
    mapping = prefix[: prefix.rfind(".") + 1]
    for path, value in leaves.items():
        paired = path.startswith(prefix) and path.removeprefix(prefix) in spelled
        if path.startswith(mapping) and not paired and isinstance(value, Tensor) and value.numel() > 1:
            tensors[path.removeprefix(mapping)] = value
    return _complete(names, leaves, prefix, tensors, len(spelled))


def _complete(names: Names, leaves: dict[str, Any], prefix: str, tensors: dict[str, Any], matched: int) -> Part:
    """The part under the prefix, with the tensors that a file may leave out."""
    # safetensors stores only one of several tied tensors: use it for the others.
    present = {id(names.own[name]): value for name, value in tensors.items() if name in names.own}
    tensors |= {name: present[id(t)] for name, t in names.own.items() if name not in tensors and id(t) in present}
    # A file of parameters has no buffers at all; old files have no num_batches_tracked.
    only_parameters = not any(name in tensors for name in names.others)
    kept = [name for name in names.others if only_parameters or name.endswith("num_batches_tracked")]
    kept = [name for name in kept if name not in tensors]
    rank, layout, step = identify(prefix, leaves)
    found = Recognised(layout, prefix, step, tuple(kept))
    tensors |= {name: names.own[name] for name in kept}
    return Part(rank, found, tensors, matched, _list_mismatches(names.own, tensors))


def _is_network_list(names: Names, leaves: dict[str, Any], path: str) -> bool:
    """Whether the value is a list of a network's tensors without names, at least by its key."""
    value = leaves[path]
    if not isinstance(value, list | tuple) or not all(isinstance(each, Tensor) for each in value):
        return False
    fits = len(value) in (len(names.parameters), len(names.own))
    return any(each.dim() for each in value) and (fits or any(map(names_average, path.split("."))))


def _pair_list(names: Names, leaves: dict[str, Any], path: str) -> Part:
    """Pair a list of tensors with the network's parameters, or with its whole state_dict, by position."""
    rank, layout, step = identify(f"{path}.", leaves)
    tensors, own = leaves[path], names.own
    if len(tensors) == len(names.parameters):
        by_id = {id(parameter): tensor for parameter, tensor in zip(names.parameters, tensors, strict=True)}
        loaded = {name: by_id.get(id(value), value) for name, value in own.items()}
        found = Recognised(layout, path, step, tuple(names.others))
        return Part(rank, found, loaded, len(tensors), _list_mismatches(own, loaded))
    found = Recognised(layout, path, step)
    if len(tensors) == len(own):
        loaded = dict(zip(own, tensors, strict=True))
        return Part(rank, found, loaded, len(tensors), _list_mismatches(own, loaded))
    reason = (
        f"{layout}'s list has {len(tensors)} tensors and the teacher has {len(names.parameters)} parameters: they are "
        "paired by position, so the numbers must be equal"
    )
    return Part(rank, found, {}, 0, [reason])


def _list_mismatches(own: dict[str, Any], tensors: dict[str, Any]) -> list[str]:
    """The errors of load_state_dict, found before anything is written."""
    mismatches = [f"{name}: missing from the checkpoint" for name in own if name not in tensors]
    mismatches += [f"{name}: missing from the teacher" for name in tensors if name not in own]
    for name, value in own.items():
        shapes = [tuple(getattr(each, "shape", ())) for each in (value, tensors.get(name, value))]
        if shapes[0] != shapes[1]:
            mismatches.append(f"{name}: the teacher's shape is {shapes[0]}, the checkpoint's is {shapes[1]}")
    return mismatches
