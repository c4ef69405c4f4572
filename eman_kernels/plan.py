"""Pairs -> the table of chunks. The only room that knows addresses; it notices when they move."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from types import ModuleType

import torch
from torch import Tensor, nn

from . import backends
from .backends import extension, reference
from .pairing import Pair

# csrc/chunk.h, in Python's words.
CHUNK_SIZE = 16384
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


@dataclass(slots=True)
class Call:
    """What differs from one update to the next. Tensors lie on the teacher's device and are not waited for."""

    momenta: list[float] | Tensor  # one for each teacher; a tensor is of float32 or float64
    found_inf: Tensor | None = None  # float32: nothing is written when it is not 0
    seed: int = 0  # of stochastic rounding; below 2^32
    step: int | Tensor = 0  # likewise; a tensor is of int64
    skipped: Tensor | None = None  # int64: the number of skipped student elements is added to it

    def is_by_value(self) -> bool:
        """Whether no tensor is in it."""
        numbers = type(self.momenta) is list and not isinstance(self.step, Tensor)
        return numbers and self.found_inf is None and self.skipped is None


@dataclass
class Work:
    """What one backend does on one device in one call."""

    device: torch.device
    backend: ModuleType
    pairs: list[Pair]  # of one student tensor behind one another, a teacher each
    n_teachers: int = 1
    stochastic: bool = False
    skip_nonfinite: bool = False

    def __post_init__(self) -> None:
        self.stochastic &= any(pair.rule == "ema" and pair.teacher.dtype in _EPSILON for pair in self.pairs)
        self.casts = any(pair.cast is not None for pair in self.pairs)
        # The kernels for one teacher, rounded to nearest, and no more, are the fast ones.
        self.general = self.n_teachers > 1 or self.stochastic or self.skip_nonfinite or self.casts

    @cached_property
    def table(self) -> Tensor:
        """The chunk records, int64 [n_pieces * n_teachers, 4] on the device; csrc/chunk.h says what they hold.

        Full chunks come first: the small tensors then fill the tail of the run instead of opening it.
        """
        columns = _on_host(number for pair in self.pairs for number in self._record(pair))
        teacher, student, extra, numel, code, teacher_bytes, student_bytes, extra_bytes = columns.view(
            -1, self.n_teachers, 8
        ).unbind(-1)
        chunks = (numel[:, 0] + CHUNK_SIZE - 1) // CHUNK_SIZE
        which = _on_host(range(len(numel))).repeat_interleave(chunks)
        first = (_on_host(range(len(which))) - (chunks.cumsum(0) - chunks)[which])[:, None] * CHUNK_SIZE
        length = (numel[which] - first).clamp(max=CHUNK_SIZE)
        teacher = teacher[which] + first * teacher_bytes[which]
        student = student[which] + first * student_bytes[which]
        extra = extra[which] + first * extra_bytes[which]
        addresses = teacher | student | torch.where(extra_bytes[which] == 2, extra, 0)
        vector16 = (addresses % 16 == 0).all(1, keepdim=True).long() * VECTOR16
        packed = length | code[which] << 32 | vector16 << 48
        table = torch.stack([teacher, student, extra, packed], dim=-1)
        return table[length[:, 0].argsort(descending=True, stable=True)].view(-1, 4).to(self.device)

    def _record(self, pair: Pair) -> tuple[int, ...]:
        """What a pair's chunks are cut from; the code with the flags that all of them have."""
        teacher, student, cast = pair.teacher, pair.student, pair.cast
        code, extra, extra_bytes = pair_code(pair), 0, 0
        if pair.rule == "copy" and teacher.is_floating_point() and (cast is not None or self.skip_nonfinite):
            code = PAIR_CODES["ema", teacher.dtype, teacher.dtype] | COPIED << 16
        if cast is not None:
            code |= (cast.dtype == torch.float16) * CAST_TO_HALF << 16
            extra, extra_bytes = cast.data_ptr(), 2
        elif teacher.dtype in _EPSILON:
            extra, extra_bytes = pair.first, 1
        sizes = teacher.element_size(), student.element_size(), extra_bytes
        return teacher.data_ptr(), student.data_ptr(), extra, teacher.numel(), code, *sizes

    @cached_property
    def n_pieces(self) -> int:
        return len(self.table) // self.n_teachers

    def keep_table(self) -> None:
        """Keep the table's memory until the current stream of its device, where it was just launched, has read it."""
        module = torch.get_device_module(self.device)
        if self.device.type == "cuda" and module.is_current_stream_capturing():
            _captured_tables.append(self.table)
        else:
            # The plan may go while the kernel waits on a stream that the table was not made on.
            self.table.record_stream(module.current_stream(self.device))

    @cached_property
    def numel(self) -> int:
        """The teachers' elements."""
        return sum(pair.teacher.numel() for pair in self.pairs)


