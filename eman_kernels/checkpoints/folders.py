"""Folders of stored networks: snapshots, ema-pytorch's PostHocEMA folders, and a run's own checkpoints."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..networks.errors import raise_differences, warn_user
from ..schedules import PowerFunction
from .layouts import EMA_PYTORCH, find_counted_prefix
from .parts import flatten_keys

SUFFIX = ".safetensors"
_TORCH_SUFFIXES = {".pt", ".pth", ".ckpt", ".bin"}
_WHOLE_NETWORKS = ("state_dict", "model")  # keys under which a run's own checkpoints store the network


@dataclass(frozen=True)
class StoredNetwork:
    """A file of a folder.

    Attributes:
        step: the number of updates of a stored average; what the file's name says for a run's own checkpoints.
        sigma_rel: the length of a stored average; None for the student itself.
        copied: names of floating-point tensors that are not averaged.
        shapes: of the network's tensors, by name.
    """

    path: Path
    step: int
    sigma_rel: float | None
    copied: frozenset[str]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def gamma(self) -> float:
        return PowerFunction(self.sigma_rel).gamma

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The network's tensors with their names, one at a time."""
        read = _open(self.path).read
        for name in self.shapes:
            yield name, read(name)


class DamagedFile(ValueError):
    """A file that cannot be read."""


def read_folder(folder: str | Path, sigma_rels: Sequence[float] = ()) -> list[StoredNetwork]:
    """The networks in a folder, sorted by step. Reads only the headers of the files.

    A damaged file is left out, with a warning that names it. sigma_rels: the lengths of ema-pytorch's averages, whose
    files do not store them. Raises ValueError for a file that is not known to be a network of some step.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    suffixes = {SUFFIX, *_TORCH_SUFFIXES}
    paths = sorted(path for path in folder.iterdir() if path.suffix in suffixes and path.is_file())
    networks = []
    for path in paths:
        try:
            networks.append(_describe(path, sigma_rels))
        except DamagedFile as error:
            warn_user(f"{error}. It is left out.")
    _check_kinds(networks)
    return sorted(networks, key=lambda network: (network.step, network.sigma_rel or 0))


def check_same_network(network: Mapping[str, tuple[int, ...]], others: Sequence[StoredNetwork], who: str) -> None:
    """Raises ValueError if other files hold tensors with other names or shapes than the network."""
    for other in others:
        if other.shapes != network:
            differences = [f"{name}: only in {who}" for name in network if name not in other.shapes]
            differences += [f"{name}: only in {other.path.name}" for name in other.shapes if name not in network]
            differences += [
                f"{name}: the shape is {network[name]} in {who} and {shape} in {other.path.name}"
                for name, shape in other.shapes.items()
                if name in network and network[name] != shape
            ]
            raise_differences(differences, "Use one folder per run.", f"{other.path} is a file of another network.")


def write_network(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name and rename it, so that a killed run leaves no half file."""
    temporary = path.with_name(path.name + ".tmp")
    import_safetensors().torch.save_file(tensors, temporary, {"format": "pt"} | metadata)
    temporary.replace(path)


def import_safetensors() -> Any:
    """Raises ImportError with the remedy if safetensors is not installed."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "snapshots are safetensors files, and safetensors is not installed: pip install 'eman_kernels[posthoc]'"
        ) from error
    return safetensors


def _describe(path: Path, sigma_rels: Sequence[float]) -> StoredNetwork:
    file = _open(path)
    if "sigma_rel" in file.metadata:
        copied = frozenset(json.loads(file.metadata["copied"]))
        step, sigma_rel = int(file.metadata["step"]), float(file.metadata["sigma_rel"])
        return StoredNetwork(path, step, sigma_rel, copied, file.shapes)
    if file.library == EMA_PYTORCH:
        numbers = re.fullmatch(r"(\d+)\.(\d+)", path.stem)
        if numbers is None or int(numbers[1]) >= len(sigma_rels):
            raise ValueError(
                f"{path} is a file of ema-pytorch, which does not store the lengths of its averages: pass "
                "stored_sigma_rels=, the sigma_rels of its PostHocEMA in the same order"
            )
        copied = frozenset(name for name in file.shapes if name.endswith("num_batches_tracked"))  # float16 there
        return StoredNetwork(path, int(numbers[2]), sigma_rels[int(numbers[1])], copied, file.shapes)
    if file.library is not None:
        raise ValueError(f"{path} is an average of {file.library}, and its length is not known")
    numbers = re.findall(r"\d+", path.stem)
    step = file.metadata.get("ss_steps", numbers[-1] if numbers else None)  # ss_steps: sd-scripts, musubi-tuner
    if step is None:
        raise ValueError(f"{path}: its name has no step, as in checkpoint-1000{path.suffix}. Rename or move it.")
    return StoredNetwork(path, int(step), None, frozenset(), file.shapes)


def _check_kinds(networks: list[StoredNetwork]) -> None:
    """Raises ValueError unless the networks are all averages or all students, each stored once."""
    averages = [network for network in networks if network.sigma_rel is not None]
    if averages and len(averages) < len(networks):
        student = next(network for network in networks if network.sigma_rel is None)
        raise ValueError(
            f"{averages[0].path} is a stored average, and {student.path} is not: use one folder for each kind"
        )
    seen: dict[tuple[int, float | None], StoredNetwork] = {}
    for network in networks:
        other = seen.setdefault((network.step, network.sigma_rel), network)
        if other is not network:
            raise ValueError(f"{other.path} and {network.path} are both of step {network.step}: remove one of them")


@dataclass
class _File:
    """An opened file, mapped into memory until this object is freed."""

    read: Callable[[str], Tensor]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    library: str | None = None  # that wrote an average with its number of updates


def _open(path: Path) -> _File:
    return _open_safetensors(path) if path.suffix == SUFFIX else _open_torch(path)


def _open_safetensors(path: Path) -> _File:
    safetensors = import_safetensors()
    try:
        file = safetensors.safe_open(path, "pt")
    except safetensors.SafetensorError as error:
        raise DamagedFile(f"{path} is damaged: {error}") from error
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return _File(file.get_tensor, shapes, file.metadata() or {})


def _open_torch(path: Path) -> _File:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise DamagedFile(f"{path} cannot be loaded with weights_only=True: {reason}") from error
    if not isinstance(state, Mapping):
        raise DamagedFile(f"{path} holds no network")
    leaves = flatten_keys(state)
    prefix, library = find_counted_prefix(leaves)
    if library is None:
        prefix = next((f"{key}." for key in _WHOLE_NETWORKS if isinstance(state.get(key), Mapping)), "")
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in leaves.items()
        if name.startswith(prefix) and isinstance(tensor, Tensor)
    }
    if not tensors:
        raise DamagedFile(f"{path} holds no network")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return _File(tensors.__getitem__, shapes, {}, library)
