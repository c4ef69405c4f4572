"""Pairs -> the table of chunks."""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends
from .backends import reference
from .call import Call
from .distributed import local_pairs, numbered
from .interrupts import at_once
from .memory import check_memory, extent, strides_of, without_ties_and_empties
from .pairing import Pair, check
from .watch import is_plain

# A full chunk has so many elements on a CPU, and on a GPU so many bytes of the wider tensor's (see chunk_size).
CHUNK_SIZE, GPU_CHUNK_BYTES = 16384, 8192
# csrc/chunk.h, in Python's words.
VECTOR16, COPIED, CAST_TO_HALF = 1, 2, 4
MAX_TEACHERS = 8
PAIR_CODES = {
    ("ema", torch.float32, torch.float32): 0,
    ("ema", torch.float32, torch.bfloat16): 1,
    ("ema", torch.float32, torch.float16): 2,
    ("ema", torch.bfloat16, torch.bfloat16): 3,
    ("ema", torch.float16, torch.float16): 4,
    ("ema", torch.bfloat16, torch.float32): 5,
    ("ema", torch.float16, torch.float32): 6,
    ("ema", torch.float64, torch.float64): 7,
}
COPY_CODES = {1: 8, 2: 9, 4: 10, 8: 11}  # by the bytes of an element

# The half types, and the step from 1 to the next larger number in each.
_EPSILON = {dtype: torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}

# A captured graph reads its table at every replay, when the plan may be long gone.
_captured_tables: list[Tensor] = []


def chunk_size(pair: Pair, chunk_bytes: int | None) -> int:
    """How many elements a full chunk of this pair has. chunk_bytes: None on a CPU.

    On a GPU two rounds of a block's 256 threads, of 16 bytes each: then many blocks share what there is evenly, and the
    record is 32 bytes of 24,000. Measured on an H200 (benchmarks/variants.py, float32, time over a flat lerp's): 1.03
    for ResNet-50 and 1.01 for ViT-B, with eight times as much 1.09 and 1.05, with half as much 1.03 and 1.02. A power
    of two: a tensor's chunks are aligned as its first.
    """
    if chunk_bytes is None:
        return CHUNK_SIZE
    return chunk_bytes // max(pair.teacher.element_size(), pair.student.element_size())


class Place(NamedTuple):
    """What a plan keeps of a pair: no tensor, but its number among those that the watch finds."""

    teacher: int
    student: int
    cast: int | None
    rule: str
    group: int
    first: int


