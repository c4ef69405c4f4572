"""The teacher update: the published EMAN loop, torch's own means, ours, and the limit, side by side.

Each method has a teacher of its own and follows the same student. A method whose result is wrong gets no figure. The
methods run in turn (A B C, A B C ...), each call on a cold cache; medians and quartiles over the rounds. On CUDA the
time is the device's, by events, and the host's time for the call stands beside it.
"""

import argparse
import copy
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import eman_kernels
from eman_kernels import EMANTeacher, eman_update_, functional

MODELS = ("resnet50", "resnet18", "mobilenet_v2")
DTYPES = {  # teacher, student
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.float32, torch.bfloat16),
}
MOMENTUM = 0.999
LOOP, LIMIT = "published EMAN loop", "limit: one flat lerp"
CACHE_BYTES = 256 << 20  # more than any cache that is to be cold

Update = Callable[[], None]


# ---------------------------------------------------------------- the methods


def published_loop(teacher: nn.Module, student: nn.Module) -> Update:
    def update() -> None:
        followed = student.state_dict()
        for name, tensor in teacher.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(tensor * MOMENTUM + followed[name] * (1.0 - MOMENTUM))
            else:
                tensor.copy_(followed[name])

    return update


def split(teacher: dict[str, Tensor], student: dict[str, Tensor]) -> tuple[list[Tensor], ...]:
    averaged = [name for name, tensor in teacher.items() if tensor.is_floating_point()]
    copied = [name for name, tensor in teacher.items() if not tensor.is_floating_point()]
    return tuple([which[name] for name in names] for names in (averaged, copied) for which in (teacher, student))


def lerp_loop(teacher: nn.Module, student: nn.Module) -> Update:
    averaged, followed, copied, source = split(teacher.state_dict(), student.state_dict())

    def update() -> None:
        for t, s in zip(averaged, followed, strict=True):
            t.lerp_(s.to(t.dtype), 1.0 - MOMENTUM)
        for t, s in zip(copied, source, strict=True):
            t.copy_(s)

    return update


def foreach(teacher: nn.Module, student: nn.Module) -> Update:
    averaged, followed, copied, source = split(teacher.state_dict(), student.state_dict())

    def update() -> None:
        torch._foreach_lerp_(averaged, followed, 1.0 - MOMENTUM)
        torch._foreach_copy_(copied, source)

    return update


def foreach_with_walks(teacher: nn.Module, student: nn.Module) -> Update:
    """As timm's ModelEmaV3 does it: the lists are made of both state dicts in every step."""
    return lambda: foreach(teacher, student)()


def ours(backend: str) -> Callable[[nn.Module, nn.Module], Update]:
    return lambda teacher, student: lambda: eman_update_(teacher, student, MOMENTUM, backend=backend)


def methods(device: torch.device) -> dict[str, Callable[[nn.Module, nn.Module], Update] | str]:
    """Name -> how to make the update, or why this machine has none."""
    found: dict[str, Callable[[nn.Module, nn.Module], Update] | str] = {
        LOOP: published_loop,
        "lerp loop": lerp_loop,
        "foreach, state_dict walks": foreach_with_walks,
        "foreach, lists kept": foreach,
    }
    for name, reason in eman_kernels.available_backends().items():
        if name != "reference" and not (name in ("cpu", "cuda") and name != device.type):
            found[f"eman_kernels {name}"] = f"not available: {reason}" if reason else ours(name)
    return found


# ---------------------------------------------------------------- are they right?


def fault(update: Update, teacher: nn.Module, student: nn.Module, exact: bool) -> str | None:
    """What is wrong after one update, against torch.lerp in float32; None if nothing is."""
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    update()
    followed = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        if not tensor.is_floating_point():
            if not torch.equal(tensor, followed[name]):
                return f"{name} is not the student's"
            continue
        want = torch.lerp(before[name].float(), followed[name].float(), 1.0 - MOMENTUM)
        # The published formula rounds its products as well, each in the dtype of its tensor.
        rounding = torch.finfo(tensor.dtype).eps + (1.0 - MOMENTUM) * torch.finfo(followed[name].dtype).eps
        slack = 0 if exact else 2 * rounding * max(before[name].abs().max(), followed[name].abs().max())
        if ((tensor.float() - want.to(tensor.dtype).float()).abs() > slack).any():
            return f"{name} is not what torch.lerp gives"
    return None


