"""Timing: check the result first, then time the methods in turn, each call with a cold cache; medians and quartiles.

The methods run A B C, A B C, ..., so changes of the machine's speed affect all of them, and ratios are taken within a
round. On CUDA the time is device time, measured with events; the host's time for the call is recorded as well.
"""

import copy
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from checks import describe_error, find_faults
from counts import count_launches, count_work
from models import DTYPES, pair, tensors_of
from torch import Tensor, nn
from tqdm import tqdm
from updates import COPY, GRAPH, LIMIT, Following, Method, Update

import eman_kernels
from eman_kernels.__main__ import name_processor, pin_the_heap, time_call

MOMENTUM = 0.999
WARM_UP = 3
CACHE_BYTES = 256 << 20  # larger than any cache that must be cold
QUEUE = 1024  # launches that a CUDA stream can queue before the host blocks
PACKAGES = ("torch", "torchvision", "timm", "ema-pytorch", "torch-ema", "diffusers", "lightly", "lightning", "apex")


@dataclass
class Row:
    """Results of one method on one model, or the reason why there are none. Times are in milliseconds."""

    model: str
    threads: int
    dtype: str
    method: str
    elements: int
    tensors: int
    kind: str = "update"
    size: int | None = None  # in growth curves: the number that grows
    note: str = ""  # remark on the times
    lacks: str = ""  # what the method does not do, or does wrong without claiming it
    why_not: str | None = None
    gigabytes: float | None = None  # moved by one call
    operations: int | None = None
    syncs: int | None = None
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    x_limit: float | None = None  # multiple of the flat lerp's time in the same round
    x_limit_q1: float | None = None
    x_limit_q3: float | None = None
    host_ms: float | None = None
    # eman_kernels only, measured by growth.py: host overhead without the kernel, and the cost of a plan.
    host_warm_us: float | None = None
    host_cold_us: float | None = None
    teacher_warm_us: float | None = None  # the same for EMANTeacher.update
    teacher_cold_us: float | None = None
    cast_warm_us: float | None = None  # the same with a low-precision copy
    cast_cold_us: float | None = None
    plan_ms: float | None = None
    table_bytes: int | None = None