class Work:
    """What one backend does on one device in one call.

    pairs: those of one student tensor behind one another, a teacher each. at: the number of each tensor, by its id.
    """

    def __init__(
        self,
        device: torch.device,
        backend: ModuleType,
        pairs: list[Pair],
        at: dict[int, int],
        n_teachers: int = 1,
        stochastic: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        self.device = device
        self.backend = backend
        self.n_teachers = n_teachers
        self.stochastic = stochastic and any(p.rule == "ema" and p.teacher.dtype in _EPSILON for p in pairs)
        self.skip_nonfinite = skip_nonfinite
        self.casts = any(pair.cast is not None for pair in pairs)
        # The kernels for one teacher, rounded to nearest, and no more, are the fast ones.
        self.general = n_teachers > 1 or self.stochastic or skip_nonfinite or self.casts
        self.numel = sum(pair.teacher.numel() for pair in pairs)  # the teachers' elements
        # (rule, teacher's dtype, student's dtype) -> the pairs that it holds for
        self.places: dict[tuple[str, torch.dtype, torch.dtype], list[Place]] = {}
        for p in pairs:
            cast = None if p.cast is None else at[id(p.cast)]
            place = Place(at[id(p.teacher)], at[id(p.student)], cast, p.rule, p.group, p.first)
            self.places.setdefault((p.rule, p.teacher.dtype, p.student.dtype), []).append(place)
        # torch.cuda.current_stream() would make an object around the handle.
        self._raw_stream = getattr(torch._C, f"_{device.type}_getCurrentRawStream", None)
        self.table = None
        # The streams that the table's memory is kept for until they have read it, and whether it is kept for good.
        self.streams: set[int] = set()
        self.captured = False
        if backend.TAKES_TABLE:
            chunk_bytes = None if device.type == "cpu" else GPU_CHUNK_BYTES
            self.table = table(pairs, n_teachers, skip_nonfinite, chunk_bytes).to(device)
            if not is_plain(self.table):
                raise RuntimeError(
                    f"a mode of torch is active in which new tensors have no memory: the plan's table is a "
                    f"{type(self.table).__name__}. Call update() outside of it. Nothing was written."
                )
            self.n_pieces = len(self.table) // n_teachers
            if device.type != "cpu":
                self.streams.add(self.current_stream())

    def current_stream(self) -> int:
        """The handle of the device's current stream."""
        return self._raw_stream(self.device.index)

    def keep_table(self, stream: int) -> None:
        """Keep the table's memory until this stream, the device's current one, where it was just launched, has read it.

        What is the case in most steps is done with at once: the stream is the one that the table was made on, and the
        default stream, 0, which cannot be captured.
        """
        if self.captured or (stream == 0 and stream in self.streams):
            return
        module = torch.get_device_module(self.device)
        if self.device.type == "cuda" and module.is_current_stream_capturing():
            _captured_tables.append(self.table)
            self.captured = True
        elif stream not in self.streams:
            # The plan may go while the kernel waits. Once for all: the allocator asks the stream when the memory goes.
            self.table.record_stream(module.current_stream(self.device))
            self.streams.add(stream)


class Plan:
    """How to update these pairs: made once, run many times, as long as a watch finds the tensors as they were.

    It keeps no tensor but its own tables. tensors: what the watch finds, in its order; `run` and `swaps` take them
    anew.
    Raises ValueError if teacher and student share memory, a teacher tensor overlaps itself or another, or the backend
    that was asked for cannot do the work.

    stochastic: stochastic rounding of half-precision teachers. skip_nonfinite: leave a teacher's element where the
    student's is NaN or infinite.
    """

    def __init__(
        self,
        pairs: list[Pair],
        tensors: Sequence[Tensor],
        backend: str | None = None,
        *,
        stochastic: bool = False,
        skip_nonfinite: bool = False,
    ) -> None:
        at = {id(tensor): number for number, tensor in enumerate(tensors)}
        check([], [f"{pair.name}: {fault}" for pair in pairs if (fault := _fault(pair, at))])
        written = _written(pairs)
        pairs = self._prepared(local_pairs(pairs), at)
        # The numbers of those tensors, for increment_versions. A DTensor has a version besides its shard's.
        written = {at[id(tensor)] for tensor in written + _written(pairs)}
        self.written = array("q", sorted(written))
        self.n_teachers = 1 + max((pair.group for pair in pairs), default=0)
        self.because = {pair.name: pair.because for pair in pairs if pair.because}
        pairs = numbered(without_ties_and_empties(pairs))
        check_memory(pairs)
        # Below this weight, elements that are a tenth away from the student's do not move: half an ulp is a quarter of
        # epsilon of them, or more.
        halves = [pair.teacher.dtype for pair in pairs if pair.rule == "ema" and pair.teacher.dtype in _EPSILON]
        self.stalls_below = 0.0 if stochastic else max((10 * _EPSILON[dtype] / 4 for dtype in halves), default=0.0)

        self.ineligible: dict[str, str] = {}
        on_cuda = any(pair.teacher.is_cuda or pair.student.is_cuda for pair in pairs)
        if on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the plan of this update must be made before a CUDA graph is captured, because its table is copied to "
                "the device: call update() once before the capture, and do not move tensors in between"
            )
        bundles: dict[str, list[Pair]] = {}
        for pair in pairs:
            bundles.setdefault(pair.name, []).append(pair)
        by_device: dict[torch.device, list[Pair]] = {}
        rest: list[Pair] = []
        for name, bundle in bundles.items():
            if reason := _ineligible(bundle, self.n_teachers, skip_nonfinite):
                self.ineligible[name] = reason
                rest += bundle
            else:
                by_device.setdefault(bundle[0].teacher.device, []).extend(bundle)
        check(
            [],
            [
                f"{bundle[0].name}: {fault}"
                for bundle in bundles.values()
                if bundle[0].name in self.ineligible
                if (fault := _tried(bundle, self.n_teachers, stochastic, skip_nonfinite))
            ],
            'Give it the rule "copy" or "skip", or keep a teacher of plain tensors of it.',
        )
        options = at, self.n_teachers, stochastic, skip_nonfinite
        self.works = [
            Work(device, backends.choose(device, backend), pairs, *options) for device, pairs in by_device.items()
        ]
        if rest:
            self.works.append(Work(rest[0].teacher.device, reference, rest, *options))

    def _prepared(self, pairs: list[Pair], at: dict[int, int]) -> list[Pair]:
        """The pairs as the works take them. A plan's own tensors go into `at`, and into those that it is run with."""
        return pairs

    def run(self, call: Call, tensors: Sequence[Tensor]) -> None:
        """Update the teacher in place. Raises ValueError if a tensor of the call lies on another device."""
        if not call.is_by_value():
            if call.found_inf is not None and call.found_inf.device.type == "cpu":
                if call.found_inf:
                    return
                call.found_inf = None
            given = {"momentum": call.momenta, "found_inf": call.found_inf, "step": call.step, "counter": call.skipped}
            for name, tensor in given.items():
                if isinstance(tensor, Tensor):
                    self._check_device(name, tensor.device)
        if not self.works:
            at_once(*call.counts)
        counts, call.counts = call.counts, ()
        for work in self.works:
            if work is self.works[-1]:
                call.counts = counts  # not earlier: what is counted may be read by the rest
            work.backend.run(work, call, tensors)

    def _check_device(self, name: str, device: torch.device) -> None:
        for work in self.works:
            if work.device != device:
                remedy = ", or give the momentum as a number" if name == "momentum" else ""
                raise ValueError(
                    f"the {name} is on {device} and the teacher on {work.device}; move it there{remedy}. Nothing was "
                    "written."
                )

    def swaps(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Callable[[], object], ...]]:
        """Pieces of work that exchange the pairs' values in place: of each, what is to be called at_once."""
        for work in self.works:
            yield from work.backend.swaps(work, tensors)

    def describe(self) -> str:
        """What is updated how, by which backend, and what is not eligible for the fast path and why."""
        lines = []
        for work in self.works:
            kinds = [f"{len(places)} {rule} {_short(t)} <- {_short(s)}" for (rule, t, s), places in work.places.items()]
            chunks = f", {len(work.table)} chunks" if work.table is not None else ""
            lines.append(
                f"{work.device}: {work.backend.NAME} updates {sum(map(len, work.places.values()))} tensors, "
                f"{work.numel} elements{chunks} ({', '.join(kinds)})"
            )
        lines += [f"  {name}: copied, because {reason}" for name, reason in self.because.items()]
        lines += [f"  {name}: by the reference, because {reason}" for name, reason in self.ineligible.items()]
        return "\n".join(lines)