class Plan:
    """How to update these pairs: made once, run many times, until `moved`.

    It keeps the memory of its tensors alive, so that an address that has not changed is that memory still, and not the
    tensor objects, so that they can die.
    Raises ValueError if teacher and student share memory, a teacher tensor overlaps itself or another, or the backend
    that was asked for cannot do the work.

    stochastic: round half teachers up or down at random. skip_nonfinite: leave a teacher's element where the student's
    is NaN or infinite. also_read: objects that the caller looks at in each step, after `moved`.
    """

    def __init__(
        self,
        pairs: list[Pair],
        backend: str | None = None,
        *,
        stochastic: bool = False,
        skip_nonfinite: bool = False,
        also_read: Sequence[object] = (),
    ) -> None:
        tensors = [tensor for pair in pairs for tensor in (pair.teacher, pair.student)]
        self._with_address = list(map(_is_plain, tensors))
        self._addresses = self._addresses_of(tensors)
        self._lines = _lines(list(compress(tensors, self._with_address)), also_read)
        self._dicts = [thing for thing in also_read if type(thing) is dict]
        self._dict_lines = _on_host(map(id, self._dicts))
        self._to_prefetch = [n for t in (self._lines, self._dict_lines) for n in (t.data_ptr(), len(t))]
        self.names = [pair.name for pair in pairs]
        self.n_teachers = 1 + max((pair.group for pair in pairs), default=0)
        # Inference mode would make aliases that cannot be written once it has ended.
        with torch.inference_mode(False):
            pairs = [replace(pair, teacher=_alias(pair.teacher), student=_alias(pair.student)) for pair in pairs]
        self.pairs = _numbered(_without_ties_and_empties(pairs))
        _check_memory(self.pairs)
        # Below this weight, elements that are a tenth away from the student's do not move: half an ulp is a quarter of
        # epsilon of them, or more.
        halves = [pair.teacher.dtype for pair in self.pairs if pair.rule == "ema" and pair.teacher.dtype in _EPSILON]
        self.stalls_below = 0.0 if stochastic else max((10 * _EPSILON[dtype] / 4 for dtype in halves), default=0.0)

        self.ineligible: dict[str, str] = {}
        on_cuda = any(pair.teacher.is_cuda or pair.student.is_cuda for pair in self.pairs)
        if on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the plan of this update must be made before a CUDA graph is captured, because its table is copied to "
                "the device: call update() once before the capture, and do not move tensors in between"
            )
        bundles: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            bundles.setdefault(pair.name, []).append(pair)
        by_device: dict[torch.device, list[Pair]] = {}
        rest: list[Pair] = []
        for name, bundle in bundles.items():
            if reason := _ineligible(bundle, self.n_teachers, skip_nonfinite):
                self.ineligible[name] = reason
                rest += bundle
            else:
                by_device.setdefault(bundle[0].teacher.device, []).extend(bundle)
        options = self.n_teachers, stochastic, skip_nonfinite
        self.works = [
            Work(device, backends.choose(device, backend), pairs, *options) for device, pairs in by_device.items()
        ]
        if rest:
            self.works.append(Work(rest[0].teacher.device, reference, rest, *options))
        for work in self.works:
            if work.backend.TAKES_TABLE:
                work.table  # noqa: B018  now, and not in the first step

    def _addresses_of(self, tensors: list[Tensor]) -> list[int]:
        return list(map(Tensor.data_ptr, compress(tensors, self._with_address)))

    def moved(self, tensors: list[Tensor]) -> bool:
        """Whether one lies elsewhere than when the plan was made. tensors: teacher, student, teacher, student ..."""
        if extension.C is not None:
            extension.C.prefetch(*self._to_prefetch)
        return self._addresses_of(tensors) != self._addresses

    def run(self, call: Call) -> None:
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
        for work in self.works:
            work.backend.run(work, call)

    def _check_device(self, name: str, device: torch.device) -> None:
        for work in self.works:
            if work.device != device:
                remedy = ", or give the momentum as a number" if name == "momentum" else ""
                raise ValueError(
                    f"the {name} is on {device} and the teacher on {work.device}; move it there{remedy}. Nothing was "
                    "written."
                )

    def swap(self) -> None:
        """Exchange the pairs' values, in place."""
        for work in self.works:
            work.backend.swap(work)

    def describe(self) -> str:
        """What is updated how, by which backend, and what is not eligible for the fast path and why."""
        lines = []
        for work in self.works:
            kinds = Counter(f"{p.rule} {_short(p.teacher)} <- {_short(p.student)}" for p in work.pairs)
            table = f", {len(work.table)} chunks" if work.backend.TAKES_TABLE else ""
            lines.append(
                f"{work.device}: {work.backend.NAME} updates {len(work.pairs)} tensors, {work.numel} elements{table} "
                f"({', '.join(f'{count} {kind}' for kind, count in kinds.items())})"
            )
        lines += [f"  {name}: by the reference, because {reason}" for name, reason in self.ineligible.items()]
        return "\n".join(lines)


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
    if len(bundle) < n_teachers or len({(pair.teacher.dtype, pair.rule) for pair in bundle}) > 1:
        return "its teachers differ in dtypes or ties"
    dtype = bundle[0].teacher.dtype
    if skip_nonfinite and dtype.is_floating_point and ("ema", dtype, dtype) not in PAIR_CODES:
        return f"no kernel knows what is finite in {dtype}"
    return None


