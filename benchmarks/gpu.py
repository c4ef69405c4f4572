"""`make gpu`: all that a GPU is needed for, with the Python that is there and nothing downloaded.

Stages, each under 8 minutes: correct (the tests), figures (the report), evidence (compute-sanitizer and ncu), variants
(the kernels built otherwise). Every command has its own time limit and log, and what it has when it is stopped stays.
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
# All but torch.compile's, which compiles half a minute for each model and dtype.
METHODS = ("published", "foreach", "timm", "Averaged", "lightning", "ema-pytorch", "torch-ema", "diffusers", "lightly")
METHODS += ("apex", "eman_kernels")
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps active",
}
# An update in which a launch is worth to be looked at: ResNet-50's, after one that is not.
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
    seconds: int  # when it is stopped
    rehearsal: list[str] | None = None  # what a machine without a GPU can run of it
    needs: str | None = None  # a program


def stages(python: str, out: Path) -> dict[str, list[Command]]:
    def tests(*names: str, seconds: int) -> Command:
        command = [python, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
        files = [f"tests/test_{name}.py" for name in names]
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


def run(command: list[str], log: Path, seconds: float, environment: dict[str, str]) -> str:
    """How it ended. Its output goes into the log as it comes, and to the terminal afterwards not at all."""
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
            # pytest then says what failed so far. Of what it started, a compiler say, none goes on.
            for how in (signal.SIGINT, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(child.pid, how)
                    child.wait(15)
            return f"stopped after {seconds:.0f} s"
    took = f"{time.monotonic() - begin:.0f} s"
    return f"ok, {took}" if status == 0 else f"exit status {status}, {took}"


def build(python: str, out: Path, environment: dict[str, str]) -> str:
    """Install from here, with what this Python has; else what lies here already is used, through PYTHONPATH."""
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
    if not ended.startswith("ok"):  # a Python that may not be written to, for one
        ended = run([python, "setup.py", "build_ext", "--inplace"], out / "build-in-place.log", 240, environment)
    return ended


def findings(name: str, log: Path) -> list[str]:
    """The lines of a log that its reader wants first."""
    text = log.read_text(errors="replace")
    if name == "ncu":
        return of_ncu(text)
    patterns = {
        "report": r"^(?:- .*so\.|- .*not so for|  - .*|written: .*|.*: \w*Error: .*)$",
        "variants": r"^(?:\d+ builds .*|\S+, [\d,]+ elements.*|(?:flat copy|cuda, |triton, |cpu ).*|\d+ s in all)$",
        "memcheck": r"^(?:=+ ERROR SUMMARY.*|self-check.*|=+ .*(?:Invalid|Error).*)$",
    }
    of_pytest = (
        r"^(?:FAILED .*|ERROR .*|\d+(?:/\d+)? (?:passed|failed|skipped|deselected|errors?|tests? collected)\b.*)$"
    )
    return re.findall(patterns.get(name, of_pytest), text, re.M)


def of_ncu(text: str) -> list[str]:
    """A line for each kernel in ncu's CSV: the metrics' values with their units."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels: dict[tuple[str, str], list[str]] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name") in METRICS:
            value = f"{METRICS[row['Metric Name']]} {row['Metric Value']} {row['Metric Unit']}"
            kernels.setdefault((row["ID"], row["Kernel Name"][:30]), []).append(value)
    return [f"{kernel} {number}: {', '.join(values)}" for (number, kernel), values in kernels.items()]


def shortened(summary: list[tuple[str, list[str]]]) -> list[str]:
    """Every command's end, and as many of its findings as there is room for."""
    room = max((SUMMARY_LINES - len(summary)) // max(sum(bool(found) for _, found in summary), 1), 0)
    lines = []
    for head, found in summary:
        lines += [head, *(f"    {line[:150]}" for line in found[:room])]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="*", metavar="STAGE", help="correct, figures, evidence, variants (default: all)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu", help="default: %(default)s")
    parser.add_argument("--no-build", action="store_true", help="use the extension that is there")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: as much of each command as that allows")
    arguments = parser.parse_args()
    python, out = sys.executable, arguments.out.resolve()
    known = stages(python, out)
    if unknown := set(arguments.stage) - set(known):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    environment |= {"PYTHONUNBUFFERED": "1"}
    summary, failed = [], False

    def note(head: str, found: list[str]) -> None:
        print("\n".join([head, *found]), flush=True)
        summary.append((head, found))

    if not arguments.no_build:
        ended = build(python, out, environment)
        note(f"build: {ended}", [] if ended.startswith("ok") else ["what is there of the extension is used"])
    run([python, "-m", "eman_kernels"], out / "environment.log", 120, environment)
    print((out / "environment.log").read_text(), flush=True)
    sees = subprocess.run(
        [python, "-c", "import torch; print(torch.cuda.is_available())"], capture_output=True, text=True, cwd=ROOT
    )
    if "True" not in sees.stdout and not arguments.rehearse:
        print("torch sees no CUDA GPU here (--rehearse runs what can be run without one)")
        return 1
    for stage in arguments.stage or known:
        for command in known[stage]:
            name = f"{stage}, {command.name}"
            if command.needs and not shutil.which(command.needs) and not arguments.rehearse:
                note(f"{name}: left out: no {command.needs} on PATH", [])
                continue
            log = out / f"{stage}-{command.name.replace(' ', '-')}.log"
            what = command.rehearsal if arguments.rehearse else command.run
            ended = run(what, log, command.seconds, environment)
            failed |= not ended.startswith("ok")
            note(f"{name}: {ended}", findings(command.name, log))
    lines = shortened(summary)
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    (out / "summary.json").write_text(json.dumps([{"command": head, "findings": found} for head, found in summary]))
    print("\n" + "\n".join(["summary", *lines][:SUMMARY_LINES]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
