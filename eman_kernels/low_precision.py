"""A teacher's tensors in a half type, for its forward; the update writes them along with the teacher."""

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm

from . import distributed
from .watch import Watch

_versions = attrgetter("_version")


class LowPrecision:
    """Copies in a half type of those tensors of a network, the master, that its forward is to read in that type.

    It knows of each whether the master was written since, but for writes that torch does not record.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        _check_half(dtype)
        self.dtype = dtype
        self.tensors: dict[str, Tensor] = {}  # by a name of each module that holds them
        self.copies: list[Tensor] = []  # each once
        self._watch: Watch | None = None
        self._seen = _seen([])

    def follow(self, master: nn.Module) -> list[Tensor]:
        """Make true what is not, and all of it anew for another network, or one that is no longer what it was.

        Returns the master's tensors that `copies` are of, in that order.
        """
        found = self._watch.look([master]) if self._watch is not None else None
        if found is None:
            return self._make(master)
        masters = [found[i] for i in self._at]
        self.refresh(masters)
        return masters

    def refresh(self, masters: Sequence[Tensor]) -> None:
        """`follow`, where these are known to be the master's tensors, of the shapes and dtypes that they had."""
        ids, versions, storages = self._seen
        seen = list(map(id, masters)), list(map(_versions, masters))
        if seen == (ids, versions) and not any(map(StorageWeakRef.expired, storages)):
            return
        stale = [
            i
            for i, (was, now, storage) in enumerate(
                zip(zip(ids, versions, strict=True), zip(*seen, strict=True), storages, strict=True)
            )
            if was != now or storage.expired()
        ]
        with torch.no_grad():
            copies, fresh = ([distributed.local(its[i]) for i in stale] for its in (self.copies, masters))
            torch._foreach_copy_(copies, fresh)
        self._seen = _seen(masters)

    def written(self, masters: Sequence[Tensor], which: Sequence[int]) -> None:
        """These of the masters have been written, and their copies with them."""
        _, versions, _ = self._seen
        for i in which:
            versions[i] = masters[i]._version

    def forget(self) -> None:
        """Take none of the copies for true."""
        self._seen[1][:] = [-1] * len(self.copies)

    def _make(self, master: nn.Module) -> list[Tensor]:
        distributed.check_cast(master)
        watch = Watch([master])
        found = watch.look([master])
        at = {id(tensor): number for number, tensor in enumerate(found)}
        copies: dict[tuple[int, torch.dtype], Tensor] = {}
        tensors: dict[str, Tensor] = {}
        # Inference mode would make copies that cannot be written once it has ended.
        with torch.inference_mode(False), torch.no_grad():
            for name, tensor, dtype in narrowed(master, self.dtype):
                key = id(tensor), dtype
                if key not in copies:
                    copies[key] = tensor.to(dtype)
                tensors[name] = copies[key]
        numbers, made = [at[key] for key, _ in copies], list(copies.values())
        masters = [found[i] for i in numbers]
        # Together: of an interrupt between them one would be left that does not fit the others.
        self._watch, self._at, self.tensors, self.copies, self._seen = watch, numbers, tensors, made, _seen(masters)
        return masters


def _seen(masters: Sequence[Tensor]) -> tuple[list[int], list[int], list[StorageWeakRef]]:
    """By which a write is noticed. An object's address and its version can come again with other values; a storage's
    cannot while a weak reference to it is held, which keeps no memory of elements. One to the tensor would forbid
    swap_tensors."""
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in masters]
    return list(map(id, masters)), list(map(_versions, masters)), storages


def narrowed(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """Name, tensor and dtype of what a forward in this half type must not read as it is.

    BatchNorm stays in float32, which torch's takes beside half inputs, or in the half type itself.
    """
    # Each module once: exchanged under two names, its tensors would come back as copies.
    for prefix, child in module.named_modules():
        is_norm = isinstance(child, _BatchNorm)
        own = {"prefix": prefix, "recurse": False, "remove_duplicate": False}
        for name, tensor in chain(child.named_parameters(**own), child.named_buffers(**own)):
            wanted = torch.float32 if is_norm and tensor.dtype != dtype else dtype
            if tensor.is_floating_point() and tensor.element_size() >= dtype.itemsize and tensor.dtype != wanted:
                yield name, tensor, wanted


def check_cast(module: nn.Module, cast: torch.dtype | None) -> None:
    """Raises ValueError for a cast that would not make a narrower copy of the network."""
    if cast is None:
        return
    _check_half(cast)
    distributed.check_cast(module)
    tensors = chain(module.parameters(), module.buffers())
    widest = max((t.element_size() for t in tensors if t.is_floating_point()), default=0)
    if widest <= cast.itemsize:
        raise ValueError(
            f"cast={cast} is no narrower than the teacher, which would be its own copy; leave cast away, or take "
            "dtype=torch.float32 for the teacher"
        )


def _check_half(cast: torch.dtype) -> None:
    if cast not in (torch.bfloat16, torch.float16):
        raise ValueError(f"cast must be torch.bfloat16 or torch.float16, and is {cast}")
