"""Measure single parts of the benchmarks: `make gpu` runs these.

A part consists of measurements. The file is written after each of them, and another call with the same file measures
only what is missing or has failed. The exit status is 1 if a measurement fails or a result of eman_kernels is wrong.
"""

import argparse
import json
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from checks import rules_rows
from general import measure_modes
from growth import growth, measure_host_overhead, measure_teacher_overhead
from models import pair, tensors_of
from step import REVERSED, STEPS, WAYS, training_steps
from timing import MOMENTUM, WARM_UP, machine, measure, quartiles, synchronized_ms, write_rows
from torch import nn
from updates import GRAPH, OURS, Method, Update, handwritten_methods, our_methods, split_tensors

from eman_kernels import available_backends, eman_update_

SMALL = "wide_resnet28_2"  # for rehearsals
FIGURES = [("vit_b_16", "float32"), ("vit_b_16", "mixed"), ("vit_b_16", "bfloat16")]
FIGURES += [("mobilenet_v3_large", "mixed"), ("mobilenet_v3_large", "bfloat16")]  # no earlier report has these on a GPU
Measurements = Iterator[tuple[str, Callable[[], list[dict]]]]


def fast_methods(device: torch.device) -> dict[str, Method | str]:
    """The methods without those that take seconds, and without torch.compile, which compiles for half a minute."""
    from peers import timm_v3

    loops = {name: method for name, method in handwritten_methods().items() if not name.startswith("torch.compile")}
    return loops | {"timm ModelEmaV3": Method(timm_v3)} | our_methods(device)


def modes(device: torch.device, rehearse: bool) -> Measurements:
    for model in (SMALL,) if rehearse else (SMALL, "resnet50"):
        yield model, partial(measure_modes, model, device, 2 if rehearse else 21)


def step_of(model: str, device: torch.device, rehearse: bool) -> Measurements:
    ways = WAYS | REVERSED
    if rehearse and model != SMALL:
        ways.pop("torch.compile of the lerp loop")  # it compiles for a minute on a CPU
    yield model, partial(training_steps, model, device, *((2, 2) if rehearse else (12, STEPS[model].labelled)), ways)


def host(device: torch.device, rehearse: bool) -> Measurements:
    def overheads(model: str) -> list[dict]:
        teacher, student = pair(model, "float32", device)
        rounds = 2 if rehearse else 50
        with torch.no_grad():
            measured = measure_host_overhead(teacher, student, rounds) | measure_teacher_overhead(student, rounds)
        return [{"kind": "host", "model": model, "method": OURS} | measured]

    for model in (SMALL,) if rehearse else ("resnet50", "mobilenet_v3_large", SMALL):
        yield model, partial(overheads, model)


def figures(device: torch.device, rehearse: bool) -> Measurements:
    def update_rows(model: str, dtype: str) -> list[dict]:
        methods = fast_methods(device)
        if dtype != "bfloat16":
            methods.pop("eman_kernels, stochastic")  # for other dtypes it does the same work
        return [
            asdict(row)
            for row in measure(model, dtype, device, torch.get_num_threads(), 2 if rehearse else 20, methods)
        ]

    yield "correctness", partial(rules_rows, fast_methods(device), device)
    for model, dtype in [(SMALL, "bfloat16")] if rehearse else FIGURES:
        yield f"{model}, {dtype}", partial(update_rows, model, dtype)


def growth_curves(device: torch.device, rehearse: bool) -> Measurements:
    points = growth(device, fast_methods(device), 300_000 if rehearse else 10**9, 2 if rehearse else 8)
    for name, measured in points:
        if not rehearse or name in ("100 tensors, 100,000 elements", "30 tensors, 300,000 elements"):
            yield name, measured


def cpu_teacher(device: torch.device, rehearse: bool) -> Measurements:
    """A teacher in CPU memory that follows a student on the device."""
    model = SMALL if rehearse else "resnet50"
    yield model, partial(measure_cpu_teacher, model, device, 2 if rehearse else 15)


