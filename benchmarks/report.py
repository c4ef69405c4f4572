"""`make report`: everything that this machine can measure, as JSON, tables and pictures.

Writes <device>-<date>.json, .md and .png into benchmarks/results, and, on a CPU, the summary into the README.
"""

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from checks import rules_kept
from counts import SIZES, host_instructions, no_callgrind
from growth import around_the_kernel, around_the_kernel_of_teachers, growth
from models import DTYPES, MODELS, pair
from peers import peers
from pictures import draw
from step import training_steps
from tables import (
    embed,
    groups,
    growth_table,
    instructions_table,
    main_of_ours,
    on_threads,
    rules_table,
    step_table,
    summary,
    title,
    update_table,
    verdicts,
)
from timing import machine, measure
from updates import Method, by_hand, by_us

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def methods_for(device: torch.device, dtype: str) -> dict[str, Method | str]:
    found = by_hand() | peers(dtype) | by_us(device)
    if dtype != "bfloat16":
        found.pop("eman_kernels, stochastic", None)  # elsewhere it is the same work
    return found


def rules_rows(device: torch.device) -> list[dict]:
    rows = []
    for name, method in (by_hand() | peers("bfloat16") | by_us(device)).items():
        if isinstance(method, str):
            continue
        try:
            rows.append({"kind": "rules", "method": name, "rules": rules_kept(method, device)})
        except ImportError:
            continue  # the tables of times say that it is not here
    return rows


def instruction_rows() -> list[dict]:
    if reason := no_callgrind():
        return [{"kind": "instructions", "why_not": reason}]
    counted = host_instructions().items()
    return [{"kind": "instructions", "method": n, "sizes": SIZES, "instructions": c} for n, c in counted]


def run(device: torch.device, quick: bool) -> list[dict]:
    """All rows, each with the machine it is from."""
    if quick:
        torch.set_num_threads(1)  # on a busy machine two threads wait for each other at each of the loop's operations
    threads = torch.get_num_threads()
    models, dtypes, rounds = (["wide_resnet28_2"], ["float32"], 2) if quick else (list(MODELS), list(DTYPES), 30)
    rows = []
    with torch.no_grad():
        rows += rules_rows(device)
    for model in models:
        for dtype in dtypes:
            few = min(12, rounds) if model == "vit_b_16" else rounds  # a round takes seconds
            measured = measure(model, dtype, device, threads, few, methods_for(device, dtype))
            if dtype == "float32":
                with torch.no_grad():
                    around = around_the_kernel(*pair(model, dtype, device), rounds)
                    around |= around_the_kernel_of_teachers(pair(model, dtype, device)[1], rounds)
                name = main_of_ours([*map(asdict, measured)])
                vars(next(row for row in measured if row.method == name)).update(around)
            found = [asdict(row) for row in measured]
            rows += found
            print(f"\n### {title(model, dtype, threads, found)}\n\n{update_table(found)}", flush=True)
    if device.type == "cpu" and threads > 1 and not quick:
        for model in ("resnet50", "mobilenet_v3_large", "mobilenet_v2"):
            rows += map(asdict, measure(model, "float32", device, 1, rounds, methods_for(device, "float32")))
        torch.set_num_threads(threads)
    found = methods_for(device, "float32")
    most = 300_000 if quick else 10**9
    rows += map(asdict, growth(device, found, most, rounds))
    rows += training_steps(device, 2 if quick else 12, 64 if device.type == "cuda" else 1 if quick else 8)
    rows += instruction_rows() if not quick else [{"kind": "instructions", "why_not": "left out of the quick run"}]
    described = machine(device)
    return [described | {name: value for name, value in row.items() if value is not None} for row in rows]


def text(rows: list[dict], pictures: list[Path]) -> str:
    """The whole report in Markdown."""
    conditions = {name: value for name, value in rows[0].items() if name not in ("kind", "method", "rules")}
    parts = [
        "# What a teacher update costs\n",
        ", ".join(f"{name} {value}" for name, value in conditions.items()) + "\n",
    ]
    parts.append("How each number is taken, and what it does not show: benchmarks/README.md.\n")
    parts += ["## What was to be shown\n", verdicts(rows)]
    parts += ["## What each gets right\n", rules_table(rows)]
    parts += ["## Pictures\n", *(f"![{path.stem}]({path.name})\n" for path in pictures)]
    parts += ["## One update\n", "In short: times the limit, and milliseconds.\n"]
    for dtype in dict.fromkeys(key[1] for key in groups(rows)):
        parts += [f"### {dtype}\n", summary(rows, dtype)]
    for key, found in groups(rows).items():
        parts += [f"### {title(*key, found)}\n", update_table(found)]
    parts += ["## Growth with the elements\n", growth_table(rows, "elements")]
    parts += ["## Growth with the tensors\n", growth_table(rows, "tensors")]
    parts += ["## The share of a training step\n", step_table(rows)]
    parts += ["## Instructions of the host\n", instructions_table(rows)]
    return "\n".join(parts)


def block(rows: list[dict], stem: str) -> str:
    """What the README shows of a report."""
    row, threads = rows[0], on_threads(max(key[2] for key in groups(rows)))
    folder = f"benchmarks/results/{stem}"
    head = (
        f"{row['cpu']}, {threads}, torch {row['torch']}, {row['date']}: time over that of one `lerp_` on a flat "
        f"vector of as many elements, float32, medians; quartiles and the rest are in [{stem}.md]({folder}.md)."
    )
    figures = [f"![{what}]({folder}-{name}.png)" for name, what in (
        ("float32", "One update by method and model, as a multiple of the limit"),
        ("growth", "Growth of the cost with the elements and with the tensors"),
    )]  # fmt: skip
    mine = next(row for row in rows if row["kind"] == "update" and "plan_ms" in row)
    around = (
        f"`EMANTeacher.update()` apart from the kernel, for {mine['model']}: {mine['teacher_warm_us']:.0f} us in a "
        f"warm cache and {mine['teacher_cold_us']:.0f} us in a cold one; with `cast` {mine['cast_warm_us']:.0f} and "
        f"{mine['cast_cold_us']:.0f} us. Making its plan takes {mine['plan_ms']:.1f} ms, once; the table "
        f"of chunks is {mine['table_bytes'] / 1e3:.0f} KB."
    )
    return "\n\n".join([head, summary(rows, "float32").rstrip(), *figures, step_table(rows).rstrip(), around]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute, and no figure to be believed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="default: %(default)s")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not move")  # the tables say which teachers move
    device = torch.device(arguments.device)
    rows = run(device, arguments.quick)
    name = "".join(c if c.isalnum() else "-" for c in rows[0]["device"].lower())
    stem = arguments.out / f"{name}-{rows[0]['date']}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    pictures = draw(rows, stem)
    stem.with_suffix(".md").write_text(text(rows, pictures))
    if device.type == "cpu" and not arguments.quick and arguments.out == HERE / "results":
        README.write_text(embed(README.read_text(), "make report", block(rows, stem.name)))
    print(f"\n{verdicts(rows)}\nwritten: {stem}.json, .md and {len(pictures)} pictures")


if __name__ == "__main__":
    main()