def ineligible(pair: Pair) -> str | None:
    """Why the reference must update this pair; None if it can be cut into chunks."""
    teacher, student = pair.teacher, pair.student
    if not (_is_plain(teacher) and _is_plain(student)):
        return f"it is a {type(teacher).__name__} that follows a {type(student).__name__}"
    if teacher.device != student.device:
        return f"the teacher is on {teacher.device}, the student on {student.device}"
    if pair_code(pair) is None:
        return f"no kernel does {pair.rule} of {_short(student)} into {_short(teacher)}"
    if teacher.is_conj() or student.is_conj() or teacher.is_neg() or student.is_neg():
        return "it is a lazy conjugate or negative view"
    if _strides(teacher) != _strides(student):
        return f"the teacher's strides are {teacher.stride()}, the student's {student.stride()}"
    if _extent(teacher) != teacher.numel():
        return f"it is not dense: shape {tuple(teacher.shape)}, strides {teacher.stride()}"
    if teacher.data_ptr() % teacher.element_size() or student.data_ptr() % student.element_size():
        return "its address is not a multiple of its element size"
    return None


def _lines(tensors: list[Tensor], others: Sequence[object]) -> Tensor:
    """Addresses of the cache lines that a data_ptr of these tensors and a look at the others touch: hints, no more."""
    lines = [id(thing) for thing in (*tensors, *others)]
    for tensor in tensors:
        storage = tensor.untyped_storage()._cdata
        lines += [tensor._cdata, tensor._cdata + 64, tensor._cdata + 128, storage, storage + 64]
    return _on_host(lines)


def _on_host(numbers: Iterable[object]) -> Tensor:
    """int64, in the host's memory whatever torch.set_default_device says."""
    return torch.tensor(list(numbers), dtype=torch.int64, device="cpu")


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def _alias(tensor: Tensor) -> Tensor:
    """The same memory as another object. A subclass keeps to itself where its memory is: it stands for itself."""
    return tensor.detach() if _is_plain(tensor) else tensor


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _strides(tensor: Tensor) -> list[int]:
    """The strides that matter: a dimension of size 1 may have any."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _extent(tensor: Tensor) -> int:
    """The elements from the first in memory to the last, both counted."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _overlaps_itself(tensor: Tensor) -> bool:
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def _without_ties_and_empties(pairs: list[Pair]) -> list[Pair]:
    """Each piece of teacher memory once. Raises ValueError where one is to follow two different students."""
    first: dict[object, Pair] = {}
    for pair in pairs:
        if pair.teacher.numel() == 0:
            continue
        known = first.setdefault(_place(pair.teacher), pair)
        if known.group != pair.group:
            raise ValueError(_shares(f"teacher {pair.group}", pair.name, f"teacher {known.group}", known.name))
        if known is not pair and (_place(known.student), known.rule) != (_place(pair.student), pair.rule):
            raise ValueError(
                f"the teacher ties {known.name} and {pair.name} to one memory, but they would follow different "
                f"students or rules; tie them in the student as well, or give the teacher two. Nothing was written."
            )
    return list(first.values())


def _shares(who: str, name: str, other: str, other_name: str) -> str:
    return (
        f"{who}'s {name} and {other}'s {other_name} share memory; the teacher must have its own (copy.deepcopy the "
        f"student, or .clone() the tensor). Nothing was written."
    )


def _numbered(pairs: list[Pair]) -> list[Pair]:
    """With the numbers of their first elements: multiples of 8, the same whoever updates them."""
    numbered, first = [], 0
    for pair in pairs:
        numbered.append(replace(pair, first=first))
        first += (pair.teacher.numel() + 7) // 8 * 8
    return numbered


def _place(tensor: Tensor) -> object:
    if not _is_plain(tensor):
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _check_memory(pairs: list[Pair]) -> None:
    several = len({pair.group for pair in pairs}) > 1
    spans: dict[torch.device, list[tuple[int, int, bool, str, str]]] = {}
    for pair in pairs:
        teacher = f"teacher {pair.group}" if several else "the teacher"
        for who, tensor, written in (
            (teacher, pair.teacher, True),
            ("the student", pair.student, pair.rule == "swap"),
        ):
            if not _is_plain(tensor):
                continue
            if written and _overlaps_itself(tensor):
                raise ValueError(
                    f"{pair.name}: {who} is an expanded or overlapping view (shape {tuple(tensor.shape)}, "
                    f"strides {tensor.stride()}), and one place would be written twice; give it memory with .clone()"
                )
            start = tensor.data_ptr()
            end = start + _extent(tensor) * tensor.element_size()
            spans.setdefault(tensor.device, []).append((start, end, written, who, pair.name))
    for on_device in spans.values():
        # The furthest that a tensor which is written, and one which is only read, has reached so far.
        last: dict[bool, tuple[int, str, str]] = {}
        for start, end, written, who, name in sorted(on_device):
            for other_written, (other_end, other, other_name) in last.items():
                if start < other_end and (written or other_written):
                    raise ValueError(_shares(who, name, other, other_name))
            last[written] = max(last.get(written, (0, "", "")), (end, who, name))
