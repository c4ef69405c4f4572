"""A teacher in CPU memory of a student on another device: the student's values are brought over before each update."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .call import Call
from .distributed import local
from .memory import extent, place
from .pairing import Pair
from .plan import Plan
from .watch import is_plain

# So many bytes of a student are gathered on its device and cross the bus in one copy: of the hundreds of small tensors
# that networks have, each would take its time. What is larger by itself gains nothing, and is copied as it is.
GATHERED = 1 << 27
_ALIGNED = 16  # bytes: for the kernels' wide accesses


def is_elsewhere(pair: Pair) -> bool:
    """Whether the teacher is in CPU memory, and the student on a device that has streams; of DTensors, the shards."""
    teacher, student = local(pair.teacher), local(pair.student)
    if teacher.device.type != "cpu" or student.device.type == "cpu":
        return False
    return hasattr(getattr(torch, student.device.type, None), "Stream") and is_plain(teacher) and is_plain(student)


class StagedPlan(Plan):
    """A plan with teachers that are elsewhere than their student: it reads a copy of the student in CPU memory.

    Each update makes the copy anew, on a stream of its own, behind what the device's current stream has been given. The
    host waits for the copy and for nothing else. The plan keeps the memory: on the CPU as many bytes as the student
    has, pinned where the device knows such memory, and on the device as many, at most GATHERED.

    Raises RuntimeError, when it is made or run, while a CUDA graph is captured: nobody can wait there.
    """

    def _prepared(self, pairs: list[Pair], at: dict[int, int]) -> list[Pair]:
        devices: dict[torch.device, dict[object, Pair]] = {}
        for pair in filter(is_elsewhere, pairs):
            devices.setdefault(pair.student.device, {}).setdefault(place(pair.student), pair)
        _check_not_captured(devices)
        # Inference mode would make tensors that cannot be written once it has ended.
        with torch.inference_mode(False), torch.no_grad():
            self._copies = [_Copy(device, list(its.values()), at) for device, its in devices.items()]
        views = {place(pair.student): view for copy in self._copies for pair, view in copy.views}
        self._views = list(views.values())
        at |= {id(view): number for number, view in enumerate(self._views, 1 + max(at.values()))}
        return [replace(p, student=views[place(p.student)]) if is_elsewhere(p) else p for p in pairs]

    def run(self, call: Call, tensors: Sequence[Tensor]) -> None:
        """As any plan's. found_inf may also lie where the student is: GradScaler's does."""
        _check_not_captured(copy.device for copy in self._copies)
        if call.found_inf is not None:
            call.found_inf = call.found_inf.cpu()
        for copy in self._copies:
            copy.start(tensors)
        for copy in self._copies:
            copy.stream.synchronize()
        super().run(call, [*tensors, *self._views])

    def describe(self) -> str:
        """As any plan's, and what is copied before."""
        return "\n".join([super().describe(), *(copy.describe() for copy in self._copies)])


class _Copy:
    """What lies on one device, copied to the CPU."""

    def __init__(self, device: torch.device, pairs: list[Pair], number: dict[int, int]) -> None:
        self.device = device
        self._module = getattr(torch, device.type)
        self.stream = self._module.Stream(device)
        self._host = _pinned(sum(map(_bytes, pairs)))
        with self._module.stream(self.stream):  # whose memory it then is
            size = min(GATHERED, sum(_bytes(pair) for pair in pairs if _bytes(pair) <= GATHERED))
            self._gathered = torch.empty(size, dtype=torch.uint8, device=device)
        self.views: list[tuple[Pair, Tensor]] = []
        self._large: list[tuple[Tensor, int]] = []  # a view, and the number of what is copied there
        # Where to on the CPU, from where on the device, and before it the views there and what is gathered in them.
        self._pieces: list[tuple[Tensor, Tensor, list[tuple[list[Tensor], list[int]]]]] = []
        begin = 0
        for piece in _pieces(pairs):
            size = sum(map(_bytes, piece))
            host, numbers = self._host[begin : begin + size], [number[id(pair.student)] for pair in piece]
            views = _views(host, piece)
            self.views += zip(piece, views, strict=True)
            begin += size
            if size > GATHERED:
                self._large.append((views[0], numbers[0]))
                continue
            # torch gathers tensors of one dtype in one launch.
            of_dtype: dict[torch.dtype, tuple[list[Tensor], list[int]]] = {}
            for view, i in zip(_views(self._gathered, piece), numbers, strict=True):
                its_views, its_numbers = of_dtype.setdefault(view.dtype, ([], []))
                its_views.append(view), its_numbers.append(i)
            self._pieces.append((host, self._gathered[:size], list(of_dtype.values())))

    @torch.no_grad()
    def start(self, tensors: Sequence[Tensor]) -> None:
        """Without waiting. What is given to the current stream from now on may write the student."""
        current = self._module.current_stream(self.device)
        self.stream.wait_stream(current)
        with self._module.stream(self.stream):
            for view, number in self._large:
                view.copy_(tensors[number], non_blocking=True)
            for host, gathered, sources in self._pieces:
                for views, numbers in sources:
                    torch._foreach_copy_(views, [tensors[i] for i in numbers])
                current.wait_stream(self.stream)
                host.copy_(gathered, non_blocking=True)
        if not self._pieces:
            current.wait_stream(self.stream)

    def describe(self) -> str:
        """What is copied from where, and how often."""
        pinned = "pinned" if self._host.is_pinned() else "pageable"
        copies = len(self._large) + len(self._pieces)
        return f"  from {self.device}: {self._host.nbytes} bytes to {pinned} memory of the CPU, in copies: {copies}"


def _check_not_captured(devices: Iterable[torch.device]) -> None:
    if any(device.type == "cuda" for device in devices) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a CUDA graph cannot hold the update of a teacher in CPU memory, which waits for the student's values: "
            "call update() outside of the capture. Nothing was written."
        )


def _bytes(pair: Pair) -> int:
    return -(-pair.student.nbytes // _ALIGNED) * _ALIGNED


def _pieces(pairs: list[Pair]) -> list[list[Pair]]:
    """Of at most GATHERED bytes each, or of one tensor that has more."""
    pieces: list[list[Pair]] = []
    left = 0
    for pair in pairs:
        if not pieces or _bytes(pair) > left:
            pieces.append([])
            left = GATHERED
        pieces[-1].append(pair)
        left -= _bytes(pair)
    return pieces


def _views(memory: Tensor, pairs: list[Pair]) -> list[Tensor]:
    """Tensors like the students', one behind another, laid out like the teachers."""
    views, begin = [], 0
    for pair in pairs:
        view = memory[begin : begin + pair.student.nbytes].view(pair.student.dtype)
        dense = extent(pair.teacher) == pair.teacher.numel()
        views.append(
            view.as_strided(pair.teacher.shape, pair.teacher.stride()) if dense else view.view(pair.teacher.shape)
        )
        begin += _bytes(pair)
    return views


def _pinned(size: int) -> Tensor:
    try:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    except RuntimeError:  # the device knows no such memory, or the system has no more to give
        return torch.empty(size, dtype=torch.uint8, device="cpu")
