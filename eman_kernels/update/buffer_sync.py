"""sync_buffers: buffers that are reduced over all processes before the teachers follow them.

Protocol. Each update makes one all_reduce of all floating-point buffers in one flat tensor, led by two counts: how many
processes can update, and how many contributed their buffers. A process that cannot update still takes part, with zeros,
so that the others do not hang. Where the counts can be read without a device synchronization (gloo), all processes then
raise; with NCCL the remaining processes update from the buffers that were contributed. Before the first reduction, and
after one in which a process could not update, all processes compare errors and layouts in an all_gather_object.

The reduction comes before the update and does not overlap with it: weights that were written in the meantime could not
be restored if a process turned out to be unable, and agreeing on that first would take as long as the reduction.
"""

from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..networks.errors import NOTHING_WRITTEN, raise_differences
from ..networks.pairing import Pair
from ..networks.tensors import is_distributed
from ..options import SyncBuffers

_HEAD = 2  # the number of counts in front of the buffers


class BufferSync:
    """The reduced values of a student's floating-point buffers: the mean over all processes, or those of rank 0.

    ``means`` are tensors like the buffers, in a fixed order.
    """

    def __init__(self, mode: SyncBuffers, group: "dist.ProcessGroup") -> None:
        self.mode, self.group = mode, group
        self.means: list[Tensor] = []
        # Name, shape and dtype of each buffer: in this process, and as agreed by all processes.
        self._layout: list[tuple[str, tuple[int, ...], str]] | None = None
        self._agreed: list[tuple[str, tuple[int, ...], str]] | None = None

    def replace_buffers(self, pairs: list[Pair], student: nn.Module) -> tuple[list[Pair], list[Tensor]]:
        """The pairs with the means in place of the student's buffers, and the buffers themselves."""
        ids = {id(b) for b in student.buffers() if b.is_floating_point() and not is_distributed(b)}
        named = {id(pair.student): pair for pair in pairs if id(pair.student) in ids}
        buffers = [pair.student for pair in named.values()]
        self._layout = [(p.name, tuple(p.student.shape), str(p.student.dtype)) for p in named.values()]
        self._device = pairs[0].student.device if pairs else torch.device("cpu")
        if list(map(_memory_format, self.means)) != list(map(_memory_format, buffers)):
            # In inference mode the new tensors could not be written after it has ended.
            with torch.inference_mode(False), torch.no_grad():
                self.means = [torch.empty_like(buffer) for buffer in buffers]
        mean = dict(zip(named, self.means, strict=True))
        return [replace(pair, student=mean.get(id(pair.student), pair.student)) for pair in pairs], buffers

    @torch.no_grad()
    def synchronize(self, buffers: list[Tensor], error: Exception | None = None) -> None:
        """Reduce these buffers into the means. error: why this process cannot update.

        Raises RuntimeError if another process cannot update, and ValueError if the processes' buffers differ.
        """
        while self._agreed is None or not self._reduce(buffers, error):
            self._agree(error)

    def _reduce(self, buffers: list[Tensor], error: Exception | None) -> bool:
        """False if all processes have to agree first."""
        able = error is None and self._layout == self._agreed
        contributes = able and (self.mode == "mean" or dist.get_rank(self.group) == 0)
        if contributes:
            torch._foreach_copy_(self._parts, buffers)
        else:
            self._flat.zero_()
        self._flat[0].fill_(able)
        self._flat[1].fill_(contributes)
        dist.all_reduce(self._flat, group=self.group)
        if not able or self._flat.device.type == "cpu":
            able_processes = int(self._flat[0])
            if able_processes < dist.get_world_size(self.group):
                if self._flat.device.type == "cpu" or not able_processes:
                    return False
                raise error or ValueError(f"the student's buffers have changed in this process only. {NOTHING_WRITTEN}")
        self._flat /= self._flat[1].clone()
        torch._foreach_copy_(self.means, self._parts)
        return True

    def _agree(self, error: Exception | None) -> None:
        gathered: list[Any] = [None] * dist.get_world_size(self.group)
        mine = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(gathered, (mine, self._layout), self.group)
        for rank, (reason, _) in enumerate(gathered):
            if reason is not None and error is None:
                raise RuntimeError(f"process {rank} cannot update its teacher. {NOTHING_WRITTEN} Its error: {reason}")
        if error is not None:
            raise error
        layouts = [layout for _, layout in gathered]
        raise_differences(
            (
                f"{name}: {dtype} of shape {shape} in process {rank}, but not in process {other}"
                for each in range(1, len(layouts))
                for rank, other in ((0, each), (each, 0))
                for name, shape, dtype in layouts[rank]
                if (name, shape, dtype) not in layouts[other]
            ),
            head=f"the processes' students differ in their buffers. {NOTHING_WRITTEN}",
        )
        self._agreed = self._layout
        dtype = torch.float64 if any("float64" in of for _, _, of in self._layout) else torch.float32
        sizes = [prod(shape) for _, shape, _ in self._layout]
        with torch.inference_mode(False):
            self._flat = torch.empty(_HEAD + sum(sizes), dtype=dtype, device=self._device)
        parts = self._flat[_HEAD:].split(sizes)
        self._parts = [part.view(shape) for part, (_, shape, _) in zip(parts, self._layout, strict=True)]


def _memory_format(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def find_buffer_sync(cached: BufferSync | None, mode: SyncBuffers, student: nn.Module) -> BufferSync | None:
    """The cached one if mode and processes are the same, otherwise a new one; None if there is nothing to synchronize.

    The processes are those of the student's DistributedDataParallel, or all processes.
    """
    if mode == "none" or not (dist.is_available() and dist.is_initialized()):
        return None
    group = getattr(student, "process_group", None) or dist.group.WORLD
    if dist.get_world_size(group) == 1:
        return None
    if cached is None or (cached.mode, cached.group) != (mode, group):
        cached = BufferSync(mode, group)
    return cached
