"""A low-precision copy of a teacher, for its forward; the update writes it in the same pass as the teacher."""

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from ..networks.guards import Guards
from ..networks.sharding import check_cast_with_sharding
from ..networks.tensors import has_memory, local_part

_versions = attrgetter("_version")


class LowPrecisionCopy:
    """Half-precision copies of those tensors of a network (the master) that its forward reads in that precision.

    Tracks per copy whether its source tensor has changed, except for writes that torch does not track.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        _check_half(dtype)
        self.dtype = dtype
        self.tensors: dict[str, Tensor] = {}  # by one name per module that holds the source tensor
        self.copies: list[Tensor] = []  # each once
        self._statistics: list[tuple[ref[nn.Module], int]] = []  # BatchNorms with the index of a copy of a buffer
        self._guards: Guards | None = None
        self._recorded = _record_versions([])

    def follow(self, master: nn.Module) -> list[Tensor]:
        """Refresh stale copies; make all of them again if the network has changed.

        Returns the source tensors of `copies`, in the same order.
        """
        found = self._guards.check([master]) if self._guards is not None else None
        # Copies that were made within a transform of torch.func are of no use outside of it.
        if found is None or not all(map(has_memory, self.copies[:1])):
            return self._make_copies(master)
        masters = [found[i] for i in self._indices]
        self.refresh(masters)
        return masters

    def refresh(self, masters: Sequence[Tensor]) -> None:
        """Refresh stale copies, given the source tensors, whose shapes and dtypes have not changed."""
        ids, versions, storages = self._recorded
        current = list(map(id, masters)), list(map(_versions, masters))
        if current == (ids, versions) and not any(map(StorageWeakRef.expired, storages)):
            return
        stale = [
            i
            for i, (recorded, now, storage) in enumerate(
                zip(zip(ids, versions, strict=True), zip(*current, strict=True), storages, strict=True)
            )
            if recorded != now or storage.expired()
        ]
        with torch.no_grad():
            copies, sources = ([local_part(tensors[i]) for i in stale] for tensors in (self.copies, masters))
            torch._foreach_copy_(copies, sources)
        self._recorded = _record_versions(masters)

    def run(self, master: nn.Module, args: Any, kwargs: Any) -> Any:
        """The output of the network with the copies in place of its tensors.

        What the forward itself writes (counters, codebooks, running ranges) is written back to the network.
        """
        masters = self.follow(master)
        versions = list(map(_versions, self.copies))
        substituted = dict(self.tensors)
        try:
            return functional_call(master, substituted, args, kwargs, tie_weights=False)
        finally:
            written = {i for i, copy in enumerate(self.copies) if copy._version != versions[i]}
            # batch_norm does not increment the versions of the statistics that it writes.
            written |= {i for norm, i in self._statistics if (module := norm()) is not None and module.training}
            for i in written:
                write_changes(masters[i], self.copies[i])
            for name, tensor in substituted.items():
                if tensor is not self.tensors[name]:
                    assign_back(master, name, tensor, self.tensors[name].dtype)

    def mark_written(self, masters: Sequence[Tensor], which: Sequence[int]) -> None:
        """These source tensors have been written together with their copies."""
        _, versions, _ = self._recorded
        for i in which:
            versions[i] = masters[i]._version

    def mark_stale(self) -> None:
        """Mark all copies stale."""
        self._recorded[1][:] = [-1] * len(self.copies)

    def _make_copies(self, master: nn.Module) -> list[Tensor]:
        check_cast_with_sharding(master)
        guards = Guards([master])
        found = guards.check([master])
        index_of = {id(tensor): index for index, tensor in enumerate(found)}
        copies: dict[tuple[int, torch.dtype], Tensor] = {}
        tensors: dict[str, Tensor] = {}
        norms = {id(buffer): ref(m) for m in master.modules() if isinstance(m, _BatchNorm) for buffer in m.buffers()}
        # In inference mode the new tensors could not be written after it has ended.
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor, dtype in tensors_to_cast(master, self.dtype):
                key = id(tensor), dtype
                if key not in copies:
                    copies[key] = tensor.to(dtype)
                tensors[name] = copies[key]
        indices, made = [index_of[key] for key, _ in copies], list(copies.values())
        masters = [found[i] for i in indices]
        # In one statement, so that an interrupt does not leave some of them inconsistent with the others.
        self._statistics, self._guards, self._indices, self.tensors, self.copies, self._recorded = (
            [(norms[key], i) for i, (key, _) in enumerate(copies) if key in norms],
            guards,
            indices,
            tensors,
            made,
            _record_versions(masters),
        )
        return masters


def _record_versions(masters: Sequence[Tensor]) -> tuple[list[int], list[int], list[StorageWeakRef]]:
    """What shows that a tensor has been written since.

    The id and version of a new tensor can equal those of a freed one. Its storage cannot while a weak reference to it
    is held, which keeps no elements in memory. A weak reference to the tensor itself would make swap_tensors fail.
    """
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in masters]
    return list(map(id, masters)), list(map(_versions, masters)), storages


def forward_in_low_precision(master: nn.Module, copy: LowPrecisionCopy | None, cast: torch.dtype, args: Any) -> Any:
    """The network's output in this dtype for args, a pair of arguments and keyword arguments, which are cast to it.

    copy: None in a graph that is being traced. It cannot check whether a copy is stale, so it casts what it reads.
    """
    if torch.jit.is_tracing():
        raise RuntimeError(
            "torch.jit.trace, and torch.onnx.export(dynamo=False), cannot trace a teacher with cast=. Trace a network "
            f"in low precision, copy.deepcopy(teacher.module).to({cast}), or teacher.module itself, in float32; or use "
            "torch.export.export(teacher, ...)"
        )
    args, kwargs = tree_map_only(Tensor, lambda t: t.to(cast) if t.is_floating_point() else t, args)
    if copy is not None:
        return copy.run(master, args, kwargs)
    low = {name: tensor.to(dtype) for name, tensor, dtype in tensors_to_cast(master, cast)}
    before = dict(low)
    out = functional_call(master, low, args, kwargs, tie_weights=False)
    if not torch.compiler.is_exporting():
        # Versions cannot be compared in a graph: every buffer of which there is a copy is compared.
        for name, buffer in master.named_buffers():
            if name in low:
                if low[name] is before[name]:
                    write_changes(buffer, low[name])
                else:
                    assign_back(master, name, low[name], before[name].dtype)
    return out


def write_changes(master: Tensor, copy: Tensor) -> None:
    """Write to the tensor what differs from it in a copy of lower precision. Other elements keep their precision."""
    with torch.no_grad():
        master.copy_(torch.where(copy != master.to(copy.dtype), copy.to(master.dtype), master))


def assign_back(network: nn.Module, name: str, new: Tensor, dtype: torch.dtype) -> None:
    """Give the network's tensor the value that a forward has assigned to its name. dtype: of the tensor's copy."""
    prefix, _, own = name.rpartition(".")
    module = network.get_submodule(prefix)
    held = module._parameters if own in module._parameters else module._buffers
    master = held[own]
    if new.shape == master.shape and new.device == master.device:
        with torch.no_grad():
            master.copy_(torch.where(new != master.to(dtype), new.to(master.dtype), master))
    else:
        held[own] = new.detach().to(master.dtype)


def tensors_to_cast(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Name, tensor and target dtype of each tensor that a forward in this precision reads through a copy.

    BatchNorm stays in float32, which torch accepts beside half-precision inputs, unless it has the dtype already.
    """
    # Each module once: with two names, functional_call would leave copies in place of its tensors.
    for prefix, child in module.named_modules():
        is_norm = isinstance(child, _BatchNorm)
        own = {"prefix": prefix, "recurse": False, "remove_duplicate": False}
        for name, tensor in chain(child.named_parameters(**own), child.named_buffers(**own)):
            wanted = torch.float32 if is_norm and tensor.dtype != dtype else dtype
            if tensor.is_floating_point() and tensor.element_size() >= dtype.itemsize and tensor.dtype != wanted:
                yield name, tensor, wanted


def check_cast(module: nn.Module, cast: torch.dtype | None) -> None:
    """Raises ValueError if cast is not a half-precision dtype that is narrower than the network."""
    if cast is None:
        return
    _check_half(cast)
    check_cast_with_sharding(module)
    tensors = chain(module.parameters(), module.buffers())
    widest = max((t.element_size() for t in tensors if t.is_floating_point()), default=0)
    if widest <= cast.itemsize:
        raise ValueError(
            f"cast={cast} is not narrower than the teacher, so no copy is needed; omit cast, or use "
            "dtype=torch.float32 for the teacher"
        )


def _check_half(cast: torch.dtype) -> None:
    if cast not in (torch.bfloat16, torch.float16):
        raise ValueError(f"cast must be torch.bfloat16 or torch.float16, but is {cast}")
