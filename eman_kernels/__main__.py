"""``python -m eman_kernels`` prints what a bug report needs: versions, backends, and a self-check of each backend.

``python -m eman_kernels bench`` measures the update of a network on this machine. Its loops are those of benchmarks/,
which measures more implementations, with cold caches.

``python -m eman_kernels synthesize`` makes averages of any length from a folder of snapshots.
"""

import argparse
import copy
import ctypes
import datetime
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from . import __version__, available_backends, eman_update_, plan_for
from .backends import device_type_of
from .backends.extension import C, missing
from .checkpoints.command import add_synthesize_command


def compare_to_reference(backend: str) -> str | None:
    """Run one update with this backend and with the reference. Returns how the results differ, or None if equal."""
    device = device_type_of(backend)
    networks = []
    for name in (backend, "reference"):
        torch.manual_seed(0)
        teacher, student = (nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300)).to(device) for _ in range(2))
        student(torch.randn(8, 300, device=device))
        with torch.no_grad():
            eman_update_(teacher, student, 0.99, backend=name)
        networks.append(teacher.state_dict())
    different = [name for name, tensor in networks[0].items() if not torch.equal(tensor, networks[1][name])]
    return f"but differs from the reference in {', '.join(different)}" if different else None


def find_hidden() -> Path | None:
    """The folder of another installation of the package, which Python would import if this one were not before it."""
    here, folders = Path(__file__).resolve().parents[1], [Path(entry).resolve() for entry in sys.path]
    others = (folder for folder in folders if folder != here and (folder / "eman_kernels" / "__init__.py").exists())
    return next(others, None)


