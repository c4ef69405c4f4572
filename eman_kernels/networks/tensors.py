"""Where the elements of a tensor are stored: in plain memory, or as one shard of several.

Classes of torch.distributed are looked up in sys.modules only: if nobody has imported them, no tensor is an instance.
"""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def is_plain(tensor: Tensor) -> bool:
    """Whether the tensor's address and strides say where its elements are. Subclasses may not expose their memory."""
    return _is_of_torch(tensor) and tensor.layout is torch.strided and not tensor.is_nested and has_memory(tensor)


def has_memory(tensor: Tensor) -> bool:
    """Whether there is memory behind the tensor, as far as that can be seen from outside: subclasses are assumed to
    have some. The tensors of torch.func's transforms have none, although they are torch.Tensors, and neither have those
    whose storage has been freed. Meta tensors are refused by their device."""
    if not _is_of_torch(tensor) or tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return True
    try:
        return tensor.data_ptr() != 0 or not tensor.numel()
    except RuntimeError:  # a tensor of vmap or grad
        return False


# The types of devices on which the address of a storage is the handle of a buffer, and not where its elements are.
WITH_HANDLES = {"mps"}


def address_of(tensor: Tensor) -> int:
    """The address of the first element, for comparisons with other tensors on the same device. Storages on devices with
    handles are placed so far from each other that they do not overlap."""
    if tensor.device.type not in WITH_HANDLES:
        return tensor.data_ptr()
    return (tensor.untyped_storage().data_ptr() << 64) + tensor.storage_offset() * tensor.element_size()


def _is_of_torch(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)


def effective_strides(tensor: Tensor) -> list[int]:
    """The strides without those of dimensions of size 1, which may have any value."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def extent(tensor: Tensor) -> int:
    """The number of elements from the first to the last one in memory, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def memory_key(tensor: Tensor) -> object:
    """Equal for tensors that are the same view of the same memory."""
    if not is_plain(tensor) or not tensor.numel():
        return id(tensor)
    return (tensor.device, address_of(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride())


def storage_key(tensor: Tensor) -> int:
    """Equal for tensors with the same storage, unequal to the id of any other object."""
    tensor = local_part(tensor)
    return tensor.untyped_storage()._cdata if is_plain(tensor) else id(tensor)


def imported_class(module: str, name: str) -> type | tuple[()]:
    """A class for isinstance(); empty, so that nothing is an instance, if its module has not been imported."""
    return getattr(sys.modules.get(module), name, ())


def dtensor_class() -> type | tuple[()]:
    """DTensor, for isinstance()."""
    return imported_class("torch.distributed.tensor", "DTensor")


def fsdp1_class() -> type | tuple[()]:
    """FullyShardedDataParallel, for isinstance()."""
    return imported_class("torch.distributed.fsdp", "FullyShardedDataParallel")


def is_distributed(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this process holds a shard."""
    return isinstance(tensor, dtensor_class())


def local_shards(dtensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's shard of each DTensor. to_local() would create a new tensor in each call."""
    return [tensor._local_tensor for tensor in dtensors]


def local_part(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor itself."""
    return tensor._local_tensor if is_distributed(tensor) else tensor


def placed_like(tensor: Tensor, shard: Tensor) -> Tensor:
    """A DTensor of this shard with the placements of the tensor; the shard itself if the tensor is not a DTensor."""
    if not is_distributed(tensor):
        return shard
    placement = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
    return type(tensor).from_local(shard, tensor.device_mesh, tensor.placements, **placement)


def sharding_spec(dtensor: Tensor) -> object:
    """The mesh, placements, shape, strides and dtype of a DTensor, for comparison."""
    return dtensor._spec
