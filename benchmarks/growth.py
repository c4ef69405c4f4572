"""How cost grows: with the elements at a fixed number of tensors, and with the tensors at a fixed number of elements.

All methods but timm's, which makes a copy of its own, update one teacher in turn; the limit takes its memory as one.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from models import Slices
from timing import MOMENTUM, Row, admit, empty, nothing_cached, pin_the_heap, said, take
from torch import Tensor, nn
from updates import LIMIT, LOOP, OURS, Method, Update

from eman_kernels import EMANTeacher, eman_update_, functional, known, plan_for
from eman_kernels.plan import Plan

TENSORS, ELEMENTS = 100, 10_000_000  # while the other grows
MANY_ELEMENTS = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000, 300_000_000, 10**9)
MANY_TENSORS = (10, 30, 100, 300, 1000, 3000, 10_000)
FEW_ROUNDS = 8  # for more elements than that: a call takes long
COMPARED = (LOOP, "foreach, lists kept", "timm ModelEmaV3")


def host_times(update: Update, plan: Plan, rounds: int, label: str) -> dict[str, float]:
    """Microseconds of an update by this plan with the kernel left out, in a warm and in a cold cache."""
    plan.run = lambda call, tensors: None
    cache = nothing_cached(torch.device("cpu"))
    times: dict[str, list[float]] = {f"{label}_warm_us": [], f"{label}_cold_us": []}
    for state, samples in times.items():
        for _ in range(max(rounds, 20)):
            if state.endswith("cold_us"):
                empty(cache)
            begin = time.perf_counter()
            update()
            samples.append(1e6 * (time.perf_counter() - begin))
    del plan.run
    return {state: statistics.median(samples) for state, samples in times.items()}


def around_the_kernel(teacher: nn.Module, student: nn.Module, rounds: int) -> dict[str, float]:
    """What a step and a plan cost on the host, the kernel left out, and the bytes of the table."""
    eman_update_(teacher, student, MOMENTUM)
    (followed, *_) = known._networks[id(teacher), id(student)].plans
    making = []
    for _ in range(min(rounds, 10)):
        begin = time.perf_counter()
        functional._follow([teacher], student, followed.options, [], None)
        making.append(time.perf_counter() - begin)
    host = host_times(lambda: eman_update_(teacher, student, MOMENTUM), followed.plan, rounds, "host")
    tables = [work.table for work in followed.plan.works if work.table is not None]
    return host | {
        "plan_ms": 1e3 * statistics.median(making),
        "table_bytes": sum(table.nbytes for table in tables),
    }


def around_the_kernel_of_teachers(student: nn.Module, rounds: int) -> dict[str, float]:
    """The host's part of EMANTeacher.update, without and with a low-precision copy."""
    times = {}
    for label, cast in (("teacher", None), ("cast", torch.bfloat16)):
        keeper = EMANTeacher(student, MOMENTUM, cast=cast)
        if cast is not None:
            keeper._low_precision()  # as the first forward does
        keeper.update(student)
        times |= host_times(partial(keeper.update, student), plan_for(keeper.module, student), rounds, label)
    return times


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable"))


@torch.no_grad()
def point(
    kind: str, elements: int, tensors: int, device: torch.device, rounds: int, methods: dict[str, Method | str]
) -> list[dict]:
    """One size: `kind` says what grows."""
    threads = torch.get_num_threads()
    needed = 20 * elements  # teacher, student, timm's copy, the gate's, and some room
    size = {"elements": elements, "tensors": tensors}[kind]
    rows = {LIMIT: Row("slices", threads, "float32", LIMIT, elements, 1, kind, size, operations=1, syncs=0)}
    pin_the_heap()
    if needed > free_bytes(device):
        rows[LIMIT].why_not = f"needs {needed / 1e9:.0f} GB of free memory"
        return [*map(asdict, rows.values())]
    torch.manual_seed(0)
    teacher, student = Slices(elements, tensors, device), Slices(elements, tensors, device)
    flat: list[Tensor] = [*teacher.flat, *student.flat]
    rows[LIMIT].gigabytes = 3 * flat[0].nbytes / 1e9
    updates = {LIMIT: lambda: flat[0].lerp_(flat[1], 1.0 - MOMENTUM)}
    mine = next(label for label, method in methods.items() if label.startswith(OURS) and isinstance(method, Method))
    for label in (*COMPARED, mine):
        method = methods[label]
        row = rows[label] = Row("slices", threads, "float32", label, elements, tensors, kind, size)
        try:
            following = method.make(teacher, student, MOMENTUM)
            following.update()
            admit(row, method, following, student)
        except Exception as error:
            row.why_not = said(error)
        if row.why_not is None:
            updates[label] = following.update
    taken = take(rows, updates, device, rounds, f"{tensors:,} tensors, {elements:,} elements")
    vars(rows[mine]).update(around_the_kernel(teacher, student, rounds))
    return [*map(asdict, taken)]


def growth(
    device: torch.device, methods: dict[str, Method | str], most: int, rounds: int
) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """The points of both curves, up to `most` elements: what each is called, and how to measure it."""
    sizes = [("elements", size, TENSORS) for size in MANY_ELEMENTS if size <= most]
    sizes += [("tensors", min(ELEMENTS, most), tensors) for tensors in MANY_TENSORS]
    for kind, elements, tensors in sizes:
        few = rounds if elements <= ELEMENTS else FEW_ROUNDS
        yield (
            f"{tensors:,} tensors, {elements:,} elements",
            partial(point, kind, elements, tensors, device, few, methods),
        )
