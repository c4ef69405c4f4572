"""`make report`: measure everything that this machine can measure; write JSON, tables and pictures.

--from FOLDER measures nothing and reports what `make gpu` left in a folder, as <device>-<date>-parts.

Writes <device>-<date>.json (after each measurement), then .md and .png, to benchmarks/results. A complete run also
updates the summary in docs/speed.md and benchmarks/README.md, which have separate sections for CPU and GPU; on a GPU it
also draws the chart of README.md.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from adapters import adapters
from checks import describe_error, rules_rows
from counts import SIZES, host_instructions, why_not_callgrind
from growth import growth, measure_host_overhead, measure_teacher_overhead
from models import DTYPES, MODELS, pair
from peers import peers
from step import STEPS, training_steps
from tables import (
    cpu_teacher_table,
    embed,
    groups,
    growth_table,
    host_table,
    instructions_table,
    modes_table,
    of_kind,
    on_threads,
    rules_table,
    step_table,
    summary,
    summary_methods,
    title,
    update_table,
    verdicts,
)
from timing import machine, measure, write_rows
from updates import OURS, Method, handwritten_methods, our_methods

try:
    from pictures import draw, draw_speed
except ImportError:  # without matplotlib, only JSON and tables are written
    draw = None

HERE = Path(__file__).parent
GUIDE = HERE.parent / "docs"


def methods_for(device: torch.device, dtype: str) -> dict[str, Method | str]:
    found = handwritten_methods() | peers(dtype) | our_methods(device) | adapters()
    if dtype != "bfloat16":
        found.pop("eman_kernels, stochastic", None)  # for other dtypes it does the same work
    return found


def select_methods(methods: dict[str, Method | str], parts: list[str] | None) -> dict[str, Method | str]:
    """The methods whose name contains one of these parts; all methods if there are none."""
    return {name: how for name, how in methods.items() if not parts or any(part in name for part in parts)}


def instruction_rows() -> list[dict]:
    if reason := why_not_callgrind():
        return [{"kind": "instructions", "why_not": reason}]
    counted = host_instructions().items()
    return [{"kind": "instructions", "method": n, "sizes": SIZES, "instructions": c} for n, c in counted]


def update_rows(
    model: str, dtype: str, device: torch.device, threads: int, rounds: int, parts: list[str] | None
) -> list[dict]:
    """Measure one model and dtype with all methods, and the host overhead of eman_kernels."""
    few = min(12, rounds) if model == "vit_b_16" else rounds  # one round takes seconds on a CPU
    measured = measure(model, dtype, device, threads, few, select_methods(methods_for(device, dtype), parts))
    ours = [row for row in measured if row.method.startswith(OURS) and row.median_ms]
    if dtype == "float32" and ours:
        with torch.no_grad():
            around = measure_host_overhead(*pair(model, dtype, device), rounds)
            around |= measure_teacher_overhead(pair(model, dtype, device)[1], rounds)
        vars(ours[0]).update(around)
    return [asdict(row) for row in measured]


def parts_of(device: torch.device, given: argparse.Namespace) -> Iterator[tuple[str, Callable[[], list[dict]]]]:
    """All parts of the report, as (name, function that measures it)."""
    quick = given.quick
    rounds = 2 if quick else 30
    if quick:
        torch.set_num_threads(1)  # on a busy machine, two threads would wait for each other at each operation
    threads = torch.get_num_threads()
    models = given.model or (["wide_resnet28_2"] if quick else list(MODELS))
    dtypes = given.dtype or (["float32"] if quick else list(DTYPES))
    yield "correctness", partial(rules_rows, select_methods(methods_for(device, "bfloat16"), given.method), device)
    for model in models:
        for dtype in dtypes:
            yield f"{model}, {dtype}", partial(update_rows, model, dtype, device, threads, rounds, given.method)
    if device.type == "cpu" and threads > 1 and not quick:
        for model in ("resnet50", "mobilenet_v3_large", "mobilenet_v2"):
            if model in models and "float32" in dtypes:
                yield f"{model}, 1 thread", partial(update_rows, model, "float32", device, 1, rounds, given.method)
    torch.set_num_threads(threads)
    found = methods_for(device, "float32")
    yield from growth(device, found, 300_000 if quick else 10**9, rounds)
    for model in STEPS if device.type == "cuda" else ["wide_resnet28_2"]:
        labelled = STEPS[model].labelled if device.type == "cuda" else 1 if quick else 8
        yield f"training steps, {model}", partial(training_steps, model, device, 2 if quick else 12, labelled)
    left_out = [{"kind": "instructions", "why_not": "skipped in the quick run"}]
    yield "instructions", (lambda: left_out) if quick else instruction_rows


def run(device: torch.device, given: argparse.Namespace, file: Path) -> list[dict]:
    """Measure all parts and return their rows, each with the machine and versions.

    The file is written after every part, so a later crash loses nothing. A failed part leaves a row with the reason.
    """
    described, rows = machine(device), []
    for what, measured in parts_of(device, given):
        try:
            found = measured()
        except Exception as error:
            found = [{"kind": "failed", "what": what, "why_not": describe_error(error)}]
            print(f"\n{what}: {found[0]['why_not']}", flush=True)
        rows += [described | {name: value for name, value in row.items() if value is not None} for row in found]
        write_rows(file, rows)
        for key, measured_now in groups(found).items():
            here = [described | row for row in measured_now]
            print(f"\n### {title(*key, here)}\n\n{update_table(here)}", flush=True)
    return rows


def text(rows: list[dict], pictures: list[Path]) -> str:
    """The whole report in Markdown."""
    conditions = {name: value for name, value in rows[0].items() if all(row.get(name) == value for row in rows)}
    parts = [
        "# What a teacher update costs\n",
        ", ".join(f"{name} {value}" for name, value in conditions.items()) + "\n",
    ]
    parts.append("How each number is measured, and what it does not show: see benchmarks/README.md.\n")
    parts += ["## Goals\n", verdicts(rows)] if groups(rows) else []
    if failed := of_kind(rows, "failed"):
        parts += ["## Failed measurements\n", *(f"- {row['what']}: {row['why_not']}\n" for row in failed)]
    parts += ["## Correctness\n", rules_table(rows)] if of_kind(rows, "rules") else []
    parts += ["## Pictures\n", *(f"![{path.stem}]({path.name})\n" for path in pictures)] if pictures else []
    parts += ["## One update\n", "Summary: multiples of the limit, and durations.\n"] if groups(rows) else []
    for dtype in dict.fromkeys(key[1] for key in groups(rows)):
        parts += [f"### {dtype}\n", summary(rows, dtype)]
    for key, found in groups(rows).items():
        parts += [f"### {title(*key, found)}\n", update_table(found)]
    sections = {
        "mode": ("The general kernels", modes_table),
        "host": ("Host time of an update", host_table),
        "cpu teacher": ("A teacher in CPU memory of a student on the device", cpu_teacher_table),
        "elements": ("Growth with the number of elements", partial(growth_table, kind="elements")),
        "tensors": ("Growth with the number of tensors", partial(growth_table, kind="tensors")),
        "step": ("Share of a training step", step_table),
        "instructions": ("Host instructions", instructions_table),
    }
    for kind, (name, table) in sections.items():
        if of_kind(rows, kind):
            parts += [f"## {name}\n", table(rows)]
    return "\n".join(parts)


def rows_in(folder: Path) -> list[dict]:
    """The rows that the parts of `make gpu` wrote to a folder."""
    files = sorted(file for file in folder.glob("*.json") if file.name != "summary.json")
    if not files:
        raise SystemExit(f"{folder} has no results of make gpu")
    return [row for file in files for row in json.loads(file.read_text())]


def write_report(rows: list[dict], stem: Path) -> None:
    pictures = draw(rows, stem) if draw else []
    stem.with_suffix(".md").write_text(text(rows, pictures))
    print(f"\n{verdicts(rows) if groups(rows) else ''}\nwritten: {stem}.json, .md and {len(pictures)} pictures")


def name_of(described: dict) -> str:
    device = "".join(c if c.isalnum() else "-" for c in described["device"].lower())
    return f"{device}-{described['date']}"


def conditions(rows: list[dict]) -> str:
    row, threads = rows[0], on_threads(max(key[2] for key in groups(rows)))
    where = f"{row['cpu']}, {threads}" if row["device"] == "cpu" else f"{row['device']}, driver {row['driver']}"
    return (
        f"{where}, torch {row['torch']}, {row['date']}. Median time relative to one `lerp_` on a flat vector of "
        "the same size (x limit), and duration; float32"
    )


def short(rows: list[dict]) -> str:
    """The part of a report that docs/speed.md shows."""
    return f"{conditions(rows)}.\n\n" + summary(rows, "float32", summary_methods(rows))


def block(rows: list[dict], stem: str) -> str:
    """The part of a report that benchmarks/README.md shows."""
    folder = f"results/{stem}"
    parts = [
        f"{conditions(rows)}. Quartiles and all other results are in [{stem}.md]({folder}.md).",
        summary(rows, "float32"),
    ]
    parts += [f"![One update by method and model, as a multiple of the limit]({folder}-float32.png)"]
    if of_kind(rows, "elements"):
        parts += [f"![Growth of the cost with the number of elements and of tensors]({folder}-growth.png)"]
    if of_kind(rows, "step"):
        parts += [step_table(rows)]
    mine = next(row for row in rows if row["kind"] == "update" and "plan_ms" in row)
    parts += [
        f"Host overhead of `EMANTeacher.update()` for {mine['model']}: {mine['teacher_warm_us']:.0f} us with a warm "
        f"cache and {mine['teacher_cold_us']:.0f} us with a cold cache; with `cast`, {mine['cast_warm_us']:.0f} and "
        f"{mine['cast_cold_us']:.0f} us. Building the plan takes {mine['plan_ms']:.1f} ms, once; the chunk table "
        f"has {mine['table_bytes'] / 1e3:.0f} KB."
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def place(device: str) -> str:
    """The name of the section of docs/speed.md and benchmarks/README.md for reports from this device."""
    return "make report" if device == "cpu" else "make report on a GPU"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a trial run of a minute; its figures are not reliable")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--model", nargs="+", metavar="NAME", help=f"only these: {', '.join(MODELS)}, or any torchvision model"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="only these")
    parser.add_argument("--method", nargs="+", metavar="PART", help="only methods whose name contains one of these")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="default: %(default)s")
    parser.add_argument("--from", dest="measured", type=Path, metavar="FOLDER", help="report these results of make gpu")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not move")  # the tables show which teachers move
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.measured:
        rows = rows_in(arguments.measured)
        stem = arguments.out / f"{name_of(rows[0])}-parts"
        write_rows(stem.with_suffix(".json"), rows)
        write_report(rows, stem)
        return 0
    device = torch.device(arguments.device)
    stem = arguments.out / name_of(machine(device))
    rows = run(device, arguments, stem.with_suffix(".json"))
    whole = not (arguments.quick or arguments.model or arguments.dtype or arguments.method)
    if whole and not of_kind(rows, "failed") and arguments.out == HERE / "results":
        for page, shown in ((GUIDE / "speed.md", short(rows)), (HERE / "README.md", block(rows, stem.name))):
            page.write_text(embed(page.read_text(), place(device.type), shown))
        if draw and device.type == "cuda":
            draw_speed(rows, GUIDE)
    write_report(rows, stem)
    return int(bool(of_kind(rows, "failed")))


if __name__ == "__main__":
    sys.exit(main())
