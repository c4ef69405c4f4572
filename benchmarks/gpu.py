"""`make gpu`: everything that needs a GPU, using the current Python and downloading nothing.

Stages, each under 8 minutes: correct (tests), figures (report), evidence (compute-sanitizer and ncu), variants (kernels
built with other parameters). Every command has its own time limit and log; a stopped command keeps its output so far.
"""

import argparse
import csv
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
MODELS = ("wide_resnet28_2", "mobilenet_v3_large", "resnet50", "vit_b_16")
# All methods except torch.compile, which needs half a minute of compilation per model and dtype.
METHODS = ("published", "foreach", "timm", "Averaged", "lightning", "ema-pytorch", "torch-ema", "diffusers", "lightly")
METHODS += ("apex", "eman_kernels")
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active",
}
# Updates to profile: WideResNet-28-2's and ResNet-50's.
ONE_UPDATE = """
import torch, eman_kernels, sys
sys.path.insert(0, "benchmarks")
from models import pair
for model in ("wide_resnet28_2", "resnet50"):
    teacher, student = pair(model, "float32", torch.device(sys.argv[1]))
    for _ in range(3):
        eman_kernels.eman_update_(teacher, student, 0.999)
"""
SUMMARY_LINES = 40


class Command(NamedTuple):
    name: str
    run: list[str]
    seconds: int  # time limit
    rehearsal: list[str] | None = None  # the part of it that runs without a GPU
    needs: str | None = None  # a program that must be on PATH


def stages(python: str, out: Path) -> dict[str, list[Command]]:
    def tests(*names: str, seconds: int) -> Command:
        command = [python, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
        files = [f"tests/backends/test_{name}.py" for name in names]
        return Command(" ".join(names), [*command, *files], seconds, [*command, "--collect-only", *files])

    report = [python, "benchmarks/report.py", "--out", str(out)]
    variants = [python, "benchmarks/variants.py"]
    check = [python, "-m", "eman_kernels"]
    update = [python, "-c", ONE_UPDATE]
    ncu = [
        "ncu",
        "--kernel-name",
        "regex:eman_update",
        "--clock-control",
        "none",
        "--csv",
        "--metrics",
        ",".join(METRICS),
    ]
    memcheck = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]
    return {
        "correct": [
            tests("cuda", seconds=120),
            tests("backends", seconds=90),
            tests("general", seconds=120),
            tests("nonfinite", seconds=120),
        ],
        "figures": [
            Command(
                "report",
                [*report, "--model", *MODELS, "--method", *METHODS],
                460,
                [*report, "--quick", "--device", "cpu", "--model", "wide_resnet28_2", "--method", "published", "eman"],
            ),
        ],
        "evidence": [
            Command("memcheck", [*memcheck, *check], 180, check, "compute-sanitizer"),
            Command("ncu", [*ncu, *update, "cuda"], 180, [*update, "cpu"], "ncu"),
        ],
        "variants": [
            Command("variants", [*variants, "--json", str(out / "variants.json")], 300, [*variants, "--rehearse"]),
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


def build(python: str, out: Path, environment: dict[str, str]) -> str:
    """Install the working tree using only installed packages, or build in place (PYTHONPATH finds it then)."""
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
        "--editable",
        ".",
        "-v",
    ]
    ended = run(install, out / "build.log", 240, environment)
    if not ended.startswith("ok"):  # for example, a Python whose site-packages is read-only
        ended = run([python, "setup.py", "build_ext", "--inplace"], out / "build-in-place.log", 240, environment)
    return ended


def key_lines(name: str, log: Path) -> list[str]:
    """The most important lines of a log, for the summary."""
    text = log.read_text(errors="replace")
    if name == "ncu":
        return parse_ncu(text)
    patterns = {
        "report": r"^(?:- .*: met\.|- .*: not met for:|  - .*|written: .*|.*: \w*Error: .*)$",
        "variants": r"^(?:\d+ builds .*|\S+, [\d,]+ elements.*|(?:flat copy|cuda, |triton, |cpu ).*|\d+ s in total)$",
        "memcheck": r"^(?:=+ ERROR SUMMARY.*|self-check.*|=+ .*(?:Invalid|Error).*)$",
    }
    of_pytest = (
        r"^(?:FAILED .*|ERROR .*|\d+(?:/\d+)? (?:passed|failed|skipped|deselected|errors?|tests? collected)\b.*)$"
    )
    return re.findall(patterns.get(name, of_pytest), text, re.M)


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="*", metavar="STAGE", help="correct, figures, evidence, variants (default: all)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu", help="default: %(default)s")
    parser.add_argument("--no-build", action="store_true", help="use the existing extension")
    parser.add_argument("--rehearse", action="store_true", help="run the part of each command that works without a GPU")
    arguments = parser.parse_args()
    python, out = sys.executable, arguments.out.resolve()
    known = stages(python, out)
    if unknown := set(arguments.stage) - set(known):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    environment |= {"PYTHONUNBUFFERED": "1"}
    summary, failed = [], False

    def note(head: str, found: list[str]) -> None:
        print("\n".join([head, *found]), flush=True)
        summary.append((head, found))

    if not arguments.no_build:
        ended = build(python, out, environment)
        note(f"build: {ended}", [] if ended.startswith("ok") else ["using the existing extension, if any"])
    run([python, "-m", "eman_kernels"], out / "environment.log", 120, environment)
    print((out / "environment.log").read_text(), flush=True)
    sees = subprocess.run(
        [python, "-c", "import torch; print(torch.cuda.is_available())"], capture_output=True, text=True, cwd=ROOT
    )
    if "True" not in sees.stdout and not arguments.rehearse:
        print("torch does not see a CUDA GPU (--rehearse runs the parts that work without one)")
        return 1
    for stage in arguments.stage or known:
        for command in known[stage]:
            name = f"{stage}, {command.name}"
            if command.needs and not shutil.which(command.needs) and not arguments.rehearse:
                note(f"{name}: skipped: no {command.needs} on PATH", [])
                continue
            log = out / f"{stage}-{command.name.replace(' ', '-')}.log"
            what = command.rehearsal if arguments.rehearse else command.run
            # A rehearsal shows that the commands work; how long they take there does not matter.
            limit = None if arguments.rehearse else command.seconds
            ended = run(what, log, limit, environment)
            failed |= not ended.startswith("ok")
            note(f"{name}: {ended}", key_lines(command.name, log))
    lines = shorten(summary)
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    (out / "summary.json").write_text(json.dumps([{"command": head, "findings": found} for head, found in summary]))
    print("\n" + "\n".join(["summary", *lines][:SUMMARY_LINES]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
