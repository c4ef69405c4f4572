"""Guards: whether everything that a plan depends on is still as it was when the plan was made.

A plan depends on which tensors the networks hold, under which names, in modules of which class, and on the address,
shape, strides, dtype and device of each tensor. All of it is compared immediately before each update. So a plan is
never run with stale addresses, whatever happened in between, and does not need to keep any tensor alive.

The comparison is one loop in C++ (csrc/guards.cpp). It reads torch's own objects, where a search at import has found
each field by its value, and calls torch's C interface otherwise. The same loop in Python takes its place if there is no
extension, if this torch does not have the C interface that the extension reads, or if a module does not store its
tensors in the dicts of torch.nn.Module.
"""

import ctypes
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from operator import or_
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

from ..backends import extension
from .tensors import dtensor_class, is_distributed, is_plain, local_shards, sharding_spec

# Functions of torch's stable C interface that the loop calls, in the order that csrc/guards.cpp expects.
_FUNCTIONS = ("data_ptr", "dim", "sizes", "strides", "dtype", "device_type", "device_index", "layout")
# torch::autograd::impl::bump_version(at::Tensor const&), which increment_version calls for each tensor. Calling it from
# a loop in C++ takes a sixth of the time.
_BUMP_VERSION = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"

# The search for the dispatch keys in a TensorImpl ends here. They are its last field, at byte 168 in torch 2.14.
_MAX_IMPL_BYTES = 192
_MAX_STORAGE_BYTES = 64  # the same for the memory's size in a StorageImpl, which is at byte 48
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)

Roots = Sequence[nn.Module | list[Tensor]]


class Guards:
    """A snapshot of networks and lists of tensors, to be compared with what they are later.

    Keeps none of them alive, nor their memory. The C++ loop compares plain tensors. Other tensors (subclasses, lazy
    or sparse ones) are compared in Python, and the shards of DTensors by guards of their own.
    """

    def __init__(self, roots: Roots) -> None:
        self._compiled = _compile_guards(roots)
        if self._compiled is None:
            self._recorded = _record(roots)
            tensors = self._check_held(roots)
        else:
            tensors = self._compiled.check(roots)
            self._opaque = self._compiled.opaque
            if not self._opaque:
                self.check = self._compiled.check
                return
            self._recorded = self._record_opaque(tensors)
            self._check_held = self._check_compiled
        self._sharded = [i for i, tensor in enumerate(tensors) if is_distributed(tensor)]
        self._shard_guards = Guards([self._shards_of(tensors)]) if self._sharded else None

    def check(self, roots: Roots) -> list[Tensor] | None:
        """All tensors that the roots hold now, in a fixed order, followed by the shards of those that are DTensors.

        None if anything has changed.
        """
        tensors = self._check_held(roots)
        if tensors is None or self._shard_guards is None:
            return tensors
        shards = self._shard_guards.check([self._shards_of(tensors)])
        return None if shards is None else tensors + shards

    def _check_held(self, roots: Roots) -> list[Tensor] | None:
        tensors = [tensor for _, tensor in _walk(roots) if tensor is not None]
        return tensors if _record(roots) == self._recorded else None

    def _check_compiled(self, roots: Roots) -> list[Tensor] | None:
        tensors = self._compiled.check(roots)
        return None if tensors is None or self._record_opaque(tensors) != self._recorded else tensors

    def _shards_of(self, tensors: list[Tensor]) -> list[Tensor]:
        return local_shards([tensors[i] for i in self._sharded])

    def _record_opaque(self, tensors: list[Tensor]) -> list[object]:
        return _record_tensors(tensors[i] for i in self._opaque)


def increment_versions(tensors: list[Tensor], numbers: array) -> None:
    """Tell autograd that these tensors are written. numbers: their indices, as int64.

    Autograd does not see what a kernel writes, but a backward pass that needs the old values must raise.
    """
    if not _extension_reads_torch or not extension.C.bump_versions(tensors, *numbers.buffer_info()):
        torch.autograd.graph.increment_version([tensors[i] for i in numbers])


# The loop in Python. It walks the roots in the same order as csrc/guards.cpp and records, for each step, a value that
# compares unequal after any change that an update could notice.


def _record(roots: Roots) -> list[object]:
    walked = list(_walk(roots))
    return [what for what, _ in walked] + _record_tensors(tensor for _, tensor in walked if tensor is not None)


def _walk(roots: Roots) -> Iterator[tuple[object, Tensor | None]]:
    """Names, classes and tensors of all roots."""
    for root in roots:
        if isinstance(root, list):
            yield len(root), None
            yield from ((ref(type(tensor)), tensor) for tensor in root)
        else:
            yield from _walk_module(root)


def _walk_module(module: nn.Module) -> Iterator[tuple[object, Tensor | None]]:
    yield ref(type(module)), None  # weak, because a class can keep a network alive
    for held in (module._parameters, module._buffers):
        yield len(held), None
        for name, tensor in held.items():
            yield (name, ref(type(tensor))), tensor
    yield len(module._modules), None
    for name, child in module._modules.items():
        yield name, None
        if child is not None:
            yield from _walk_module(child)


