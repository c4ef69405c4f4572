"""A teacher's copy in a half type, for its forward; the update writes it along with the teacher."""

import copy
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .pairing import Watch


class LowPrecision:
    """A network's copy in a half type, which shares what need not be one: BatchNorm, integers, and half tensors."""

    def __init__(self, master: nn.Module, dtype: torch.dtype) -> None:
        norms = [module for module in master.modules() if isinstance(module, _BatchNorm)]
        kept = {id(tensor) for norm in norms for tensor in _tensors(norm)}
        self._masters = list(_tensors(master))
        replaced = {id(t): t if id(t) in kept else _narrowed(t, dtype) for t in self._masters}
        self.module = copy.deepcopy(master, memo=replaced).eval()
        self._watch = Watch(master)
        self.seen()

    def seen(self) -> None:
        """It is what the master is now."""
        self._versions = self._places()

    def is_true(self) -> bool:
        """Whether nobody but the update has changed the master since."""
        return not self._watch.changed() and self._versions == self._places()

    def _places(self) -> list[tuple[int, int]]:
        return [(tensor._version, tensor.data_ptr()) for tensor in self._masters]


def _narrowed(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.element_size() <= dtype.itemsize:
        return tensor
    low = tensor.detach().to(dtype)
    return nn.Parameter(low, requires_grad=False) if isinstance(tensor, nn.Parameter) else low


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())


def check_cast(module: nn.Module, cast: torch.dtype | None) -> None:
    """Raises ValueError for a cast that would not make a narrower copy of the network."""
    if cast is None:
        return
    if cast not in (torch.bfloat16, torch.float16):
        raise ValueError(f"cast must be torch.bfloat16 or torch.float16, and is {cast}")
    widest = max((t.element_size() for t in _tensors(module) if t.is_floating_point()), default=0)
    if widest <= cast.itemsize:
        raise ValueError(
            f"cast={cast} is no narrower than the teacher, which would be its own copy; leave cast away, or take "
            "dtype=torch.float32 for the teacher"
        )
