"""A long run. Time per update, memory and file descriptors must not grow.

    python tests/trust/load.py [SHARE]     # default 1, about an hour; 0.01: a hundredth of the updates

A million updates of a small model, 10,000 of ResNet-50, 10,000 teachers created and deleted, a list of 10,000
tensors, and one tensor of more than 2^31 elements if the memory suffices for two.
"""

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn

from eman_kernels import EMANTeacher, ema_update_
from eman_kernels.plan import cache

PARTS = 20
GROWTH = 2 << 20  # bytes that the allocator may retain


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def endure(name: str, act: Callable[[], object], times: int) -> None:
    """Run it `times` times in equal parts, and compare the first parts with the last."""
    for _ in range(max(10, times // 100)):
        act()
    memory, files, plans = resident(), descriptors(), (len(cache._networks), len(cache._lists))
    each = max(1, times // PARTS)
    took = []
    for _ in range(PARTS):
        begin = time.perf_counter()
        for _ in range(each):
            act()
        took.append((time.perf_counter() - begin) / each)
    grown = resident() - memory
    first, last = statistics.median(took[: PARTS // 4]), statistics.median(took[-PARTS // 4 :])
    print(
        f"{name}: {each * PARTS:,} times, {1e6 * first:.1f} us each, then {1e6 * last:.1f}, memory "
        f"{grown / 1024:+,.0f} KiB, descriptors {descriptors() - files:+}",
        flush=True,
    )
    assert grown < GROWTH, "memory grows"
    assert descriptors() == files, "descriptors are left open"
    assert (len(cache._networks), len(cache._lists)) == plans, "plans of deleted networks are kept"
    # Generous, because other processes disturb the timing. A leak slows updates down by more.
    assert last < 2 * first, "updates become slower"


def small(share: float) -> None:
    student = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    teacher = EMANTeacher(student, 0.999)
    endure("a small model", lambda: teacher.update(student), int(1_000_000 * share))


def resnet50(share: float) -> None:
    student = torchvision.models.resnet50()
    teacher = EMANTeacher(student, 0.999)
    endure("ResNet-50", lambda: teacher.update(student), int(10_000 * share))


def made_and_dropped(share: float) -> None:
    student = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))

    def live() -> None:
        teacher = EMANTeacher(student, 0.999, cast=torch.bfloat16)
        teacher(torch.ones(1, 8))
        teacher.update(student)
        with teacher.swapped():
            pass

    endure("a teacher made and dropped", live, int(10_000 * share))


def many_tensors(share: float) -> None:
    teachers, students = ([torch.full((100,), value) for _ in range(10_000)] for value in (0.0, 1.0))
    endure("10,000 tensors", lambda: ema_update_(teachers, students, 0.999), int(1_000 * share))
    assert len({float(tensor[-1]) for tensor in teachers}) == 1


def one_large_tensor() -> None:
    numel = 2**31 + 12_345
    free = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    if int(free.split()[1]) * 1024 < 2.5 * numel * 2:
        print(f"a tensor of {numel:,} elements: left out, {free}")
        return
    teacher, student = torch.zeros(numel, dtype=torch.bfloat16), torch.ones(numel, dtype=torch.bfloat16)
    begin = time.perf_counter()
    ema_update_([teacher], [student], 0.5)
    took = time.perf_counter() - begin
    wrong = sum(int((part != 0.5).sum()) for part in teacher.split(1 << 28))
    print(f"a tensor of {numel:,} elements: {took:.1f} s, {wrong} of them wrong")
    assert wrong == 0


if __name__ == "__main__":
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    for part in (small, resnet50, made_and_dropped, many_tensors):
        part(share)
    one_large_tensor()