def _record_tensors(tensors: Iterable[Tensor]) -> list[object]:
    """What each tensor says of itself. If it does not expose its address: the first index at which the same object
    occurs."""
    records: list[object] = []
    first_index: dict[int, int] = {}
    dtensor = dtensor_class()
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, dtensor):
            records.append(sharding_spec(tensor))  # the guards of its shard compare the rest
            continue
        where: object = first_index.setdefault(id(tensor), i)
        shape, layout = None, tensor.layout
        if not isinstance(tensor, UninitializedTensorMixin):
            shape = tensor.shape
            if is_plain(tensor):
                where, layout = (tensor.data_ptr(), tensor.is_neg()), tensor.stride()
        records.append((where, shape, layout, tensor.dtype, tensor.device))
    return records


def _compile_guards(roots: Roots) -> object | None:
    """The guards in C++; None if they cannot read these roots."""
    if not _extension_reads_torch:
        return None
    try:
        return extension.C.Guards(roots)
    except ValueError:
        return None


def _connect_extension() -> bool:
    """Tell the extension where torch's C interface is, where a Python tensor stores the address of its TensorImpl, and
    where that stores its dispatch keys and other fields.

    Returns whether the first two were found. Nothing is assumed of torch's layout: an offset is used only if it fits
    several tensors with different words.
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
    tensors.append(torch._neg_view(torch.ones(2)))
    offset = _find_offset({id(tensor): tensor._cdata for tensor in tensors}, Tensor.__basicsize__)
    if offset is None:
        return False
    keys_offset = _find_keys_offset(tensors)
    addresses = [_address_of(function) for function in functions]
    bump = _address_of(getattr(library, _BUMP_VERSION, None))
    fields = _find_fields(keys_offset)
    extension.C.use_torch(addresses, strided, Tensor, nn.Parameter, offset, keys_offset, bump, fields)
    return True


def _find_keys_offset(tensors: Sequence[Tensor]) -> int:
    """Where a TensorImpl stores its dispatch keys; 0 if it was not found."""
    return _find_offset({t._cdata: torch._C._dispatch_keys(t).raw_repr() for t in tensors}, _MAX_IMPL_BYTES) or 0


def _find_fields(keys_offset: int) -> list[int]:
    """Where a TensorImpl and its StorageImpl store all that the guards compare of a tensor with up to 5 dimensions.

    Each field is found by its value in tensors of different shape, strides, dtype, offset and memory.

    Returns offsets in bytes: of the StorageImpl's address; of the first and last of the words that hold the number of
    dimensions, the sizes, the strides, the number of the first element, and all up to the dispatch keys; and of the
    memory's address in the StorageImpl. All zeros if a field is not found, or not in this order.
    """
    a = torch.empty(64).as_strided((1, 2, 3, 1, 2), (7, 11, 5, 13, 3), 4)
    b = torch.empty(80, dtype=torch.float64).as_strided((2, 1, 1, 3, 4), (1, 17, 19, 6, 2), 9)

    def find(of: Sequence[Any], word: Callable[[Any], int], size: int = keys_offset) -> int:
        return _find_offset({each._cdata: word(each) for each in of}, size) or 0

    storages = [a.untyped_storage(), b.untyped_storage()]
    storage = find([a, b], lambda tensor: tensor.untyped_storage()._cdata)
    data = find(storages, lambda storage: storage.data_ptr(), _MAX_STORAGE_BYTES)
    n_bytes = find(storages, lambda storage: storage.nbytes(), _MAX_STORAGE_BYTES)
    dim = find([a, torch.empty(3), torch.empty(2, 2)], Tensor.dim)
    sizes = [find([a, b], lambda tensor, i=i: tensor.size(i)) for i in range(5)]
    strides = [find([a, b], lambda tensor, i=i: tensor.stride(i)) for i in range(5)]
    first = find([a, b], Tensor.storage_offset)
    in_order = [dim, *sizes, *strides, first] == list(range(dim, dim + 96, 8)) and first < keys_offset
    # What frees the memory is between its address and its size: lazy clones share memory and differ in it.
    if not (storage and dim and in_order and data and data + 24 <= n_bytes):
        return [0] * 4
    # The dtype is a code that only torch knows: different ones must differ in bits that are the same for equal ones.
    tensors = [[torch.empty(1, dtype=dtype) for _ in range(4)] for dtype in _DTYPES]
    size = keys_offset + 8 - first
    read = [[int.from_bytes(ctypes.string_at(t._cdata + first, size), "little") for t in its] for its in tensors]
    unset = reduce(or_, (word ^ words[0] for words in read for word in words))  # bits that torch does not set
    if len({words[0] & ~unset for words in read}) < len(_DTYPES):
        return [0] * 4
    return [storage, dim, keys_offset, data]


def _find_offset(words: dict[int, int], size: int) -> int | None:
    """The first offset below size at which each object, given by its address, holds its word; None if there is none.

    The search ascends, so that it reads nothing behind an object that holds its word.
    """
    for offset in range(0, size, 8):
        if all(
            int.from_bytes(ctypes.string_at(address + offset, 8), "little") == word for address, word in words.items()
        ):
            return offset
    return None


def _address_of(function: object) -> int:
    """The address of a C function; 0 for None."""
    return ctypes.cast(function, ctypes.c_void_p).value if function is not None else 0


_extension_reads_torch = _connect_extension()
