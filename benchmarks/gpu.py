"""`make gpu`: everything that needs a GPU, in 800 seconds, using the current Python and downloading nothing.

The stages run in this order, what is unknown first: kernels (tests of the general kernels and of graphs), modes, step,
host, figures, growth, profile (Nsight Compute), cpu-teacher, tests (all others); and on request memcheck and variants
(kernels built with other parameters). Every command has its own time limit and log; a stopped command keeps its output.

Results are on disk after each command. Another call with the same kernels on the same GPU continues with what is
missing or has failed. Other kernels, or another GPU, get a folder of their own.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
HERE = Path(__file__).parent
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active",
}
PROFILED = """
import sys, torch
sys.path.insert(0, "benchmarks")
from general import backends_for, cases_of
device = torch.device(sys.argv[1])
with torch.no_grad():
    for name, case in cases_of(sys.argv[2], device, ("stochastic", "cast")):
        for label, backend in backends_for(device).items():
            work = case.work(backend)
            print(name, label, flush=True)
            for _ in range(3):
                case.run(backend, work)
"""
# What torch sees, and why the cuda backend is not available.
PROBE = """
import json, torch
found = {"device": None, "architecture": "9.0"}
if torch.cuda.is_available():
    found["device"] = torch.cuda.get_device_name()
    found["architecture"] = "{}.{}".format(*torch.cuda.get_device_capability())
print(json.dumps(found))
"""
CHECK = "from eman_kernels import available_backends; print(available_backends()['cuda'] or 'available')"
BUILD_SECONDS = 120
ON_REQUEST = ("memcheck", "variants")
SUMMARY_LINES = 60


class Command(NamedTuple):
    name: str
    run: list[str]
    seconds: int  # time limit
    rehearsal: list[str] | None = None  # the part of it that runs without a GPU
    needs: str | None = None  # a program that must be on PATH


def stages(python: str, out: Path) -> dict[str, list[Command]]:
    """All stages in their order. Without those ON_REQUEST and with the build, their limits add up to 800 s."""

    def tests(name: str, seconds: int, *arguments: str) -> Command:
        command = [python, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *arguments]
        return Command(name, command, seconds, [*command, "--collect-only"])

    def part(name: str, seconds: int) -> Command:
        command = [python, "benchmarks/parts.py", name, "--json", str(out / f"{name}.json")]
        return Command(name, command, seconds, [*command, "--rehearse"])

    backends, graphs = "tests/backends/test_", "graph or capture"
    check = [python, "-m", "eman_kernels"]
    profiled = [python, "-c", PROFILED]
    ncu = ["ncu", "--kernel-name", "regex:eman_update", "--clock-control", "none", "--csv"]
    ncu += ["--metrics", ",".join(METRICS)]
    memcheck = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    variants = [python, "benchmarks/variants.py"]
    return {
        "kernels": [
            tests("general", 60, f"{backends}general.py"),
            tests("graphs", 25, f"{backends}cuda.py", "-k", graphs),
        ],
        "modes": [part("modes", 40)],
        "step": [part("step-wide-resnet", 70), part("step-resnet50", 120)],
        "host": [part("host", 30)],
        "figures": [part("figures", 90)],
        "growth": [part("growth", 70)],
        "profile": [
            Command("ncu", [*ncu, *profiled, "cuda", "resnet50"], 50, [*profiled, "cpu", "wide_resnet28_2"], "ncu")
        ],
        "cpu-teacher": [part("cpu-teacher", 25)],
        "tests": [
            tests("cuda", 25, f"{backends}cuda.py", "-k", f"not ({graphs})"),
            tests("backends", 25, f"{backends}backends.py"),
            tests("nonfinite", 25, f"{backends}nonfinite.py"),
            tests("others", 25, f"{backends}rounding.py", "tests/plan", "tests/update/test_distributed.py"),
        ],
        "memcheck": [Command("memcheck", [*memcheck, *check], 180, check, "compute-sanitizer")],
        "variants": [
            Command("variants", [*variants, "--json", str(out / "variants.json")], 300, [*variants, "--rehearse"])
        ],
    }


def run(command: list[str], log: Path, seconds: float | None, environment: dict[str, str]) -> str:
    """Run the command with its output in the log, and return how it ended. Without `seconds` there is no time limit."""
    begin = time.monotonic()
    with log.open("w") as stream:
        try:
            child = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        except OSError as error:
            return f"not started: {error}"
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            # On SIGINT pytest reports the failures so far. Signal the whole group: compilers, for one, must stop too.
            for how in (signal.SIGINT, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(child.pid, how)
                    child.wait(15)
            return f"stopped after {seconds:.0f} s"
    took = f"{time.monotonic() - begin:.0f} s"
    return f"ok, {took}" if status == 0 else f"exit status {status}, {took}"


def build(python: str, out: Path, seconds: float | None, environment: dict[str, str]) -> tuple[str, list[str]]:
    """Install the working tree using only installed packages, or build in place (PYTHONPATH finds it then).

    Returns how it ended, and the errors.
    """
    install = [python, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps"]
    install += ["--editable", ".", "-v"]
    begin, log = time.monotonic(), out / "build.log"
    ended = run(install, log, seconds, environment)
    if not ended.startswith(("ok", "stopped")):  # for example, a Python whose site-packages is read-only
        left, log = seconds and seconds - (time.monotonic() - begin), out / "build-in-place.log"
        ended = run([python, "setup.py", "build_ext", "--inplace"], log, left, environment)
    return ended, [] if ended.startswith("ok") else re.findall(r".*[Ee]rror.*", log.read_text(errors="replace"))


def ask(python: str, code: str, environment: dict[str, str]) -> str:
    """The last line that the code prints; if there is none, the last line of its error."""
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    return ((done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"])[-1]


def fingerprint() -> str:
    """Of the sources of the package and its kernels: results of other kernels must not be mixed with theirs."""
    found = hashlib.sha256()
    for file in sorted([*(ROOT / "csrc").glob("*"), *(ROOT / "eman_kernels").rglob("*.py")]):
        found.update(file.read_bytes())
    return found.hexdigest()[:8]


def key_lines(name: str, log: Path) -> list[str]:
    """The most important lines of a log, for the summary."""
    text = log.read_text(errors="replace")
    if name == "ncu":
        return parse_ncu(text)
    patterns = {
        "variants": r"^(?:\d+ builds .*|\S+, [\d,]+ elements.*|(?:flat copy|cuda, |triton, |cpu ).*|\d+ s in total)$",
        "memcheck": r"^(?:=+ ERROR SUMMARY.*|self-check.*|=+ .*(?:Invalid|Error).*)$",
    }
    of_pytest = r"FAILED .*|ERROR .*|\d+(?:/\d+)? (?:passed|failed|skipped|deselected|errors?|tests? collected)\b.*"
    of_parts = r"- .*|.*: failed|\w*Error: .*|.* not available: .*"
    return re.findall(patterns.get(name, rf"^(?:{of_pytest}|{of_parts})$"), text, re.M)


def parse_ncu(text: str) -> list[str]:
    """One line per kernel in ncu's CSV output: the metrics with their units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels: dict[tuple[str, str], list[str]] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name") in METRICS:
            value = f"{METRICS[row['Metric Name']]} {row['Metric Value']} {row['Metric Unit']}"
            kernels.setdefault((row["ID"], row["Kernel Name"][:30]), []).append(value)
    return [f"{kernel} {number}: {', '.join(values)}" for (number, kernel), values in kernels.items()]