# ---------------------------------------------------------------- timing


@dataclass
class Row:
    """One method's figures: milliseconds (median, quartiles), host milliseconds on CUDA, or why there are none."""

    model: str
    device: str
    threads: int
    dtype: str
    method: str
    elements: int
    gigabytes: float = 0.0
    median_ms: float | None = None
    q1_ms: float | None = None
    q3_ms: float | None = None
    host_ms: float | None = None
    why_not: str | None = None


def time_once(update: Update, device: torch.device, cache: Tensor) -> tuple[float, float]:
    """Milliseconds of the work and of the host, of one call on a cold cache."""
    cache.add_(1)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    update()
    host = 1e3 * (time.perf_counter() - begin)
    if device.type != "cuda":
        return host, host
    # Once more for the device, behind a sleep (of some 50 ms) in which the launches queue up: no gap of the host's is
    # then counted as the device's time.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cache.add_(1)
    torch.cuda._sleep(100_000_000)
    start.record()
    update()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host


def models_of(name: str, dtype: str, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """A teacher and a student that differ by some training's worth, counters included."""
    torch.manual_seed(0)
    teacher_dtype, student_dtype = DTYPES[dtype]
    teacher = getattr(torchvision.models, name)().requires_grad_(False)
    student = copy.deepcopy(teacher)
    for tensor in student.state_dict().values():
        tensor.add_(torch.randn_like(tensor) * 0.05 if tensor.is_floating_point() else 900)
    return teacher.to(device, teacher_dtype), student.to(device, student_dtype)


@torch.no_grad()  # as every such loop is run
def measure(name: str, dtype: str, device: torch.device, threads: int, rounds: int) -> list[Row]:
    torch.set_num_threads(threads)
    teacher, student = models_of(name, dtype, device)
    followed = list(student.state_dict().values())
    elements = sum(tensor.numel() for tensor in followed if tensor.is_floating_point())
    per_element = 2 * DTYPES[dtype][0].itemsize + DTYPES[dtype][1].itemsize
    gigabytes = (elements * per_element + sum(3 * t.nbytes for t in followed if not t.is_floating_point())) / 1e9

    rows, updates = {}, {}
    for method, make in methods(device).items():
        rows[method] = Row(name, str(device), threads, dtype, method, elements, gigabytes)
        mine = copy.deepcopy(teacher)
        if isinstance(make, str):
            rows[method].why_not = make
            continue
        update = make(mine, student)
        try:
            rows[method].why_not = fault(update, mine, student, exact=method != LOOP)
        except RuntimeError as error:
            rows[method].why_not = str(error).splitlines()[0]
        if rows[method].why_not is None:
            updates[method] = update
    flat = [torch.randn(elements, device=device, dtype=DTYPES[dtype][i]) for i in (0, 0 if dtype == "mixed" else 1)]
    rows[LIMIT] = Row(name, str(device), threads, dtype, LIMIT, elements, 3 * flat[0].nbytes / 1e9)
    updates[LIMIT] = lambda: flat[0].lerp_(flat[1], 1.0 - MOMENTUM)

    cache = torch.zeros(CACHE_BYTES, dtype=torch.uint8, device=device)
    times: dict[str, list[tuple[float, float]]] = {method: [] for method in updates}
    label = f"{name}, {dtype}, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else f"{name}, {dtype}"
    for k in tqdm(range(rounds + 3), desc=f"{label:30}", leave=False):
        for method, update in updates.items():
            sample = time_once(update, device, cache)
            if k >= 3:
                times[method].append(sample)
    for method, samples in times.items():
        row = rows[method]
        row.q1_ms, row.median_ms, row.q3_ms = statistics.quantiles([work for work, _ in samples], n=4)
        row.host_ms = statistics.median(host for _, host in samples) if device.type == "cuda" else None
    return list(rows.values())


def around_the_kernel(name: str, device: torch.device, rounds: int) -> str:
    """What a step and a plan cost on the host, the kernel left out."""
    torch.set_num_threads(1)
    _, student = models_of(name, "float32", device)
    keeper = EMANTeacher(student)
    keeper.update(student)
    followed = functional._followed[keeper.module][student]
    tables = sum(work.table.nbytes for work in followed.plan.works if work.backend.TAKES_TABLE)
    making = []
    for _ in range(min(rounds, 20)):
        begin = time.perf_counter()
        functional._follow([keeper.module], student, followed.options, [])
        making.append(time.perf_counter() - begin)
    followed.plan.run = lambda call: None
    cache = torch.zeros(CACHE_BYTES, dtype=torch.uint8)
    host: dict[str, list[float]] = {"warm": [], "cold": []}
    for state, samples in host.items():
        for _ in range(max(rounds, 20)):
            if state == "cold":
                cache.add_(1)
            begin = time.perf_counter()
            keeper.update(student)
            samples.append(time.perf_counter() - begin)
    warm, cold = (1e6 * statistics.median(samples) for samples in host.values())
    return (
        f"{name}: update() apart from the kernel {warm:.0f} us in a warm cache, {cold:.0f} us in a cold one; "
        f"making the plan {1e3 * statistics.median(making):.1f} ms; its table {tables:,} bytes"
    )


# ---------------------------------------------------------------- the report


def machine(device: torch.device) -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    described = {
        "cpu": cpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "eman_kernels": eman_kernels.__version__,
        "date": datetime.date.today().isoformat(),
    }
    asked = {"commit": "git describe --always --dirty"}
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        asked["driver"] = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
    for key, command in asked.items():
        answer = subprocess.run(command.split(), capture_output=True, text=True, cwd=Path(__file__).parent)
        if answer.returncode == 0:
            described[key] = answer.stdout.split()[0]
    return described


def table(rows: list[Row]) -> str:
    by_method = {row.method: row for row in rows}
    loop, limit = by_method[LOOP].median_ms, by_method[LIMIT].median_ms
    lines, missing = [], []
    for row in rows:
        if row.median_ms is None:
            lines.append([row.method, "none"])
            missing.append(f"\n- {row.method}: {row.why_not}")
            continue
        lines.append(
            [
                row.method,
                f"{row.median_ms:.3f}",
                f"{row.q1_ms:.3f} ... {row.q3_ms:.3f}",
                f"{1e3 * row.gigabytes / row.median_ms:.1f}",
                f"{row.median_ms / limit:.2f}",
                f"{loop / row.median_ms:.1f}" if loop else "",
                *([f"{row.host_ms:.3f}"] if row.host_ms is not None else []),
            ]
        )
    headers = ["method", "ms", "quartiles", "GB/s", "x limit", "faster than the loop"]
    if by_method[LIMIT].host_ms is not None:
        headers.append("host ms")
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True) + "\n" + "".join(missing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=MODELS, help="torchvision models (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", nargs="+", type=int, help="CPU threads (default: 1, then all)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"],
                        help="mixed: a float32 teacher of a bfloat16 student (default: float32)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=50, help="calls of each method (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row with the machine it is from")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA GPU here")
    # A training step frees blocks larger than any tensor of a teacher, and glibc keeps its heap from then on. In a
    # process that never did, it hands every temporary of the published loop back to the system and faults it in anew,
    # and the loop takes several times as long: that would flatter us.
    torch.empty(30_000_000, dtype=torch.uint8)
    all_threads = torch.get_num_threads()
    threads = arguments.threads or (sorted({1, all_threads}) if device.type == "cpu" else [all_threads])

    described = machine(device)
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    if device.type == "cpu":
        print("GPU: not measured here (--device cuda, where torch sees one)")
    rows = []
    for model in arguments.model:
        for dtype in arguments.dtype:
            for count in threads:
                measured = measure(model, dtype, device, count, arguments.rounds)
                rows += measured
                on = f"{count} thread{'s' * (count > 1)}" if device.type == "cpu" else described["gpu"]
                print(f"\n### {model}, {dtype}, {measured[0].elements:,} elements, {on}\n\n{table(measured)}")
        print(f"\n{around_the_kernel(model, device, arguments.rounds)}")
    if arguments.json:
        arguments.json.write_text(json.dumps([described | asdict(row) for row in rows], indent=1) + "\n")
        print(f"\nwritten: {arguments.json}")


if __name__ == "__main__":
    main()
