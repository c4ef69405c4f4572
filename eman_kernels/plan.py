"""Pairs -> the table of chunks. The only room that knows addresses; it notices when they move."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
VECTOR16 = 1
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

# A captured graph reads its table at every replay, when the plan may be long gone.
_captured_tables: list[Tensor] = []


@dataclass
class Work:
    """What one backend does on one device in one call."""

    device: torch.device
    backend: ModuleType
    pairs: list[Pair]

    @cached_property
    def table(self) -> Tensor:
        """The chunk records, int64 [n_chunks, 4] on the device; csrc/chunk.h says what they hold.

        Full chunks come first: the small tensors then fill the tail of the run instead of opening it.
        """
        teacher, student, numel, code, teacher_bytes, student_bytes = _on_host(
            (t.data_ptr(), s.data_ptr(), t.numel(), pair_code(pair), t.element_size(), s.element_size())
            for pair in self.pairs
            for t, s in ((pair.teacher, pair.student),)
        ).T
        chunks = (numel + CHUNK_SIZE - 1) // CHUNK_SIZE
        which = _on_host(range(len(numel))).repeat_interleave(chunks)
        first = (_on_host(range(len(which))) - (chunks.cumsum(0) - chunks)[which]) * CHUNK_SIZE
        length = (numel[which] - first).clamp(max=CHUNK_SIZE)
        teacher = teacher[which] + first * teacher_bytes[which]
        student = student[which] + first * student_bytes[which]
        vector16 = ((teacher | student) % 16 == 0).long() * VECTOR16
        packed = length | code[which] << 32 | vector16 << 48
        table = torch.stack([teacher, student, torch.zeros_like(teacher), packed], dim=1)
        return table[length.argsort(descending=True, stable=True)].to(self.device)

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
        return sum(pair.teacher.numel() for pair in self.pairs)


class Plan:
    """How to update these pairs: made once, run many times, until `moved`.

    It keeps the memory of its tensors alive, so that an address that has not changed is that memory still, and not the
    tensor objects, so that they can die.
    Raises ValueError if teacher and student share memory, a teacher tensor overlaps itself or another, or the backend
    that was asked for cannot do the work.

    also_read: objects that the caller looks at in each step, after `moved`.
    """

    def __init__(self, pairs: list[Pair], backend: str | None = None, also_read: Sequence[object] = ()) -> None:
        tensors = [tensor for pair in pairs for tensor in (pair.teacher, pair.student)]
        self._with_address = list(map(_is_plain, tensors))
        self._addresses = self._addresses_of(tensors)
        self._lines = _lines(list(compress(tensors, self._with_address)), also_read)
        self._dicts = [thing for thing in also_read if type(thing) is dict]
        self._dict_lines = _on_host(map(id, self._dicts))
        self.names = [pair.name for pair in pairs]
        # Inference mode would make aliases that cannot be written once it has ended.
        with torch.inference_mode(False):
            pairs = [Pair(pair.name, _alias(pair.teacher), _alias(pair.student), pair.rule) for pair in pairs]
        self.pairs = _without_ties_and_empties(pairs)
        _check_memory(self.pairs)

        self.ineligible: dict[str, str] = {}
        on_cuda = any(pair.teacher.is_cuda or pair.student.is_cuda for pair in self.pairs)
        if on_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the plan of this update must be made before a CUDA graph is captured, because its table is copied to "
                "the device: call update() once before the capture, and do not move tensors in between"
            )
        by_device: dict[torch.device, list[Pair]] = {}
        rest: list[Pair] = []
        for pair in self.pairs:
            if reason := ineligible(pair):
                self.ineligible[pair.name] = reason
                rest.append(pair)
            else:
                by_device.setdefault(pair.teacher.device, []).append(pair)
        self.works = [Work(device, backends.choose(device, backend), pairs) for device, pairs in by_device.items()]
        if rest:
            self.works.append(Work(rest[0].teacher.device, reference, rest))
        for work in self.works:
            if work.backend.TAKES_TABLE:
                work.table  # noqa: B018  now, and not in the first step

    def _addresses_of(self, tensors: list[Tensor]) -> list[int]:
        return list(map(Tensor.data_ptr, compress(tensors, self._with_address)))

    def moved(self, tensors: list[Tensor]) -> bool:
        """Whether one lies elsewhere than when the plan was made. tensors: teacher, student, teacher, student ..."""
        if extension.C is not None:
            lines, dicts = self._lines, self._dict_lines
            extension.C.prefetch(lines.data_ptr(), len(lines), dicts.data_ptr(), len(dicts))
        return self._addresses_of(tensors) != self._addresses

    def run(self, momentum: float | Tensor) -> None:
        """Update the teacher in place. Raises ValueError if the momentum lies on another device than the teacher."""
        if isinstance(momentum, Tensor):
            for work in self.works:
                if momentum.device != work.device:
                    raise ValueError(
                        f"the momentum is on {momentum.device} and the teacher on {work.device}; move it there, or "
                        "give it as a number. Nothing was written."
                    )
        for work in self.works:
            work.backend.run(work, momentum)

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
    if pair.rule == "ema":
        return PAIR_CODES.get(("ema", pair.teacher.dtype, pair.student.dtype))
    if pair.teacher.dtype != pair.student.dtype or pair.teacher.is_complex():
        return None
    return COPY_CODES.get(pair.teacher.element_size())


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
        if known is not pair and (_place(known.student), known.rule) != (_place(pair.student), pair.rule):
            raise ValueError(
                f"the teacher ties {known.name} and {pair.name} to one memory, but they would follow different "
                f"students or rules; tie them in the student as well, or give the teacher two. Nothing was written."
            )
    return list(first.values())


def _place(tensor: Tensor) -> object:
    if not _is_plain(tensor):
        return id(tensor)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _check_memory(pairs: list[Pair]) -> None:
    spans: dict[torch.device, list[tuple[int, int, str, str]]] = {}
    for pair in pairs:
        for who, tensor in (("teacher", pair.teacher), ("student", pair.student)):
            if not _is_plain(tensor):
                continue
            if who == "teacher" and _overlaps_itself(tensor):
                raise ValueError(
                    f"{pair.name}: the teacher is an expanded or overlapping view (shape {tuple(tensor.shape)}, "
                    f"strides {tensor.stride()}), and one place would be written twice; give it memory with .clone()"
                )
            start = tensor.data_ptr()
            end = start + _extent(tensor) * tensor.element_size()
            spans.setdefault(tensor.device, []).append((start, end, who, pair.name))
    for on_device in spans.values():
        last: dict[str, tuple[int, str]] = {}
        for start, end, who, name in sorted(on_device):
            for other, (other_end, other_name) in last.items():
                if start < other_end and "teacher" in (who, other):
                    raise ValueError(
                        f"the {who}'s {name} and the {other}'s {other_name} share memory; the teacher must have its "
                        f"own (copy.deepcopy the student, or .clone() the tensor). Nothing was written."
                    )
            last[who] = max(last.get(who, (0, "")), (end, name))
