"""How a time is taken: a gate on the result first, then calls in turn, each on a cold cache; medians and quartiles.

The methods run A B C, A B C ..., so that a change of the machine's pace meets them all, and a ratio is taken within its
round. On CUDA the time is the device's, by events, and the host's time for the call stands beside it.
"""

import copy
import ctypes
import datetime
import gc
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from checks import faults
from counts import counts, launches
from models import DTYPES, pair, tensors_of
from torch import Tensor, nn
from tqdm import tqdm
from updates import COPY, GRAPH, LIMIT, Following, Method, Update

import eman_kernels

MOMENTUM = 0.999
WARM_UP = 3
CACHE_BYTES = 256 << 20  # more than any cache that is to be cold
QUEUE = 1024  # launches that wait on a CUDA stream; the host then waits as well
CYCLES = 2_000_000  # of a GPU in a millisecond, or somewhat fewer
LONGEST_SLEEP = 50  # ms
PACKAGES = ("torch", "torchvision", "timm", "ema-pytorch", "torch-ema", "diffusers", "lightly", "lightning", "apex")


@dataclass
class Row:
    """One method's figures on one model, or why there are none. Times are milliseconds."""

    model: str
    threads: int
    dtype: str
    method: str
    elements: int
    tensors: int
    kind: str = "update"
    size: int | None = None  # of what grows, where something does
    note: str = ""  # what is to be known of its times
    lacks: str = ""  # what the method leaves undone, or does wrong without having claimed it
    why_not: str | None = None
    gigabytes: float | None = None  # moved by one call
    operations: int | None = None
    syncs: int | None = None
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    x_limit: float | None = None  # of the flat lerp's time in the same round
    x_limit_q1: float | None = None
    x_limit_q3: float | None = None
    host_ms: float | None = None
    # Of ours alone, where growth.py measures it: the host's work without the kernel, and what a plan costs.
    host_warm_us: float | None = None
    host_cold_us: float | None = None
    teacher_warm_us: float | None = None  # the same of EMANTeacher.update
    teacher_cold_us: float | None = None
    cast_warm_us: float | None = None  # and with a low-precision copy
    cast_cold_us: float | None = None
    plan_ms: float | None = None
    table_bytes: int | None = None


def nothing_cached(device: torch.device) -> Tensor:
    """What `empty` writes and reads."""
    return torch.zeros(CACHE_BYTES // 4, device=device)


def empty(cache: Tensor) -> None:
    """Leave none of a method's memory in the caches.

    On a GPU nothing that is still to be written back either: a method would have to evict up to 50 MB of it, which is
    15 % of ResNet-50's time. On CPUs no difference was found, and reading takes longer than most methods.
    """
    cache.add_(1)
    if cache.is_cuda:
        cache.sum()


def time_once(update: Update, device: torch.device, cache: Tensor) -> tuple[float, float]:
    """Milliseconds of the work and of the host, of one call on a cold cache."""
    empty(cache)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    update()
    host = 1e3 * (time.perf_counter() - begin)
    if device.type != "cuda":
        return host, host
    # Once more for the device, behind a sleep in which the launches queue up: no gap of the host's is then counted as
    # the device's time.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    empty(cache)
    torch.cuda._sleep(sleep_cycles(host))
    start.record()
    update()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host


def sleep_cycles(host_ms: float) -> int:
    """Twice what the host needs for its launches, and some more for its noise."""
    return int(CYCLES * min(2 * host_ms + 0.2, LONGEST_SLEEP))


def pin_the_heap() -> None:
    """Hand back what is free now, and let glibc keep what is freed from here on, as a training process's heap does.

    In a process that never held more than this one, glibc hands each temporary of a method back to the system and
    faults it in anew, and the published loop, or diffusers, takes several times as long: that would flatter us.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.malloc_trim(0)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: the most that glibc allows
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def graphed(update: Update) -> Update:
    """The same work as a captured CUDA graph. Raises what the update raises when it is captured."""
    graph, refusal = torch.cuda.CUDAGraph(), None
    # torch's context would leave its own stream as the current one if the capture itself failed.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        try:
            update()
        except Exception as error:
            refusal = error
            torch.cuda._sleep(1)  # an empty graph is warned of
    if refusal is not None:
        raise refusal
    return graph.replay


def clock(device: torch.device) -> float:
    """Milliseconds, when all that was launched is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * time.perf_counter()


def share(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Of pairs (whole step, update in it), in milliseconds: the figures of a row of tables.step_table."""
    figures = {"step_ms": statistics.median(step for step, _ in samples)}
    parts = {"_ms": [update for _, update in samples], "_percent": [100 * update / step for step, update in samples]}
    for name, values in parts.items():
        figures |= zip((f"q1{name}", f"median{name}", f"q3{name}"), quartiles(values), strict=True)
    return figures


def quartiles(samples: list[float]) -> tuple[float, float, float]:
    return tuple(statistics.quantiles(samples, n=4))


def take(rows: dict[str, Row], updates: dict[str, Update], device: torch.device, rounds: int, label: str) -> list[Row]:
    """Time the updates in turn, and write the figures into their rows."""
    # A collection of garbage then looks at what a method makes, and not at all the libraries imported here.
    gc.collect()
    gc.freeze()
    cache = nothing_cached(device)
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
                row.note = f"{row.operations:,} launches, of which {QUEUE:,} queue up: the others at the host's pace"
    return list(rows.values())


def said(error: Exception) -> str:
    """Why there is no figure, in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def admit(row: Row, method: Method | str, following: Following, student: nn.Module) -> None:
    """The gate: count the update and compare its result. A row that then says why_not gets no figure."""
    plan = following.plan()
    if following.dispatched:
        counted = counts(following.update, plan, next(student.parameters()).device)
        row.operations, row.gigabytes, row.syncs = counted.operations, counted.gigabytes, counted.syncs
    found = faults(following, student, MOMENTUM, method.exact)
    row.lacks = ", ".join(found)
    row.why_not = next((found[kind] for kind in method.claims if kind in found), None)
    if row.why_not is None and next(student.parameters()).is_cuda:
        row.operations = launches(following.update) or row.operations  # none are seen without the right to profile


@torch.no_grad()  # as every such update is run
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
            admit(row, method, following, student)
        except Exception as error:  # whatever a library raises, it has no figure, and the table says so
            row.why_not = said(error)
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
        # Of what can be captured: a capture that fails leaves torch's generator unusable. Adapters count in Python.
        for label in [n for n in updates if n.startswith(("eman_kernels", "foreach")) and " in " not in n]:
            replayed = label + GRAPH
            rows[replayed] = replace(rows[label], method=replayed)
            try:
                updates[replayed] = graphed(updates[label])
            except Exception as error:
                rows[replayed].why_not = said(error)
    label = f"{name}, {dtype}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else f"{name}, {dtype}"
    return take(rows, updates, device, rounds, label)


# ---------------------------------------------------------------- what belongs into each row


def machine(device: torch.device) -> dict[str, str | float]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    described: dict[str, str | float] = {"device": "cpu", "cpu": cpu, "python": platform.python_version()}
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
        if hasattr(properties, "memory_clock_rate"):  # kHz and bits, two transfers a clock: the datasheet's product
            described["datasheet GB/s"] = 2 * properties.memory_clock_rate * properties.memory_bus_width / 8 / 1e6
    for key, command in asked.items():
        try:
            answer = subprocess.run(command.split(), capture_output=True, text=True, cwd=Path(__file__).parent)
        except OSError:  # it is not on PATH
            continue
        if answer.returncode == 0 and answer.stdout.strip():
            described[key] = answer.stdout.split()[0]
    return described
