"""How the cost grows with the number of elements (fixed number of tensors) and of tensors (fixed number of elements).

All methods update the same teacher in turn (timm makes its own copy); the limit treats its memory as one flat vector.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from checks import describe_error
from models import Slices
from timing import (
    MOMENTUM,
    Row,
    apply_gate,
    evict_caches,
    make_eviction_buffer,
    pin_the_heap,
    time_in_turn,
)
from torch import Tensor, nn
from updates import LIMIT, LOOP, OURS, Method, Update

from eman_kernels import EMANTeacher, eman_update_, plan_for
from eman_kernels.plan.cache import cache_of_networks
from eman_kernels.plan.plan import Plan
from eman_kernels.update.eager import _plan_networks

TENSORS, ELEMENTS = 100, 10_000_000  # the fixed one while the other grows
MANY_ELEMENTS = (100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000, 300_000_000, 10**9)
MANY_TENSORS = (10, 30, 100, 300, 1000, 3000, 10_000)
FEW_ROUNDS = 8  # above ELEMENTS, where a call takes long
COMPARED = (LOOP, "foreach, lists kept", "timm ModelEmaV3")


def time_host(update: Update, plan: Plan, rounds: int, label: str) -> dict[str, float]:
    """Microseconds of an update with this plan but without the kernel, with a warm and with a cold cache."""
    plan.run = lambda arguments, tensors: None
    cache = make_eviction_buffer(torch.device("cpu"))
    times: dict[str, list[float]] = {f"{label}_warm_us": [], f"{label}_cold_us": []}
    for state, samples in times.items():
        for _ in range(max(rounds, 20)):
            if state.endswith("cold_us"):
                evict_caches(cache)
            begin = time.perf_counter()
            update()
            samples.append(1e6 * (time.perf_counter() - begin))
    del plan.run
    return {state: statistics.median(samples) for state, samples in times.items()}


def measure_host_overhead(teacher: nn.Module, student: nn.Module, rounds: int) -> dict[str, float]:
    """Host overhead of a step (without the kernel), time to build the plan, and size of the chunk table."""
    eman_update_(teacher, student, MOMENTUM)
    (cached, *_) = cache_of_networks(teacher, student).plans
    _, options = cached.key
    making = []
    for _ in range(min(rounds, 10)):
        begin = time.perf_counter()
        _plan_networks([teacher], student, options, [], None)
        making.append(time.perf_counter() - begin)
    host = time_host(lambda: eman_update_(teacher, student, MOMENTUM), cached.plan, rounds, "host")
    tables = [work.table for _, work in cached.plan.works if work.table is not None]
    return host | {
        "plan_ms": 1e3 * statistics.median(making),
        "table_bytes": sum(table.nbytes for table in tables),
    }


def measure_teacher_overhead(student: nn.Module, rounds: int) -> dict[str, float]:
    """Host overhead of EMANTeacher.update, without and with a low-precision copy."""
    times = {}
    for label, cast in (("teacher", None), ("cast", torch.bfloat16)):
        teacher = EMANTeacher(student, MOMENTUM, cast=cast)
        if cast is not None:
            teacher.state.refresh_low_precision(teacher.module)  # as the first forward does
        teacher.update(student)
        times |= time_host(partial(teacher.update, student), plan_for(teacher.module, student), rounds, label)
    return times


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in info if line.startswith("MemAvailable"))


@torch.no_grad()
def measure_point(
    kind: str, elements: int, tensors: int, device: torch.device, rounds: int, methods: dict[str, Method | str]
) -> list[dict]:
    """Measure one size; `kind` ("elements" or "tensors") is what grows."""
    threads = torch.get_num_threads()
    needed = 20 * elements  # teacher, student, timm's copy, the gate's copy, and some slack
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
            apply_gate(row, method, following, student)
        except Exception as error:
            row.why_not = describe_error(error)
        if row.why_not is None:
            updates[label] = following.update
    taken = time_in_turn(rows, updates, device, rounds, f"{tensors:,} tensors, {elements:,} elements")
    vars(rows[mine]).update(measure_host_overhead(teacher, student, rounds))
    return [*map(asdict, taken)]


def growth(
    device: torch.device, methods: dict[str, Method | str], most: int, rounds: int
) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """The points of both curves, up to `most` elements, as (name, function that measures it)."""
    sizes = [("elements", size, TENSORS) for size in MANY_ELEMENTS if size <= most]
    sizes += [("tensors", min(ELEMENTS, most), tensors) for tensors in MANY_TENSORS]
    for kind, elements, tensors in sizes:
        few = rounds if elements <= ELEMENTS else FEW_ROUNDS
        yield (
            f"{tensors:,} tensors, {elements:,} elements",
            partial(measure_point, kind, elements, tensors, device, few, methods),
        )