def make_eviction_buffer(device: torch.device) -> Tensor:
    """The buffer for `evict_caches`."""
    return torch.zeros(CACHE_BYTES // 4, device=device)


def evict_caches(cache: Tensor) -> None:
    """Evict all memory of the methods from the caches.

    On a GPU the buffer is also read, so that no dirty lines remain: otherwise a method would have to write back up to
    50 MB of them, which is 15 % of ResNet-50's time. On CPUs this made no difference, and reading is slow.
    """
    cache.add_(1)
    if cache.is_cuda:
        cache.sum()


def time_once(update: Update, device: torch.device, cache: Tensor) -> tuple[float, float]:
    """Milliseconds of device work and of host time for one call with a cold cache."""
    return time_call(update, device, partial(evict_caches, cache))


def capture_graph(update: Update) -> Update:
    """Capture the update in a CUDA graph and return its replay. Raises what the update raises during capture."""
    graph, refusal = torch.cuda.CUDAGraph(), None
    # If the capture fails, torch.cuda.graph leaves its own stream as the current one; the outer context restores it.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        try:
            update()
        except Exception as error:
            refusal = error
            torch.cuda._sleep(1)  # torch warns about an empty graph
    if refusal is not None:
        raise refusal
    return graph.replay


def synchronized_ms(device: torch.device) -> float:
    """Current time in milliseconds, after waiting for all launched work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def summarize_shares(samples: list[tuple[float, float]]) -> dict[str, float]:
    """From pairs (step, update within it) in milliseconds, compute the figures of a row of tables.step_table."""
    figures = {"step_ms": statistics.median(step for step, _ in samples)}
    parts = {"_ms": [update for _, update in samples], "_percent": [100 * update / step for step, update in samples]}
    for name, values in parts.items():
        figures |= zip((f"q1{name}", f"median{name}", f"q3{name}"), quartiles(values), strict=True)
    return figures


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(samples, n=4, method="inclusive"))


def time_in_turn(
    rows: dict[str, Row], updates: dict[str, Update], device: torch.device, rounds: int, label: str
) -> list[Row]:
    """Time the updates in turn, and write the results to their rows."""
    # Garbage collections then only scan objects that the methods create, not all imported libraries.
    gc.collect()
    gc.freeze()
    cache = make_eviction_buffer(device)
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in updates}
    for k in tqdm(range(rounds + WARM_UP), desc=f"{label:34}", leave=False, disable=None):
        for method, update in updates.items():
            sample = time_once(update, device, cache)
            if k >= WARM_UP:
                times[method].append(sample)
    gc.unfreeze()
    for method, samples in times.items():
        row = rows[method]
        row.q1_ms, row.median_ms, row.q3_ms = quartiles([work for work, _ in samples])
        shares = [work / limit for (work, _), (limit, _) in zip(samples, times[LIMIT], strict=True)]
        row.x_limit_q1, row.x_limit, row.x_limit_q3 = quartiles(shares)
        if device.type == "cuda":
            row.host_ms = statistics.median(host for _, host in samples)
            if (row.operations or 0) > QUEUE and GRAPH not in method:
                row.note = (
                    f"{row.operations:,} launches, of which {QUEUE:,} are queued; the host's speed limits the others"
                )
    return list(rows.values())


def apply_gate(row: Row, method: Method | str, following: Following, student: nn.Module) -> None:
    """Count the update's work and check its result. If it is wrong, why_not is set, and the method is not timed."""
    plan = following.plan()
    if following.dispatched:
        counted = count_work(following.update, plan, next(student.parameters()).device)
        row.operations, row.gigabytes, row.syncs = counted.operations, counted.gigabytes, counted.syncs
    found = find_faults(following, student, MOMENTUM, method.exact)
    row.lacks = ", ".join(found)
    row.why_not = next((found[kind] for kind in method.claims if kind in found), None)
    if row.why_not is None and next(student.parameters()).is_cuda:
        # Without permission to profile, the profiler sees no launches.
        row.operations = count_launches(following.update) or row.operations


@torch.no_grad()  # as in training
def measure(
    name: str, dtype: str, device: torch.device, threads: int, rounds: int, methods: dict[str, Method | str]
) -> list[Row]:
    torch.set_num_threads(threads)
    pin_the_heap()
    teacher, student = pair(name, dtype, device)
    followed = tensors_of(student)
    elements = sum(tensor.numel() for tensor in followed.values() if tensor.is_floating_point())
    rows, updates = {}, {}
    for label, method in methods.items():
        row = rows[label] = Row(name, threads, dtype, label, elements, len(followed))
        if isinstance(method, str):
            row.why_not = method
            continue
        try:
            following = method.make(copy.deepcopy(teacher), student, MOMENTUM)
            following.update()
            apply_gate(row, method, following, student)
        except Exception as error:  # any error of a library goes to the table
            row.why_not = describe_error(error)
        if row.why_not is None:
            updates[label] = following.update
    kinds = (0, 0) if dtype == "mixed" else (0, 1)
    flat = [torch.randn(elements, device=device, dtype=DTYPES[dtype][i]) for i in kinds]
    updates[LIMIT] = lambda: flat[0].lerp_(flat[1], 1.0 - MOMENTUM)
    updates[COPY] = lambda: flat[0].copy_(flat[1])
    for label, times_read in ((LIMIT, 3), (COPY, 2)):
        rows[label] = Row(name, threads, dtype, label, elements, 1)
        rows[label].operations, rows[label].syncs = 1, 0
        rows[label].gigabytes = times_read * flat[0].nbytes / 1e9
    if device.type == "cuda":
        # Only methods that can be captured, because a failed capture leaves torch's generator unusable. Adapters count
        # steps in Python.
        for label in [n for n in updates if n.startswith(("eman_kernels", "foreach")) and " in " not in n]:
            replayed = label + GRAPH
            rows[replayed] = replace(rows[label], method=replayed)
            try:
                updates[replayed] = capture_graph(updates[label])
            except Exception as error:
                rows[replayed].why_not = describe_error(error)
    label = f"{name}, {dtype}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else f"{name}, {dtype}"
    return time_in_turn(rows, updates, device, rounds, label)


# ---------------------------------------------------------------- the machine


def write_rows(file: Path, rows: list[dict]) -> None:
    """At once: a process that is stopped meanwhile leaves the old file."""
    new = file.with_suffix(".new")
    new.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    os.replace(new, file)


def machine(device: torch.device) -> dict[str, str | float]:
    described: dict[str, str | float] = {"device": "cpu", "cpu": name_processor(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            described[package] = version(package)
        except PackageNotFoundError:
            continue
    described |= {"torch": torch.__version__, "eman_kernels": eman_kernels.__version__}
    described["date"] = datetime.date.today().isoformat()
    asked = {"commit": "git describe --always --dirty"}
    if device.type == "cuda":
        described["device"] = torch.cuda.get_device_name(device)
        asked["driver"] = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
        properties = torch.cuda.get_device_properties(device)
        if hasattr(properties, "memory_clock_rate"):  # kHz and bits, two transfers per clock
            described["datasheet GB/s"] = 2 * properties.memory_clock_rate * properties.memory_bus_width / 8 / 1e6
    for key, command in asked.items():
        try:
            answer = subprocess.run(command.split(), capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:  # not on PATH
            continue
        if answer.returncode == 0 and answer.stdout.strip():
            described[key] = answer.stdout.split()[0]
    return described
