"""The general kernels, mode by mode, on each backend that runs the chunk table, beside the bytes that a mode moves.

Modes: one teacher rounded stochastically, with a low-precision copy, or with non-finite elements skipped; and three
teachers of one student. "nearest" is the plain kernel, for comparison. A mode is timed only if its bits are the
reference's.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from models import pair, tensors_of
from timing import MOMENTUM, WARM_UP, make_eviction_buffer, quartiles, time_once
from torch import Tensor
from updates import COPY, OURS

from eman_kernels.backends import BACKENDS, reference
from eman_kernels.backends.interface import Arguments, Backend, Work
from eman_kernels.networks.pairing import Pair
from eman_kernels.networks.sharding import number_elements
from eman_kernels.options import Options
from eman_kernels.plan.chunks import build_table
from eman_kernels.plan.work import build_work

CHUNK_BYTES = (8192, 16384)  # on a GPU; the first is what a plan uses


class Mode(NamedTuple):
    teacher: torch.dtype
    student: torch.dtype
    n_teachers: int = 1
    casts: bool = False
    options: Options = Options()

    @property
    def bytes_per_element(self) -> int:
        """Of the student: each tensor is read once, and each teacher and copy written once."""
        return self.student.itemsize + self.n_teachers * (2 * self.teacher.itemsize + 2 * self.casts)


STOCHASTIC = Options(rounding="stochastic")
MODES = {
    "nearest": Mode(torch.float32, torch.float32),
    "stochastic": Mode(torch.bfloat16, torch.float32, options=STOCHASTIC),
    "stochastic, bf16 student": Mode(torch.bfloat16, torch.bfloat16, options=STOCHASTIC),
    "cast": Mode(torch.float32, torch.float32, casts=True),
    "skip": Mode(torch.float32, torch.float32, options=Options(nonfinite="skip")),
    "three teachers": Mode(torch.float32, torch.float32, n_teachers=3),
}


class Case:
    """A mode on the floating-point tensors of a network."""

    def __init__(self, network: str, mode: Mode, device: torch.device) -> None:
        _, student = pair(network, "float32", device)
        floats = [tensor for tensor in tensors_of(student).values() if tensor.is_floating_point()]
        students = [tensor.to(mode.student) for tensor in floats]
        pairs = []
        for group in range(mode.n_teachers):
            teachers = [(student + 0.05 * torch.randn_like(student)).to(mode.teacher) for student in students]
            named = [Pair(str(i), t, s, "ema", group) for i, (t, s) in enumerate(zip(teachers, students, strict=True))]
            pairs += number_elements(named)
        if mode.casts:
            pairs = [replace(p, cast=p.teacher.to(torch.bfloat16)) for p in pairs]
        # The records of one student tensor are adjacent.
        self.pairs = sorted(pairs, key=lambda p: int(p.name))
        self.tensors = [tensor for p in self.pairs for tensor in (p.teacher, p.student, p.cast) if tensor is not None]
        self.before = [p.teacher.clone() for p in self.pairs]
        self.mode, self.device = mode, device
        self.elements = sum(student.numel() for student in students)
        self.arguments = Arguments([MOMENTUM] * mode.n_teachers, seed=1, step=2)

    def work(self, backend: Backend, chunk_bytes: int | None = None) -> Work:
        """chunk_bytes: of the wider tensor; None for what a plan uses."""
        index_of = {id(tensor): i for i, tensor in enumerate(self.tensors)}
        work = build_work(self.device, backend, self.pairs, index_of, self.mode.n_teachers, self.mode.options)
        if chunk_bytes is None:
            return work
        table = build_table(self.pairs, self.mode.n_teachers, work.skip_nonfinite, chunk_bytes)
        return replace(work, table=table.to(self.device))

    def run(self, backend: Backend, work: Work) -> None:
        backend.run(work, self.arguments, self.tensors)

    def result(self, backend: Backend, work: Work) -> list[Tensor]:
        """The teachers and their low-precision copies after one update of the initial values."""
        for p, before in zip(self.pairs, self.before, strict=True):
            p.teacher.copy_(before)
        self.run(backend, work)
        return [tensor.clone() for p in self.pairs for tensor in (p.teacher, p.cast) if tensor is not None]


def backends_for(device: torch.device) -> dict[str, Backend]:
    """The backends that run the table on this device."""
    return {name: b for name, b in BACKENDS.items() if b.TAKES_TABLE and b.unavailable(device.type) is None}


def cases_of(network: str, device: torch.device, modes: tuple[str, ...] = tuple(MODES)) -> Iterator[tuple[str, Case]]:
    return ((name, Case(network, MODES[name], device)) for name in modes)


@torch.no_grad()
def measure_modes(network: str, device: torch.device, rounds: int) -> list[dict]:
    """One row per mode, backend and size of a full chunk. x_copy: the time over that in which one flat copy moves as
    many bytes, in the same rounds."""
    rows, updates = [], []
    for name, case in cases_of(network, device):
        want = case.result(reference, case.work(reference))
        for label, backend in backends_for(device).items():
            for chunk_bytes in (None,) if device.type == "cpu" else CHUNK_BYTES:
                row = {"kind": "mode", "model": network, "mode": name, "method": f"{OURS} {label}"}
                row |= {"chunk_bytes": chunk_bytes, "bytes_per_element": case.mode.bytes_per_element}
                work = case.work(backend, chunk_bytes)
                if all(map(torch.equal, case.result(backend, work), want)):
                    row["gigabytes"] = 1e-9 * case.elements * case.mode.bytes_per_element
                    updates.append((row, partial(case.run, backend, work)))
                else:
                    row["why_not"] = "its bits differ from the reference's"
                rows.append(row)
    flat = [torch.randn(case.elements, device=device) for _ in range(2)]
    copied = {"kind": "mode", "model": network, "mode": COPY, "method": COPY, "gigabytes": 2e-9 * flat[0].nbytes}
    updates.insert(0, (copied, lambda: flat[0].copy_(flat[1])))
    cache = make_eviction_buffer(device)
    times: list[list[float]] = [[] for _ in updates]
    for k in range(rounds + WARM_UP):
        for samples, (_, update) in zip(times, updates, strict=True):
            taken, _ = time_once(update, device, cache)
            if k >= WARM_UP:
                samples.append(taken)
    for samples, (row, _) in zip(times, updates, strict=True):
        row["q1_ms"], row["median_ms"], row["q3_ms"] = quartiles(samples)
        fewer = copied["gigabytes"] / row["gigabytes"]
        per_byte = [fewer * taken / copy for taken, copy in zip(samples, times[0], strict=True)]
        row["x_copy_q1"], row["x_copy"], row["x_copy_q3"] = quartiles(per_byte)
    return [copied, *rows]