def _written(pairs: list[Pair]) -> list[Tensor]:
    return [pair.teacher for pair in pairs] + [pair.student for pair in pairs if pair.rule == "swap"]


def _fault(pair: Pair, at: dict[int, int]) -> str | None:
    """What is wrong with a pair that pairing could not see."""
    for who, tensor in (("teacher", pair.teacher), ("student", pair.student)):
        if id(tensor) not in at:
            return f"no module holds the {who} that named_parameters() or named_buffers() gives"
    teacher, cast = pair.teacher, pair.cast
    if cast is not None and (
        cast.shape != teacher.shape or cast.device != teacher.device or cast.dtype not in _EPSILON
    ):
        what = [f"{t.dtype} of shape {tuple(t.shape)} on {t.device}" for t in (teacher, cast)]
        return f"the teacher is {what[0]}, its low-precision copy {what[1]}"
    return None


def _tried(bundle: list[Pair], n_teachers: int, *options: bool) -> str | None:
    """Why torch cannot do what these pairs of one student tensor need; tried on copies, before anything is written."""
    first = bundle[0]
    if all(is_plain(pair.teacher) and is_plain(pair.student) for pair in bundle):
        return None
    try:
        with torch.no_grad():
            copies = [
                replace(p, teacher=p.teacher.detach().clone(), student=p.student.detach().clone(), cast=None)
                for p in bundle
            ]
            tensors = [tensor for p in copies for tensor in (p.teacher, p.student)]
            work = Work(
                first.teacher.device, reference, copies, {id(t): i for i, t in enumerate(tensors)}, n_teachers, *options
            )
            if first.rule == "swap":
                for calls in reference.swaps(work, tensors):
                    at_once(*calls)
            else:
                reference.run(work, Call([0.5] * n_teachers), tensors)
    except Exception as error:  # a subclass may raise what it likes
        kinds = f"the teacher is a {type(first.teacher).__name__}, the student a {type(first.student).__name__}"
        verb = {"ema": "average", "copy": "copy", "swap": "exchange"}[first.rule]
        return f"{kinds}, which torch cannot {verb} ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    return None


def table(
    pairs: Sequence[Pair], n_teachers: int = 1, skip_nonfinite: bool = False, chunk_bytes: int | None = None
) -> Tensor:
    """The chunk records, int64 [n_pieces * n_teachers, 4]; csrc/chunk.h says what they hold. chunk_bytes: as in
    chunk_size.

    pairs: those of one student tensor behind one another, a teacher each.

    Full chunks come first: the small tensors then fill the tail of the run instead of opening it. Without torch, whose
    loops start OpenMP's threads, for which a forked child waits forever.
    """
    full, ends = array("q"), []
    for bundle in (pairs[i : i + n_teachers] for i in range(0, len(pairs), n_teachers)):
        chunk = chunk_size(bundle[0], chunk_bytes)
        n_full, rest = divmod(bundle[0].teacher.numel(), chunk)
        by_dtype = skip_nonfinite or any(pair.cast is not None for pair in bundle)
        columns, end = [], array("q")
        for pair in bundle:
            addresses, sizes, code = _record(pair, by_dtype)
            columns += [_column(start, chunk * size, n_full) for start, size in zip(addresses, sizes, strict=True)]
            columns += [_column(chunk | code << 32, 0, n_full)]
            end.extend(start + n_full * chunk * size for start, size in zip(addresses, sizes, strict=True))
            end.append(rest | code << 32)
        records = array("q", bytes(8 * len(columns) * n_full))
        for i, column in enumerate(columns):
            records[i :: len(columns)] = column
        full += records
        if rest:
            ends.append((rest, end))
    for _, end in sorted(ends, key=lambda end: -end[0]):
        full += end
    return torch.frombuffer(full, dtype=torch.int64).view(-1, 4) if full else torch.empty(0, 4, dtype=torch.int64)


