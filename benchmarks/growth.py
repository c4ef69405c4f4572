"""How cost grows: with the elements at a fixed number of tensors, and with the tensors at a fixed number of elements.

All methods but timm's, which makes a copy of its own, update one teacher in turn; the limit takes its memory as one.
"""

import statistics
import time
from pathlib import Path

import torch
from models import Slices
from timing import CACHE_BYTES, MOMENTUM, Row, admit, pin_the_heap, take
from torch import Tensor, nn
from updates import LIMIT, LOOP, OURS, Method

from eman_kernels import eman_update_, functional

TENSORS, ELEMENTS = 100, 10_000_000  # while the other grows
MANY_ELEMENTS = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000, 300_000_000, 10**9)
MANY_TENSORS = (10, 30, 100, 300, 1000, 3000, 10_000)
FEW_ROUNDS = 8  # for more elements than that: a call takes long
COMPARED = (LOOP, "foreach, lists kept", "timm ModelEmaV3")


def around_the_kernel(teacher: nn.Module, student: nn.Module, rounds: int) -> dict[str, float]:
    """What a step and a plan cost on the host, the kernel left out, and the bytes of the table."""
    eman_update_(teacher, student, MOMENTUM)
    followed = functional._followed[teacher][student]
    making = []
    for _ in range(min(rounds, 10)):
        begin = time.perf_counter()
        functional._follow([teacher], student, followed.options, [])
        making.append(time.perf_counter() - begin)
    followed.plan.run = lambda call: None
    cache = torch.zeros(CACHE_BYTES, dtype=torch.uint8)
    host: dict[str, list[float]] = {"host_warm_us": [], "host_cold_us": []}
    for state, samples in host.items():
        for _ in range(max(rounds, 20)):
            if state == "host_cold_us":
                cache.add_(1)
            begin = time.perf_counter()
            eman_update_(teacher, student, MOMENTUM)
            samples.append(1e6 * (time.perf_counter() - begin))
    del followed.plan.run
    tables = [work.table for work in followed.plan.works if work.backend.TAKES_TABLE]
    return {state: statistics.median(samples) for state, samples in host.items()} | {
        "plan_ms": 1e3 * statistics.median(making),
        "table_bytes": sum(table.nbytes for table in tables),
    }


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable"))


@torch.no_grad()
def point(
    kind: str, elements: int, tensors: int, device: torch.device, rounds: int, methods: dict[str, Method | str]
) -> list[Row]:
    """One size: `kind` says what grows."""
    threads = torch.get_num_threads()
    needed = 20 * elements  # teacher, student, timm's copy, the gate's, and some room
    size = {"elements": elements, "tensors": tensors}[kind]
    rows = {LIMIT: Row("slices", threads, "float32", LIMIT, elements, 1, kind, size, operations=1, syncs=0)}
    pin_the_heap()
    if needed > free_bytes(device):
        rows[LIMIT].why_not = f"needs {needed / 1e9:.0f} GB of free memory"
        return list(rows.values())
    torch.manual_seed(0)
    teacher, student = Slices(elements, tensors, device), Slices(elements, tensors, device)
    flat: list[Tensor] = [*teacher.flat, *student.flat]
    rows[LIMIT].gigabytes = 3 * flat[0].nbytes / 1e9
    updates = {LIMIT: lambda: flat[0].lerp_(flat[1], 1.0 - MOMENTUM)}
    # One of ours: another backend would make the plan of this pair of networks anew, and each the other's.
    mine = next(label for label, method in methods.items() if label.startswith(OURS) and isinstance(method, Method))
    for label in (*COMPARED, mine):
        method = methods[label]
        row = rows[label] = Row("slices", threads, "float32", label, elements, tensors, kind, size)
        try:
            following = method.make(teacher, student, MOMENTUM)
            following.update()
            admit(row, method, following, student)
        except ImportError as error:
            row.why_not = str(error)
        if row.why_not is None:
            updates[label] = following.update
    taken = take(rows, updates, device, rounds, f"{tensors:,} tensors, {elements:,} elements")
    vars(rows[mine]).update(around_the_kernel(teacher, student, rounds))
    return taken


def growth(device: torch.device, methods: dict[str, Method | str], most: int, rounds: int) -> list[Row]:
    """Both curves, up to `most` elements."""
    rows = []
    for elements in (size for size in MANY_ELEMENTS if size <= most):
        rows += point("elements", elements, TENSORS, device, rounds if elements <= ELEMENTS else FEW_ROUNDS, methods)
    for tensors in MANY_TENSORS:
        rows += point("tensors", min(ELEMENTS, most), tensors, device, rounds, methods)
    return rows
