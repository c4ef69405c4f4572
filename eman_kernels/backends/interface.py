"""What a backend is given, and what it has to provide. To add a backend, write a module with the members of `Backend`
and add it to BACKENDS in this package's __init__.py.

This package is the bottom layer of eman_kernels: it imports nothing from the rest of it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(slots=True)
class Arguments:
    """The arguments of one update that can differ from the next one's.

    Tensors are stored on the teacher's device. A backend must read them there, without a device synchronization.
    """

    momenta: list[float] | Tensor  # one per teacher; a tensor is float32 or float64
    found_inf: Tensor | None = None  # float32: if it is not 0, nothing is written
    seed: int = 0  # of stochastic rounding, in [0, 2^32)
    step: int | Tensor = 0  # of stochastic rounding; a tensor is int64
    skipped: Tensor | None = None  # int64: the number of skipped student elements is added to it

    def is_by_value(self) -> bool:
        """Whether there is no tensor among the arguments."""
        numbers = type(self.momenta) is list and not isinstance(self.step, Tensor)
        return numbers and self.found_inf is None and self.skipped is None


class Place(NamedTuple):
    """One pair of tensors. A plan keeps no tensors: the first three fields are indices into the list of tensors that
    `Backend.run` and `Backend.swaps` get."""

    teacher: int
    student: int
    cast: int | None  # the teacher's low-precision copy, which is written too
    rule: str  # "ema", "copy" or "swap"
    group: int  # which teacher of this student: an index into the momenta
    first: int  # the number of the teacher's first element, from which stochastic rounding draws


# The types of devices on which torch has no float64.
WITHOUT_FLOAT64 = {"mps"}


def widest_float(device: torch.device) -> torch.dtype:
    """The floating-point dtype with the most digits that torch has on this device."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


# CUDA graphs that were captured read the table at every replay, even after the plan has been freed.
_captured_tables: list[Tensor] = []


@dataclass(eq=False)
class Work:
    """What one backend does on one device in one launch."""

    device: torch.device
    places: dict[tuple[str, torch.dtype, torch.dtype], list[Place]]  # by rule, teacher dtype and student dtype
    numel: int  # elements of all teachers
    table: Tensor | None = None  # chunk records (csrc/chunk.h), stored on the device; for backends with TAKES_TABLE
    _: KW_ONLY
    n_teachers: int = 1
    bytes_read: int = 0  # per update, without temporaries
    bytes_written: int = 0
    stochastic: bool = False  # stochastic rounding of half-precision teachers
    skip_nonfinite: bool = False  # keep a teacher's element if the student's is NaN or infinite
    casts: bool = False  # whether any place has a low-precision copy
    general: bool = field(init=False)  # whether the fast kernels, for one teacher rounded to nearest, are not enough
    n_pieces: int = field(init=False, default=0)  # chunks of the students; each has a record per teacher
    # The streams for which the allocator keeps the table's memory, and whether _captured_tables keeps it.
    streams: set[int] = field(init=False, default_factory=set)
    captured: bool = field(init=False, default=False)
    # Students that foreach has found finite, by index: id, version, address and storage at that time.
    finite: dict[int, tuple[int, int, int, StorageWeakRef]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.general = self.n_teachers > 1 or self.stochastic or self.skip_nonfinite or self.casts
        # Returns the stream's handle; torch.cuda.current_stream() would build an object around it.
        self._raw_stream: Any = getattr(torch._C, f"_{self.device.type}_getCurrentRawStream", None)
        if self.table is not None:
            self.n_pieces = len(self.table) // self.n_teachers
            if self.device.type != "cpu":
                self.streams.add(self.current_stream())  # the table was just copied there on this stream

    def current_stream(self) -> int:
        """The handle of the device's current stream."""
        return self._raw_stream(self.device.index)

    def keep_table(self, stream: int) -> None:
        """Keep the table's memory until what is launched on this stream, the device's current one, has read it.

        In most steps nothing is to be done: the table was made on the default stream (0), which is used now as well
        and cannot be captured. This case returns first.
        """
        if self.captured or (stream == 0 and stream in self.streams):
            return
        assert self.table is not None
        module = torch.get_device_module(self.device)
        if self.device.type == "cuda" and module.is_current_stream_capturing():
            _captured_tables.append(self.table)
            self.captured = True
        elif stream not in self.streams:
            # The plan may be freed while the kernel waits. Once per stream is enough: when the memory is freed, the
            # allocator waits for all work that is then queued on the stream.
            self.table.record_stream(module.current_stream(self.device))
            self.streams.add(stream)


class Backend(Protocol):
    """What each backend module provides."""

    NAME: str  # the name by which users request it
    TAKES_TABLE: bool  # whether it works on Work.table, else on the tensors themselves

    def unavailable(self, device_type: str) -> str | None:
        """Why this backend cannot work on tensors of this device type on this machine, and what to do about it; None
        if it can. `auto` uses the first backend that returns None. Called when a plan is made, not in every step."""

    def run(self, work: Work, arguments: Arguments, tensors: Sequence[Tensor]) -> None:
        """Update the teachers in place, with the bits that the reference backend gives. Called in every step.

        Everything was checked before: the tensors match the plan, and the arguments are stored on the work's device.
        It may return before the device has finished. A backend that takes the table already has the tensors' addresses
        there and can ignore `tensors`; it calls `work.keep_table` if the device runs asynchronously.
        """

    def swaps(self, work: Work, tensors: Sequence[Tensor]) -> Iterator[tuple[Callable[[], object], ...]]:
        """Exchange the values of teachers and students, in one or more parts that are done one after the other.

        Yields a tuple of functions per part. The caller runs each tuple with `uninterrupted`, so that it knows after
        an interrupt which parts are exchanged. That holds if they are C functions (of the extension or of torch, bound
        by functools.partial); in a Python function an interrupt can come too.
        """
