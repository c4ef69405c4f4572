"""DTensors and FSDP2: each process updates its own shards, without communication."""

from collections.abc import Iterable
from dataclasses import replace
from math import prod

from torch import Tensor, nn

from .errors import NOTHING_WRITTEN, raise_differences
from .pairing import Pair
from .tensors import imported_class, is_distributed, local_part

_REMEDY = (
    "Shard both alike: fully_shard(teacher.module, ...) as the student, or EMANTeacher(student, module=...) with a "
    "network that is sharded like the student."
)


def replace_by_shards(pairs: list[Pair]) -> list[Pair]:
    """The pairs with DTensors replaced by this process's shards, which know their offset in the whole tensor.

    Raises ValueError if teacher and student are not sharded alike, or in a way that cannot be averaged.
    """
    if not any(is_distributed(tensor) for pair in pairs for tensor in (pair.teacher, pair.student)):
        return pairs
    raise_differences((f"{pair.name}: {fault}" for pair in pairs if (fault := _find_sharding_fault(pair))), _REMEDY)
    return [
        replace(
            pair,
            teacher=local_part(pair.teacher),
            student=local_part(pair.student),
            cast=None if pair.cast is None else local_part(pair.cast),
            whole=pair.teacher.numel(),
            offset=_shard_offset(pair.teacher),
        )
        if is_distributed(pair.teacher)
        else pair
        for pair in pairs
    ]


def number_elements(pairs: list[Pair]) -> list[Pair]:
    """The pairs with the number of their first element, from which stochastic rounding derives its random bits.

    Numbers are multiples of 8, and the same for every backend and any number of processes. Drops empty shards.
    """
    numbered, first = [], 0
    for pair in pairs:
        numel = pair.teacher.numel()
        if numel:
            numbered.append(replace(pair, first=first + pair.offset // 8 * 8))
        first += ((numel if pair.whole is None else pair.whole) + 7) // 8 * 8
    return numbered


def reshard(roots: Iterable[nn.Module | list[Tensor]]) -> bool:
    """Reshard the modules that a forward of FSDP2 left unsharded, usually the root: FSDP2 discards what is written to
    unsharded parameters. Returns whether there are such modules at all."""
    modules = _find_fsdp_modules(root for root in roots if isinstance(root, nn.Module))
    for module in modules:
        module.reshard()
    return bool(modules)


def check_cast_with_sharding(network: nn.Module) -> None:
    """Raises ValueError for a network of FSDP2, whose forward reads nothing but its own shards."""
    if _find_fsdp_modules([network]):
        raise ValueError(
            "cast= has no effect on a network that FSDP2 gathers from its own shards. Let FSDP2 cast when it gathers: "
            "fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))"
        )


def check_share_with_sharding(network: nn.Module) -> None:
    """Raises ValueError for a network of FSDP2, which cannot read another network's tensors."""
    if _find_fsdp_modules([network]):
        raise ValueError(
            'the rule "share" has no effect on a network that FSDP2 gathers from its own shards; give those tensors '
            f'the rule "skip". {NOTHING_WRITTEN}'
        )


def _find_fsdp_modules(networks: Iterable[nn.Module]) -> list[nn.Module]:
    kind = imported_class("torch.distributed.fsdp", "FSDPModule")
    return [module for network in networks for module in network.modules() if isinstance(module, kind)] if kind else []


def _find_sharding_fault(pair: Pair) -> str | None:
    teacher, student = pair.teacher, pair.student
    distributed = [is_distributed(tensor) for tensor in (teacher, student)]
    if not any(distributed):
        return None
    if not all(distributed) or (teacher.device_mesh, teacher.placements) != (student.device_mesh, student.placements):
        return f"the teacher is {_describe_placement(teacher)}, the student {_describe_placement(student)}"
    if any(placement.is_partial() for placement in teacher.placements):
        return (
            f"teacher and student are {_describe_placement(teacher)}: each process holds an unreduced partial value; "
            "redistribute() both to Shard or Replicate"
        )
    shapes = [tuple(local_part(tensor).shape) for tensor in (teacher, student)]
    if shapes[0] != shapes[1]:
        return f"in this process the teacher's shard has the shape {shapes[0]}, the student's {shapes[1]}"
    return None


def _describe_placement(tensor: Tensor) -> str:
    if not is_distributed(tensor):
        return f"a plain {type(tensor).__name__}"
    return f"a DTensor placed {', '.join(map(str, tensor.placements))} on {tensor.device_mesh}"


def _shard_offset(tensor: Tensor) -> int:
    """The number of the shard's first element in the whole tensor.

    Stochastic rounding then draws the same bits for any number of processes, and on all replicas. The number is exact
    if dimension 0 is sharded. If another dimension is, elements of different shards never have the same number.
    """
    coordinates = tensor.device_mesh.get_coordinate()
    if coordinates is None:  # this process is not part of the mesh
        return 0
    shape, shard = list(tensor.shape), 0
    for placement, size, coordinate in zip(tensor.placements, tensor.device_mesh.shape, coordinates, strict=True):
        if not placement.is_replicate():
            shape[placement.dim] = -(-shape[placement.dim] // size)
            shard = shard * size + coordinate
    return shard * prod(shape)
