"""Staging: a teacher in CPU memory that follows a student on another device.

Each update first copies the student into CPU memory, on a side stream that waits for the work already queued on the
current stream. The host waits for that copy only. The kernel then reads the copy instead of the student.

Networks have hundreds of small tensors, each of which would cost one transfer. They are packed into a buffer on the
student's device and cross the bus together; tensors larger than the buffer are transferred directly.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..backends.interface import Arguments
from ..networks.errors import NOTHING_WRITTEN
from ..networks.pairing import Pair
from ..networks.tensors import extent, is_plain, local_part, memory_key

BUFFER_BYTES = 1 << 27  # at most, on the student's device
_ALIGNMENT = 16  # bytes, for the kernels' wide accesses


def needs_staging(pair: Pair) -> bool:
    """Whether the teacher is in CPU memory and the student on a device with streams (shards, if they are DTensors)."""
    teacher, student = local_part(pair.teacher), local_part(pair.student)
    if pair.rule == "swap" or teacher.device.type != "cpu" or student.device.type == "cpu":
        return False
    return hasattr(getattr(torch, student.device.type, None), "Stream") and is_plain(teacher) and is_plain(student)


class Staging:
    """Copies of the student in CPU memory, refreshed before each update.

    Takes as many bytes of CPU memory as the student has, pinned where the device supports it, and at most BUFFER_BYTES
    on the student's device.

    Raises RuntimeError, when it is made or used, during the capture of a CUDA graph, in which the host cannot wait.
    """

    def __init__(self, pairs: list[Pair], index_of: dict[int, int]) -> None:
        devices: dict[torch.device, dict[object, Pair]] = {}
        for pair in filter(needs_staging, pairs):
            devices.setdefault(pair.student.device, {}).setdefault(memory_key(pair.student), pair)
        _check_not_captured(devices)
        # In inference mode the new tensors could not be written after it has ended.
        with torch.inference_mode(False), torch.no_grad():
            self._copies = [_DeviceCopy(device, list(its.values()), index_of) for device, its in devices.items()]
        self._views = {memory_key(pair.student): view for copy in self._copies for pair, view in copy.views}

    def replace_students(self, pairs: list[Pair], index_of: dict[int, int]) -> list[Pair]:
        """The pairs with the copies for students. The copies follow all other tensors that the plan runs on."""
        first = 1 + max(index_of.values())
        index_of |= {id(view): first + number for number, view in enumerate(self._views.values())}
        return [replace(p, student=self._views[memory_key(p.student)]) if needs_staging(p) else p for p in pairs]

    def copy_students(self, arguments: Arguments, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Refresh the copies and wait for them. Returns the tensors that the plan runs on, the copies last.

        found_inf may also be on the student's device, as that of GradScaler is.
        """
        _check_not_captured(copy.device for copy in self._copies)
        if arguments.found_inf is not None:
            arguments.found_inf = arguments.found_inf.cpu()
        for copy in self._copies:
            copy.start(tensors)
        for copy in self._copies:
            copy.stream.synchronize()
        return [*tensors, *self._views.values()]

    def describe(self) -> list[str]:
        """A line per device."""
        return [copy.describe() for copy in self._copies]


class _DeviceCopy:
    """The copy of all student tensors that are on one device."""

    def __init__(self, device: torch.device, pairs: list[Pair], index_of: dict[int, int]) -> None:
        self.device = device
        self._module = getattr(torch, device.type)
        self.stream = self._module.Stream(device)
        self._host = _allocate_pinned(sum(map(_aligned_bytes, pairs)))
        with self._module.stream(self.stream):  # the allocator assigns the memory to this stream
            size = min(
                BUFFER_BYTES, sum(_aligned_bytes(pair) for pair in pairs if _aligned_bytes(pair) <= BUFFER_BYTES)
            )
            self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.views: list[tuple[Pair, Tensor]] = []
        # Tensors that are transferred directly: the view in CPU memory, and the index of the student's tensor.
        self._large: list[tuple[Tensor, int]] = []
        # For each transfer of the buffer: the destination, the used part of the buffer, and for each dtype the views
        # into the buffer with the indices of the student's tensors that are packed there.
        self._packed: list[tuple[Tensor, Tensor, list[tuple[list[Tensor], list[int]]]]] = []
        begin = 0
        for group in _group_by_buffer(pairs):
            size = sum(map(_aligned_bytes, group))
            host, indices = self._host[begin : begin + size], [index_of[id(pair.student)] for pair in group]
            views = _make_views(host, group)
            self.views += zip(group, views, strict=True)
            begin += size
            if size > BUFFER_BYTES:
                self._large.append((views[0], indices[0]))
                continue
            # torch packs tensors of one dtype in one launch.
            by_dtype: dict[torch.dtype, tuple[list[Tensor], list[int]]] = {}
            for view, index in zip(_make_views(self._buffer, group), indices, strict=True):
                its_views, its_indices = by_dtype.setdefault(view.dtype, ([], []))
                its_views.append(view)
                its_indices.append(index)
            self._packed.append((host, self._buffer[:size], list(by_dtype.values())))

    @torch.no_grad()
    def start(self, tensors: Sequence[Tensor]) -> None:
        """Queue the copy without waiting for it. Work queued on the current stream afterwards may write the student."""
        current = self._module.current_stream(self.device)
        self.stream.wait_stream(current)
        with self._module.stream(self.stream):
            for view, index in self._large:
                view.copy_(tensors[index], non_blocking=True)
            for host, buffer, sources in self._packed:
                for views, indices in sources:
                    torch._foreach_copy_(views, [tensors[index] for index in indices])
                current.wait_stream(self.stream)
                host.copy_(buffer, non_blocking=True)
        if not self._packed:
            current.wait_stream(self.stream)

    def describe(self) -> str:
        """How much is copied from where, and in how many transfers."""
        kind = "pinned" if self._host.is_pinned() else "pageable"
        transfers = len(self._large) + len(self._packed)
        return (
            f"  from {self.device}: {self._host.nbytes} bytes to {kind} CPU memory in {transfers} transfers per update"
        )


def _check_not_captured(devices: Iterable[torch.device]) -> None:
    if any(device.type == "cuda" for device in devices) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph cannot contain the update of a teacher in CPU memory, because the host waits for the "
            f"student's values: call update() outside of the capture. {NOTHING_WRITTEN}"
        )


def _aligned_bytes(pair: Pair) -> int:
    return -(-pair.student.nbytes // _ALIGNMENT) * _ALIGNMENT


def _group_by_buffer(pairs: list[Pair]) -> list[list[Pair]]:
    """Groups of at most BUFFER_BYTES each, or of one tensor that is larger."""
    groups: list[list[Pair]] = []
    left = 0
    for pair in pairs:
        if not groups or _aligned_bytes(pair) > left:
            groups.append([])
            left = BUFFER_BYTES
        groups[-1].append(pair)
        left -= _aligned_bytes(pair)
    return groups


def _make_views(memory: Tensor, pairs: list[Pair]) -> list[Tensor]:
    """Consecutive views of the memory, with the dtypes of the students and the strides of the teachers."""
    views, begin = [], 0
    for pair in pairs:
        view = memory[begin : begin + pair.student.nbytes].view(pair.student.dtype)
        dense = extent(pair.teacher) == pair.teacher.numel()
        views.append(
            view.as_strided(pair.teacher.shape, pair.teacher.stride()) if dense else view.view(pair.teacher.shape)
        )
        begin += _aligned_bytes(pair)
    return views


def _allocate_pinned(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError:  # the device does not support it, or the system has no more pinned memory
        return torch.empty(size, dtype=torch.uint8, device="cpu")