@torch.no_grad()
def measure_cpu_teacher(model: str, device: torch.device, rounds: int) -> list[dict]:
    def lerp_loop(teacher: nn.Module) -> Update:
        averaged, followed, copied, source = split_tensors(teacher, student)

        def update() -> None:
            for t, s in zip(averaged, followed, strict=True):
                t.lerp_(s.to("cpu"), 1.0 - MOMENTUM)
            for t, s in zip(copied, source, strict=True):
                t.copy_(s)

        return update

    _, student = pair(model, "float32", device)
    teachers = {name: pair(model, "float32", torch.device("cpu"))[0] for name in ("lerp loop", OURS)}
    mine = teachers[OURS]
    updates = {"lerp loop": lerp_loop(teachers["lerp loop"]), OURS: lambda: eman_update_(mine, student, MOMENTUM)}
    rows = {name: {"kind": "cpu teacher", "model": model, "method": name} for name in updates}
    times: dict[str, list[float]] = {name: [] for name in updates}
    for k in range(rounds + WARM_UP):
        for name, update in updates.items():
            begin = synchronized_ms(device)
            update()
            if k >= WARM_UP:
                times[name].append(synchronized_ms(device) - begin)
    for name, samples in times.items():
        rows[name]["q1_ms"], rows[name]["median_ms"], rows[name]["q3_ms"] = quartiles(samples)
    want = tensors_of(teachers["lerp loop"])
    if not all(torch.equal(tensor, want[name]) for name, tensor in tensors_of(mine).items()):
        rows[OURS]["why_not"] = "its bits differ from torch.lerp's"
    return list(rows.values())


PARTS: dict[str, Callable[[torch.device, bool], Measurements]] = {
    "modes": modes,
    "step-wide-resnet": partial(step_of, "wide_resnet28_2"),
    "step-resnet50": partial(step_of, "resnet50"),
    "host": host,
    "figures": figures,
    "growth": growth_curves,
    "cpu-teacher": cpu_teacher,
}


def is_wrong(row: dict) -> bool:
    """Whether a method of ours was not measured although it should have been."""
    why, method = row.get("why_not"), row["method"]
    return bool(why) and method.startswith(OURS) and GRAPH not in method and not why.startswith("not available")


def describe(row: dict) -> str:
    """One line: what was measured, and its main figures."""
    if rules := row.get("rules"):
        return f"- {row['method']}: " + ", ".join(f"{rule}: {answer}" for rule, answer in rules.items())
    what = [
        row["method"],
        *(str(row[key]) for key in ("model", "dtype", "mode", "chunk_bytes", "size") if row.get(key)),
    ]
    figures = [f"{1e3 * row['median_ms']:,.1f} us"] if row.get("median_ms") else []
    for key, unit in {"x_copy": "x copy", "x_limit": "x limit", "median_percent": "% of a step"}.items():
        figures += [f"{row[key]:.2f} {unit}"] if row.get(key) else []
    figures += [f"{key} {value:,.1f}" for key, value in row.items() if key.endswith("_us") and value]
    for key in ("step_ms", "host_step_ms", "host_update_ms", "host_ms", "first_update_ms"):
        figures += [f"{key} {row[key]:.3f}"] if row.get(key) else []
    return f"- {', '.join(what)}: {row.get('why_not') or ', '.join(figures)}"


def run(measurements: Measurements, described: dict, file: Path) -> bool:
    """Measure what the file does not contain. Returns whether everything was measured and is right."""
    rows = json.loads(file.read_text()) if file.exists() else []
    wrong = {row["part"] for row in rows if is_wrong(row)}
    rows = [row for row in rows if row["part"] not in wrong]
    done, right = {row["part"] for row in rows}, True
    for name, measured in measurements:
        if name in done:
            print(f"{name}: measured before", flush=True)
            continue
        try:
            found = measured()
        except Exception:
            print(f"{name}: failed\n{traceback.format_exc()}", flush=True)
            right = False
            continue
        rows += [
            described | {"part": name} | {key: value for key, value in row.items() if value is not None}
            for row in found
        ]
        write_rows(file, rows)
        print("\n".join(map(describe, found)), flush=True)
        right = right and not any(map(is_wrong, found))
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the results, read and written")
    parser.add_argument("--rehearse", action="store_true", help="little of it, on the CPU")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not move")  # measured at 0.999, rounded to nearest
    if not arguments.rehearse and (reason := available_backends()["cuda"]):
        print(f"the cuda backend is not available: {reason}")
        return 1
    device = torch.device("cpu") if arguments.rehearse else torch.device("cuda", torch.cuda.current_device())
    return int(not run(PARTS[arguments.part](device, arguments.rehearse), machine(device), arguments.json))


if __name__ == "__main__":
    raise SystemExit(main())