def _column(first: int, step: int, n: int) -> array:
    """first, first + step, ..., n numbers."""
    return array("q", range(first, first + n * step, step)) if step else array("q", [first]) * n


def _record(pair: Pair, by_dtype: bool) -> tuple[tuple[int, int, int], tuple[int, int, int], int]:
    """The first three words of the pair's first chunk, by how much an element moves each, and the code with the flags.
    by_dtype: a copy is told from others of its width.

    Chunks are a multiple of 16 elements, so that all are aligned as the first.
    """
    teacher, student, cast = pair.teacher, pair.student, pair.cast
    code, extra, extra_bytes = pair_code(pair), 0, 0
    addresses = teacher.data_ptr() | student.data_ptr()
    if pair.rule == "copy" and teacher.is_floating_point() and by_dtype:
        code = PAIR_CODES["ema", teacher.dtype, teacher.dtype] | COPIED << 16
    if cast is not None:
        code |= (cast.dtype == torch.float16) * CAST_TO_HALF << 16
        extra, extra_bytes = cast.data_ptr(), 2
        addresses |= extra
    elif teacher.dtype in _EPSILON:
        extra, extra_bytes = pair.first, 1
    code |= (addresses % 16 == 0) * VECTOR16 << 16
    sizes = teacher.element_size(), student.element_size(), extra_bytes
    return (teacher.data_ptr(), student.data_ptr(), extra), sizes, code


def pair_code(pair: Pair) -> int | None:
    """The pair's code in a chunk record; None if the kernels do not know it."""
    if pair.cast is not None and pair.teacher.dtype != torch.float32:
        return None
    if pair.rule == "ema":
        return PAIR_CODES.get(("ema", pair.teacher.dtype, pair.student.dtype))
    if pair.teacher.dtype != pair.student.dtype or pair.teacher.is_complex():
        return None
    return COPY_CODES.get(pair.teacher.element_size())


def _ineligible(bundle: list[Pair], n_teachers: int, skip_nonfinite: bool) -> str | None:
    """Why the reference must update these pairs of one student tensor; None if they can be cut into chunks."""
    if reason := next(filter(None, map(ineligible, bundle)), None):
        return reason
    if len(bundle) < n_teachers or len({(p.teacher.dtype, p.teacher.device, p.rule) for p in bundle}) > 1:
        return "its teachers differ in dtypes, devices or ties"
    dtype = bundle[0].teacher.dtype
    if skip_nonfinite and dtype.is_floating_point and ("ema", dtype, dtype) not in PAIR_CODES:
        return f"no kernel knows what is finite in {dtype}"
    return None


def ineligible(pair: Pair) -> str | None:
    """Why the reference must update this pair; None if it can be cut into chunks."""
    teacher, student, cast = pair.teacher, pair.student, pair.cast
    if not (is_plain(teacher) and is_plain(student)):
        return f"it is a {type(teacher).__name__} that follows a {type(student).__name__}"
    if teacher.device != student.device:
        return f"the teacher is on {teacher.device}, the student on {student.device}"
    if pair_code(pair) is None:
        return f"no kernel does {pair.rule} of {_short(student.dtype)} into {_short(teacher.dtype)}"
    if teacher.is_conj() or student.is_conj() or teacher.is_neg() or student.is_neg():
        return "it is a lazy conjugate or negative view"
    if strides_of(teacher) != strides_of(student):
        return f"the teacher's strides are {teacher.stride()}, the student's {student.stride()}"
    if cast is not None and strides_of(teacher) != strides_of(cast):
        return f"the teacher's strides are {teacher.stride()}, its low-precision copy's {cast.stride()}"
    if extent(teacher) != teacher.numel():
        return f"it is not dense: shape {tuple(teacher.shape)}, strides {teacher.stride()}"
    if teacher.data_ptr() % teacher.element_size() or student.data_ptr() % student.element_size():
        return "its address is not a multiple of its element size"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
