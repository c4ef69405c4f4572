"""More than one process: shards in place of the tensors that they are of, and networks sharded as an update needs them.

torch.distributed's classes are looked up where someone has imported them already: nobody else has any.
"""

import sys
from collections.abc import Iterable
from dataclasses import replace
from math import prod
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .pairing import Pair, check

SyncBuffers = Literal["none", "mean", "rank0"]

_NOTHING = "Nothing was written."

_REMEDY = (
    "Shard both alike: fully_shard(teacher.module, ...) as the student, or EMANTeacher(student, module=...) of a "
    "network that is sharded as the student is."
)


def _class(module: str, name: str) -> type | tuple[()]:
    """For isinstance. Empty where it is not imported, and nothing is one."""
    return getattr(sys.modules.get(module), name, ())


def dtensor() -> type | tuple[()]:
    """DTensor, for isinstance."""
    return _class("torch.distributed.tensor", "DTensor")


def shards(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What of these DTensors lies in this process."""
    # Of to_local() each call makes a new tensor.
    return [tensor._local_tensor for tensor in tensors]


def local(tensor: Tensor) -> Tensor:
    """A DTensor's shard, and any other tensor itself."""
    return tensor._local_tensor if is_distributed(tensor) else tensor


def placed_as(tensor: Tensor, local: Tensor) -> Tensor:
    """A DTensor of this shard, placed as the tensor is; the shard itself, if that is none."""
    if not is_distributed(tensor):
        return local
    placement = {"shape": tensor.shape, "stride": tensor.stride(), "run_check": False}
    return type(tensor).from_local(local, tensor.device_mesh, tensor.placements, **placement)


def is_distributed(tensor: Tensor) -> bool:
    return isinstance(tensor, dtensor())


def spec(tensor: Tensor) -> object:
    """A DTensor's mesh, placements, shape, strides and dtype, to be compared."""
    return tensor._spec


def local_pairs(pairs: list[Pair]) -> list[Pair]:
    """The pairs of this process's shards in place of those of DTensors, with the place of each in its whole.

    Raises ValueError if teacher and student are not sharded alike, or in a way that cannot be averaged.
    """
    if not any(is_distributed(tensor) for pair in pairs for tensor in (pair.teacher, pair.student)):
        return pairs
    check([], [f"{pair.name}: {fault}" for pair in pairs if (fault := _fault(pair))], _REMEDY)
    return [
        replace(
            pair,
            teacher=local(pair.teacher),
            student=local(pair.student),
            cast=None if pair.cast is None else local(pair.cast),
            whole=pair.teacher.numel(),
            offset=_offset(pair.teacher),
        )
        if is_distributed(pair.teacher)
        else pair
        for pair in pairs
    ]


def numbered(pairs: list[Pair]) -> list[Pair]:
    """With the numbers of their first elements: multiples of 8, the same whoever updates them, and over however many
    processes they are sharded. Without empty shards."""
    numbered, first = [], 0
    for pair in pairs:
        numel = pair.teacher.numel()
        if numel:
            numbered.append(replace(pair, first=first + pair.offset // 8 * 8))
        first += ((numel if pair.whole is None else pair.whole) + 7) // 8 * 8
    return numbered


def _fault(pair: Pair) -> str | None:
    teacher, student = pair.teacher, pair.student
    are = [is_distributed(tensor) for tensor in (teacher, student)]
    if not any(are):
        return None
    if not all(are) or (teacher.device_mesh, teacher.placements) != (student.device_mesh, student.placements):
        return f"the teacher is {_placed(teacher)}, the student {_placed(student)}"
    if any(placement.is_partial() for placement in teacher.placements):
        return (
            f"teacher and student are {_placed(teacher)}, of which each process holds but a part that is still to be "
            "reduced; redistribute() both to Shard or Replicate"
        )
    shapes = [tuple(local(tensor).shape) for tensor in (teacher, student)]
    if shapes[0] != shapes[1]:
        return f"this process's shard of the teacher is of shape {shapes[0]}, that of the student {shapes[1]}"
    return None


def _placed(tensor: Tensor) -> str:
    if not is_distributed(tensor):
        return f"a plain {type(tensor).__name__}"
    return f"a DTensor placed {', '.join(map(str, tensor.placements))} on {tensor.device_mesh}"


def _offset(tensor: Tensor) -> int:
    """The number of the shard's first element in the whole tensor, by which stochastic rounding draws: the same bits
    however many processes it is sharded over, and on those that hold replicas. Exact where dimension 0 is sharded;
    where another is, no two shards have a number in common."""
    where = tensor.device_mesh.get_coordinate()
    if where is None:  # not of the mesh
        return 0
    shape, shard = list(tensor.shape), 0
    for placement, size, coordinate in zip(tensor.placements, tensor.device_mesh.shape, where, strict=True):
        if not placement.is_replicate():
            shape[placement.dim] = -(-shape[placement.dim] // size)
            shard = shard * size + coordinate
    return shard * prod(shape)


def reshard(roots: Iterable[nn.Module | list[Tensor]]) -> bool:
    """Put the shards back into those modules that a forward pass of FSDP2 left whole, usually the root: what is written
    to whole parameters is lost. Returns whether there are modules of FSDP2."""
    modules = _fsdp_modules(root for root in roots if isinstance(root, nn.Module))
    for module in modules:
        module.reshard()
    return bool(modules)


def _fsdp_modules(networks: Iterable[nn.Module]) -> list[nn.Module]:
    kind = _class("torch.distributed.fsdp", "FSDPModule")
    return [module for network in networks for module in network.modules() if isinstance(module, kind)] if kind else []


def check_cast(network: nn.Module) -> None:
    """Raises ValueError for a network whose forward reads no tensors but its own."""
    if _fsdp_modules([network]):
        raise ValueError(
            "cast= has no effect on a network that FSDP2 gathers from its own shards. Let the gathering cast them: "
            "fully_shard(..., mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))"
        )


def check_share(network: nn.Module) -> None:
    """Raises ValueError for a network that would not read another's tensors in the place of its own."""
    if _fsdp_modules([network]):
        raise ValueError(
            'the rule "share" has no effect on a network that FSDP2 gathers from its own shards; give those tensors '
            f'the rule "skip". {_NOTHING}'
        )


def check_sync(sync_buffers: str) -> None:
    """Raises ValueError for a way to keep buffers in step that is none."""
    if sync_buffers != "none" and sync_buffers not in get_args(SyncBuffers):
        raise ValueError(f"sync_buffers={sync_buffers!r} is none of {', '.join(map(repr, get_args(SyncBuffers)))}")


class Statistics:
    """What teachers follow in place of a student's floating-point buffers: the mean of theirs over all processes, or
    those of the first process. `means` are tensors like them, in one order.

    One collective operation an update. A process that cannot update takes part in it and says so, lest the others wait
    for it. Those that learn of it without waiting for their device (gloo) raise as well; others follow the rest.

    It comes before the update and not beside it: weights that were written meanwhile could not be taken back where a
    process turns out to be unable, and to agree on that first would take as long as the whole reduction.
    """

    _HEAD = 2  # how many processes can update, and how many gave their buffers

    def __init__(self, how: SyncBuffers, group: "dist.ProcessGroup") -> None:
        self.how, self.group = how, group
        self.means: list[Tensor] = []
        # Name, shape and dtype of each buffer: here, and as all processes have them.
        self._layout: list[tuple[str, tuple[int, ...], str]] | None = None
        self._agreed: list[tuple[str, tuple[int, ...], str]] | None = None

    def replace(self, pairs: list[Pair], student: nn.Module) -> tuple[list[Pair], list[Tensor]]:
        """The pairs with means for students, and the buffers that the means are of."""
        ids = {id(b) for b in student.buffers() if b.is_floating_point() and not is_distributed(b)}
        named = {id(pair.student): pair for pair in pairs if id(pair.student) in ids}
        buffers = [pair.student for pair in named.values()]
        self._layout = [(p.name, tuple(p.student.shape), str(p.student.dtype)) for p in named.values()]
        self._device = pairs[0].student.device if pairs else torch.device("cpu")
        if list(map(_kind, self.means)) != list(map(_kind, buffers)):
            # Inference mode would make tensors that cannot be written once it has ended.
            with torch.inference_mode(False), torch.no_grad():
                self.means = [torch.empty_like(buffer) for buffer in buffers]
        mean = dict(zip(named, self.means, strict=True))
        return [replace(pair, student=mean.get(id(pair.student), pair.student)) for pair in pairs], buffers

    @torch.no_grad()
    def exchange(self, buffers: list[Tensor], error: Exception | None = None) -> None:
        """Make the means those of these buffers. error: why this process cannot update.

        Raises RuntimeError where another process cannot, ValueError where their buffers differ.
        """
        while self._agreed is None or not self._reduce(buffers, error):
            self._agree(error)

    def _reduce(self, buffers: list[Tensor], error: Exception | None) -> bool:
        """False where all processes have to agree first."""
        able = error is None and self._layout == self._agreed
        gives = able and (self.how == "mean" or dist.get_rank(self.group) == 0)
        if gives:
            torch._foreach_copy_(self._parts, buffers)
        else:
            self._flat.zero_()
        self._flat[0].fill_(able)
        self._flat[1].fill_(gives)
        dist.all_reduce(self._flat, group=self.group)
        if not able or self._flat.device.type == "cpu":
            others = int(self._flat[0])
            if others < dist.get_world_size(self.group):
                if self._flat.device.type == "cpu" or not others:
                    return False
                raise error or ValueError(f"the student's buffers have changed in this process alone. {_NOTHING}")
        self._flat /= self._flat[1].clone()
        torch._foreach_copy_(self.means, self._parts)
        return True

    def _agree(self, error: Exception | None) -> None:
        said: list[Any] = [None] * dist.get_world_size(self.group)
        mine = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(said, (mine, self._layout), self.group)
        for rank, (reason, _) in enumerate(said):
            if reason is not None and error is None:
                raise RuntimeError(f"process {rank} cannot update its teacher. {_NOTHING} There: {reason}")
        if error is not None:
            raise error
        layouts = [layout for _, layout in said]
        differing = [
            f"{name}: {dtype} of shape {shape} in process {rank}, and not so in process {other}"
            for other in range(len(layouts))
            for rank in (0, other)
            for name, shape, dtype in layouts[rank]
            if (name, shape, dtype) not in layouts[0 if rank else other]
        ]
        if differing:
            check([], differing, head=f"the processes' students differ in their buffers. {_NOTHING}")
        self._agreed = self._layout
        dtype = torch.float64 if any("float64" in of for _, _, of in self._layout) else torch.float32
        sizes = [prod(shape) for _, shape, _ in self._layout]
        with torch.inference_mode(False):
            self._flat = torch.empty(self._HEAD + sum(sizes), dtype=dtype, device=self._device)
        parts = self._flat[self._HEAD :].split(sizes)
        self._parts = [part.view(shape) for part, (_, shape, _) in zip(parts, self._layout, strict=True)]


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def statistics(known: Statistics | None, sync_buffers: SyncBuffers, student: nn.Module) -> Statistics | None:
    """The known ones if they are of this kind and these processes; new ones else; none where nothing is to be in step.

    The processes are those of the student's DistributedDataParallel, or all that there are.
    """
    if sync_buffers == "none" or not (dist.is_available() and dist.is_initialized()):
        return None
    group = getattr(student, "process_group", None) or dist.group.WORLD
    if dist.get_world_size(group) == 1:
        return None
    if known is None or (known.how, known.group) != (sync_buffers, group):
        known = Statistics(sync_buffers, group)
    return known