def main() -> int:
    """Print the report. Returns 1 if an available backend gives other bits than the reference, else 0."""
    if hidden := find_hidden():
        here = Path(__file__).parents[1]
        print(f"The folder {here} hides the package that is installed in {hidden}: start Python in another folder.")
    print(f"eman_kernels {__version__} ({Path(__file__).parent})")
    print(f"python {platform.python_version()}, torch {torch.__version__} (CUDA {torch.version.cuda})")
    print(f"{platform.platform()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    print(f"extension: {missing or f'CPU kernel on, OpenMP {C.openmp_status}; CUDA kernel {C.cuda_status}'}")
    for device in range(torch.cuda.device_count()):
        print(f"cuda:{device}: {torch.cuda.get_device_name(device)}, {torch.cuda.get_device_capability(device)}")
    print("backends:")
    faults = 0
    for name, reason in available_backends().items():
        fault = compare_to_reference(name) if reason is None else None
        faults += fault is not None
        status = f"not available: {reason}" if reason else f"available, {fault}" if fault else "available"
        print(f"  {name:10} {status}")
    print(f"self-check: {'failed' if faults else 'passed'}")
    return min(faults, 1)


# ---------------------------------------------------------------- bench

MOMENTUM = 0.999
WARM_UP = 2  # calls of each update
LEAST_ROUNDS, MOST_ROUNDS = 3, 100
CYCLES = 2_000_000  # upper bound of a GPU's clock cycles per millisecond
LONGEST_SLEEP = 50  # ms
LOOP, FOREACH, OURS = "published loop, per tensor", "torch._foreach, lists kept", "eman_kernels"

Update = Callable[[], object]


def published_loop(teacher: nn.Module, student: nn.Module, momentum: float) -> Update:
    """The loop over tensors of the published EMAN code, and of most training scripts."""

    def update() -> None:
        followed = student.state_dict()
        for name, tensor in teacher.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(tensor * momentum + followed[name] * (1.0 - momentum))
            else:
                tensor.copy_(followed[name])

    return update


def split_tensors(teacher: nn.Module, student: nn.Module) -> tuple[list[Tensor], ...]:
    """Four lists: averaged tensors of the teacher and their students, copied tensors and their sources."""
    mine, theirs = teacher.state_dict(), student.state_dict()
    averaged = [name for name, tensor in mine.items() if tensor.is_floating_point()]
    copied = [name for name, tensor in mine.items() if not tensor.is_floating_point()]
    return tuple([which[name] for name in names] for names in (averaged, copied) for which in (mine, theirs))


def foreach_lerp(teacher: nn.Module, student: nn.Module, momentum: float) -> Update:
    """torch's fastest own way: one call for all tensors, in lists that are made once."""
    averaged, followed, copied, source = split_tensors(teacher, student)

    def update() -> None:
        torch._foreach_lerp_(averaged, followed, 1.0 - momentum)
        if copied:
            torch._foreach_copy_(copied, source)

    return update


def pin_the_heap() -> None:
    """Return free memory to the system now, and make glibc keep memory that is freed later, as in a training process.

    In a small process, glibc returns each temporary of a loop to the system and page-faults again for the next one. The
    published loop would then take several times as long, which would make us look too good.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        libc.malloc_trim(0)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD: glibc's maximum
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def time_call(update: Update, device: torch.device, prepare: Update = lambda: None) -> tuple[float, float]:
    """Milliseconds of device work and of host time for one call. prepare is called before it, not timed."""
    prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    update()
    host = 1e3 * (time.perf_counter() - begin)
    if device.type != "cuda":
        return host, host
    # Call it again to measure the device time, behind a sleep during which the launches queue up: gaps between launches
    # on the host then do not count as device time.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    prepare()
    torch.cuda._sleep(sleep_cycles(host))
    start.record()
    update()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host


def sleep_cycles(host_ms: float) -> int:
    """Twice the host's time for the launches, plus a margin for noise."""
    return int(CYCLES * min(2 * host_ms + 0.2, LONGEST_SLEEP))


def name_processor() -> str:
    """The CPU's model name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return next(iter(names), platform.processor() or platform.machine())


def make_network(name: str) -> nn.Module:
    """The network of ``--model``. Raises ValueError if there is none of this name."""
    module, colon, function = name.partition(":")
    if colon:
        try:
            make = getattr(import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"cannot import {name}: {error}") from None
    else:
        remedy = "--model module:function measures what a function of yours returns"
        try:
            from torchvision import models
        except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
            raise ValueError(
                f"{name} is a network of torchvision ({error}): pip install torchvision, or {remedy}"
            ) from None
        known = models.list_models(module=models)
        if name not in known:
            similar = ", ".join(get_close_matches(name, known)) or ", ".join(known[:3]) + ", ..."
            raise ValueError(f"torchvision.models has no {name}, but {similar}; {remedy}")
        make = getattr(models, name)
    network = make()
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name}() returned a {type(network).__name__}, not a torch.nn.Module")
    return network


@torch.no_grad()
def bench(name: str, student: nn.Module, device: torch.device, seconds: float = 8.0) -> str:
    """Measure the updates of this network in turn for so many seconds. Returns the report.

    The network is copied three times, one teacher for each update. An update that raises an error is reported with it.
    """
    student.to(device)
    makers = {LOOP: published_loop, FOREACH: foreach_lerp, OURS: make_own_update}
    teachers = {method: copy.deepcopy(student).requires_grad_(False) for method in makers}
    for tensor in student.state_dict().values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            tensor += 0.01
    pin_the_heap()
    updates: dict[str, Update] = {}
    failed = []
    for method, make in makers.items():
        try:
            update = make(teachers[method], student, MOMENTUM)
            for _ in range(WARM_UP):
                update()
            updates[method] = update
        except Exception as error:  # not every update supports every network
            failed.append(f"{method}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    print(f"measuring on {device}, for about {seconds:.0f} s ...", file=sys.stderr, flush=True)
    rounds: list[dict[str, tuple[float, float]]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < LEAST_ROUNDS or (time.perf_counter() < end and len(rounds) < MOST_ROUNDS):
        rounds.append({method: time_call(update, device) for method, update in updates.items()})
    threads = f"{torch.get_num_threads()} threads, {name_processor()}"
    plan = plan_for(teachers[OURS], student)
    lines = [
        f"eman_kernels {__version__}, torch {torch.__version__}, python {platform.python_version()}, "
        f"{datetime.date.today().isoformat()}",
        f"{torch.cuda.get_device_name(device)}; {threads}" if device.type == "cuda" else threads,
        f"{name}, momentum {MOMENTUM}" + (f"; {plan.describe()}" if plan is not None else ""),
        "",
        *tabulate_rounds(rounds, on_device=device.type == "cuda"),
        *failed,
        "",
        f"{len(rounds)} rounds in one process, each update once per round; medians, with quartiles in brackets.",
    ]
    if LOOP in updates:
        differences = {m: largest_difference(teachers[m], teachers[LOOP]) for m in updates if m != LOOP}
        named = ", ".join(f"{method} {difference:.1e}" for method, difference in differences.items())
        lines.append(f"Largest difference from the published loop's average: {named}.")
    return "\n".join(lines)


def make_own_update(teacher: nn.Module, student: nn.Module, momentum: float) -> Update:
    """``eman_update_`` of these networks."""
    return lambda: eman_update_(teacher, student, momentum)


def largest_difference(teacher: nn.Module, other: nn.Module) -> float:
    """The largest absolute difference between tensors of two equal networks."""
    pairs = zip(teacher.state_dict().values(), other.state_dict().values(), strict=True)
    return max(
        (float((mine.double() - theirs.double()).abs().max()) for mine, theirs in pairs if mine.numel()), default=0.0
    )


def tabulate_rounds(rounds: list[dict[str, tuple[float, float]]], on_device: bool) -> list[str]:
    """The table: milliseconds of each update, and how many times as fast as the loop it was in the same round."""
    kinds = ("GPU time", "host time") if on_device else ("time",)
    head = [column for kind in kinds for column in (f"{kind} in ms", "speed-up over the loop")]
    rows = [["update", *head]]
    for method in rounds[0]:
        row = [method]
        for which in range(len(kinds)):
            row.append(summarize_samples([times[method][which] for times in rounds], ".3f"))
            ratios = [times[LOOP][which] / times[method][which] for times in rounds if LOOP in times]
            row.append(summarize_samples(ratios, ".1f") if ratios else "")
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def summarize_samples(samples: list[float], form: str) -> str:
    """The median, with the quartiles in brackets."""
    low, median, high = statistics.quantiles(samples, n=4)
    return f"{median:{form}} ({low:{form}} ... {high:{form}})"


def add_bench_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand; ``run_bench`` is what it runs."""
    parser = commands.add_parser(
        "bench",
        help="measure the update of a network on this machine",
        description="Measure one update by the published loop, by torch's foreach and by eman_kernels, within 20 "
        "seconds.",
    )
    parser.add_argument(
        "--model", default="resnet50", help="a network of torchvision.models, or module:function (default: %(default)s)"
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=default, help="default: %(default)s")
    parser.set_defaults(run=partial(run_bench, parser))


def run_bench(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    """Print what was measured. Returns the exit status; wrong arguments end the process."""
    if given.device.type not in ("cpu", "cuda"):
        parser.error(f"--device {given.device}: only cpu and cuda are measured")
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {given.device}: torch sees no CUDA GPU")
    warnings.filterwarnings("ignore", message=".*does not move")  # a half-precision network is measured as well
    try:
        network = make_network(given.model)
    except ValueError as error:
        parser.error(str(error))
    print(bench(given.model, network, given.device))
    return 0


def run(arguments: Sequence[str]) -> int:
    """The command line. Without arguments, it is the report of ``main``."""
    parser = argparse.ArgumentParser(
        prog="python -m eman_kernels", description="Without a command: versions, backends and a self-check."
    )
    commands = parser.add_subparsers(dest="command")
    add_bench_command(commands)
    add_synthesize_command(commands)
    given = parser.parse_args(arguments)
    return main() if given.command is None else given.run(given)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