def shorten(summary: list[tuple[str, list[str]]]) -> list[str]:
    """How each command ended, and as many of its key lines as fit."""
    room = max((SUMMARY_LINES - len(summary)) // max(sum(bool(found) for _, found in summary), 1), 0)
    lines = []
    for head, found in summary:
        lines += [head, *(f"    {line[:150]}" for line in found[:room])]
    return lines


class Results:
    """How each command of a folder ended, with the most important lines of its log. Written after each command."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.file = folder / "summary.json"
        self.commands: dict[str, list[str]] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def is_done(self, name: str) -> bool:
        return self.commands.get(name, [""])[0].startswith("ok")

    def note(self, name: str, ended: str, lines: list[str]) -> None:
        print("\n".join([f"{name}: {ended}", *lines]), flush=True)
        self.commands[name] = [ended, *lines]
        new = self.file.with_suffix(".new")  # if this process is stopped meanwhile, the old file stays
        new.write_text(json.dumps(self.commands, indent=1) + "\n")
        os.replace(new, self.file)

    def summarize(self) -> list[str]:
        lines = shorten([(f"{name}: {ended}", lines) for name, (ended, *lines) in self.commands.items()])
        (self.folder / "summary.txt").write_text("\n".join(lines) + "\n")
        return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="*", metavar="STAGE", help="default: all except memcheck and variants")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu", help="default: %(default)s")
    parser.add_argument("--no-build", action="store_true", help="use the existing extension")
    parser.add_argument("--rehearse", action="store_true", help="run the part of each command that works without a GPU")
    arguments = parser.parse_args()
    python, rehearse = sys.executable, arguments.rehearse
    if unknown := set(arguments.stage) - set(known := stages(python, arguments.out)):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    environment |= {"PYTHONUNBUFFERED": "1"}
    found = ask(python, PROBE, environment)
    if not found.startswith("{"):
        print(f"torch cannot be imported: {found}")
        return 1
    device, architecture = json.loads(found).values()
    if device is None and not rehearse:
        print("torch does not see a CUDA GPU (--rehearse runs the parts that work without one)")
        return 1
    folder = "rehearsal" if rehearse else re.sub(r"\W+", "-", device.lower())
    results = Results(arguments.out.resolve() / f"{folder}-{fingerprint()}")
    out = results.folder
    print(f"results: {out}", flush=True)

    def why_no_cuda() -> str | None:
        answer = "available" if rehearse else ask(python, CHECK, environment)
        return None if answer == "available" else answer

    if not arguments.no_build and (not results.is_done("build") or why_no_cuda()):
        # For this device only: all architectures take several times as long.
        for_this_device = {"TORCH_CUDA_ARCH_LIST": architecture} | environment
        results.note("build", *build(python, out, None if rehearse else BUILD_SECONDS, for_this_device))
    run([python, "-m", "eman_kernels"], out / "environment.log", 60, environment)
    print((out / "environment.log").read_text(), flush=True)
    if reason := why_no_cuda():
        print(f"the cuda backend is not available: {reason}\nno stage was run; the logs are in {out}")
        return 1
    chosen = arguments.stage or [stage for stage in known if stage not in ON_REQUEST]
    commands = {f"{stage}, {command.name}": command for stage in chosen for command in stages(python, out)[stage]}
    failed = False
    for name, command in commands.items():
        if results.is_done(name):
            print(f"{name}: {results.commands[name][0]} in an earlier call", flush=True)
            continue
        if command.needs and not shutil.which(command.needs) and not rehearse:
            results.note(name, f"skipped: no {command.needs} on PATH", [])
            continue
        log = out / f"{name.replace(', ', '-')}.log"
        what = command.rehearsal if rehearse else command.run
        # A rehearsal shows that the commands work; how long they take there does not matter.
        limit = None if rehearse else command.seconds
        results.note(name, run(what, log, limit, environment), key_lines(command.name, log))
        failed |= not results.is_done(name)
    print("\n" + "\n".join(["summary", *results.summarize()]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
