"""Notices that something a plan rests on is no longer so.

That is all that an update could read: which tensors networks hold, under which names, in modules of which class, and of
each tensor its address, shape, strides, dtype and device. It is compared just before each update, so that a plan is
true whatever happened before, and need keep nothing alive.

The comparison is one loop in C++ (csrc/watch.cpp), or the same in Python where there is no extension, a torch without
the interface that it reads, or a module that keeps its tensors otherwise than torch.nn.Module does.
"""

import ctypes
import os
from array import array
from collections.abc import Iterator, Sequence
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from . import distributed
from .backends import extension

# What the loop calls of torch's stable C interface, in the order in which csrc/watch.cpp takes them.
_FUNCTIONS = ("data_ptr", "dim", "sizes", "strides", "dtype", "device_type", "device_index", "layout")
# What increment_version calls for each tensor, which takes six times as long with the loop around it in Python. Its
# name says what it takes: torch::autograd::impl::bump_version(at::Tensor const&).
_BUMP_VERSION = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"

Roots = Sequence[nn.Module | list[Tensor]]


def is_plain(tensor: Tensor) -> bool:
    """Whether its address and strides say where its elements are. A subclass keeps that to itself."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested


class Watch:
    """What networks and lists of tensors are at this moment. Keeps none of them alive, and no memory of theirs."""

    def __init__(self, roots: Roots) -> None:
        self._compiled = _compiled(roots)
        if self._compiled is None:
            self._seen = _seen(roots)
            tensors = self._look(roots)
        else:
            tensors = self._compiled.look(roots)
            self._others = self._compiled.others
            if not self._others:
                self.look = self._compiled.look
                return
            self._answers = self._answers_of(tensors)
            self._look = self._look_for_others
        self._sharded = [i for i, tensor in enumerate(tensors) if distributed.is_distributed(tensor)]
        self._shards = Watch([self._shards_of(tensors)]) if self._sharded else None

    def look(self, roots: Roots) -> list[Tensor] | None:
        """All tensors that the roots hold now, in an order that stays, and behind them the shards of those that are
        DTensors; None if anything is not as it was."""
        tensors = self._look(roots)
        if tensors is None or self._shards is None:
            return tensors
        shards = self._shards.look([self._shards_of(tensors)])
        return None if shards is None else tensors + shards

    def _look(self, roots: Roots) -> list[Tensor] | None:
        tensors = [tensor for _, tensor in _held(roots) if tensor is not None]
        return tensors if _seen(roots) == self._seen else None

    def _look_for_others(self, roots: Roots) -> list[Tensor] | None:
        tensors = self._compiled.look(roots)
        return None if tensors is None or self._answers_of(tensors) != self._answers else tensors

    def _shards_of(self, tensors: list[Tensor]) -> list[Tensor]:
        return distributed.shards([tensors[i] for i in self._sharded])

    def _answers_of(self, tensors: list[Tensor]) -> list[object]:
        return _answers(tensors[i] for i in self._others)


def increment_versions(tensors: list[Tensor], numbers: array) -> None:
    """Tell autograd that these of the tensors are written. numbers: of int64.

    It does not see what a kernel writes: a backward pass that needs the old values is to raise.
    """
    if not _reads_torch or not extension.C.bump_versions(tensors, *numbers.buffer_info()):
        torch.autograd.graph.increment_version([tensors[i] for i in numbers])


def _seen(roots: Roots) -> list[object]:
    held = list(_held(roots))
    return [what for what, _ in held] + _answers(tensor for _, tensor in held if tensor is not None)


def _held(roots: Roots) -> Iterator[tuple[object, Tensor | None]]:
    """Names, classes and tensors, in the order of csrc/watch.cpp."""
    for root in roots:
        if isinstance(root, list):
            yield len(root), None
            yield from ((ref(type(tensor)), tensor) for tensor in root)
        else:
            yield from _held_by(root)


def _held_by(module: nn.Module) -> Iterator[tuple[object, Tensor | None]]:
    yield ref(type(module)), None  # weak: a class can lead to a network
    for own in (module._parameters, module._buffers):
        yield len(own), None
        for name, tensor in own.items():
            yield (name, ref(type(tensor))), tensor
    yield len(module._modules), None
    for name, child in module._modules.items():
        yield name, None
        if child is not None:
            yield from _held_by(child)


def _answers(tensors: Iterator[Tensor]) -> list[object]:
    """What each says of itself, and which of those that keep their address to themselves are one object."""
    answers: list[object] = []
    first: dict[int, int] = {}
    kind = distributed.dtensor()
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, kind):
            answers.append(distributed.spec(tensor))  # the rest its shard says
            continue
        where: object = first.setdefault(id(tensor), i)
        shape, layout = None, tensor.layout
        if not isinstance(tensor, UninitializedTensorMixin):
            shape = tensor.shape
            if is_plain(tensor):
                where, layout = tensor.data_ptr(), tensor.stride()
        answers.append((where, shape, layout, tensor.dtype, tensor.device))
    return answers


def _compiled(roots: Roots) -> object | None:
    if not _reads_torch:
        return None
    try:
        return extension.C.Watch(roots)
    except ValueError:
        return None


def _use_torch() -> bool:
    """Tell the extension where torch's C interface is, and a tensor's address in its Python object.

    Returns whether both were found.
    """
    if extension.C is None:
        return False
    try:
        library = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
        functions = [getattr(library, f"aoti_torch_get_{name}") for name in _FUNCTIONS]
        strided = library.aoti_torch_layout_strided()
    except (OSError, AttributeError):
        return False
    tensors = [torch.empty(3), torch.empty(2, 2).t(), nn.Parameter(torch.empty(0)), torch.ones(1, dtype=torch.int64)]
    size = Tensor.__basicsize__
    # The word of each object that is the address of its TensorImpl.
    offsets = [
        {at for at in range(0, size, 8) if int.from_bytes(ctypes.string_at(id(t) + at, 8), "little") == t._cdata}
        for t in tensors
    ]
    common = set.intersection(*offsets)
    if len(common) != 1:
        return False
    addresses = [_address(function) for function in functions]
    bump, offset = _address(getattr(library, _BUMP_VERSION, None)), common.pop()
    extension.C.use_torch(addresses, strided, Tensor, nn.Parameter, offset, bump)
    return True


def _address(function: object) -> int:
    """0 for none."""
    return ctypes.cast(function, ctypes.c_void_p).value if function is not None else 0


_reads_torch = _use_torch()
