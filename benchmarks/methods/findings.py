"""The results of a study: its records as tables and curves."""

import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate

sys.path.append(str(Path(__file__).parent.parent))
from pictures import BLACK, BLUE, ORANGE, PINK
from tables import step_table

Record = dict[str, Any]
COLORS = {"bn": ORANGE, "ema-bn": PINK, "eman": BLUE}
FIXMATCH = {
    "student_accuracy": "student",
    "teacher_accuracy": "teacher",
    "precision": "correct pseudo-labels",
    "mask_rate": "used pseudo-labels",
}
FEATURES = {
    "student_probe_13": "linear, 13 labels",
    "student_probe_128": "linear, 128 labels",
    "student_knn": "kNN",
    "teacher_knn": "kNN, teacher",
}
SHARES = {"precision", "mask_rate"}  # stored as fractions, shown in percent
PUBLISHED = [  # Cai et al., 2021: ResNet-50, ImageNet, top-1
    ["MoCo-EMAN, 200 epochs, linear", "48.9", "60.5", "67.7"],
    ["MoCo-EMAN, 800 epochs, linear", "55.4", "64.0", "70.1"],
    ["BYOL-EMAN, 200 epochs, linear", "55.1", "66.7", "72.2"],
    ["FixMatch-EMAN from MoCo-EMAN-800", "63.0", "74.0", ""],
]


def groups(records: Iterable[Record]) -> dict[tuple[str, int], dict[str, list[Record]]]:
    """(setting, labels) -> teacher -> the records, sorted by seed."""
    found: dict[tuple[str, int], dict[str, list[Record]]] = {}
    for record in sorted(records, key=lambda record: record["seed"]):
        found.setdefault((record["setting"], record["labels"]), {}).setdefault(record["teacher"], []).append(record)
    return found


def values_of(records: list[Record], metric: str) -> list[float]:
    return [percent(record["results"], metric) for record in records if metric in record["results"]]


def percent(point: dict[str, float], metric: str) -> float:
    return point[metric] * (100 if metric in SHARES else 1)


def mean_and_sd(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table(records: list[Record], method: str) -> str:
    """Means and standard deviations over the seeds, in percent, and EMAN's paired difference from the others."""
    metrics = FIXMATCH if method == "fixmatch" else FEATURES
    main = next(iter(metrics))
    rows = []
    for (setting, labels), teachers in groups(record for record in records if record["method"] == method).items():
        for teacher in sorted(teachers, key=list(COLORS).index):
            runs = teachers[teacher]
            row = [setting, *([labels] if method == "fixmatch" else []), "" if "supervised" in setting else teacher]
            row += [len(runs), *(mean_and_sd(values_of(runs, metric)) for metric in metrics)]
            pairs = zip(values_of(teachers.get("eman", []), main), values_of(runs, main), strict=False)
            row.append("" if teacher == "eman" or "eman" not in teachers else mean_and_sd([a - b for a, b in pairs]))
            rows.append(row)
    names = ["method", *(["labels per class"] if method == "fixmatch" else []), "teacher", "seeds", *metrics.values()]
    return tabulate(rows, [*names, f"gain of EMAN ({metrics[main]})"], "github", disable_numparse=True)


def summary(records: list[Record]) -> str:
    parts = [table(records, method) for method in ("fixmatch", "moco", "byol")]
    published = tabulate(
        PUBLISHED,
        ["published, not reproduced here", "1 %", "10 %", "100 % of the labels"],
        "github",
        disable_numparse=True,
    )
    return "\n\n".join([*parts, published]) + "\n"


def place(records: list[Record]) -> str:
    row = records[0]
    device = row["cpu"] + ", one thread per run" if row["device"] == "cpu" else row["device"]
    return f"{row['data']}, {device}, torch {row['torch']}, {row['date']}"


def shares_table(rows: list[Record]) -> str:
    """The update's time and its share of a step, by method and implementation."""
    named = [row | {"method": f"{row['model']}, {row['method']}"} for row in rows]
    return step_table(named)


def scope(rows: list[Record]) -> str:
    return (
        f"The update's share of a step of the small recipe, {rows[0]['threads']} threads, not counting augmentation:\n"
    )


def conditions(records: list[Record]) -> str:
    hours = sum(record["seconds"] for record in records) / 3600
    return (
        f"{place(records)}; {len(records)} runs, {hours:.1f} core hours. Percent of the test images, mean ± "
        "standard deviation over the seeds, after the last step (no step is selected by its result). With the same "
        "seed, all teachers get the same labels, initial network and batches, so differences are paired.\n"
    )


def block(records: list[Record], shares: list[Record], picture: str) -> str:
    """The part of a study that methods/README.md shows."""
    figure = f"![Accuracy, precision and distance over the steps](../results/{picture})\n"
    return "\n".join([conditions(records), summary(records), figure, scope(shares), shares_table(shares)])


def text(records: list[Record], shares: list[Record], picture: str) -> str:
    """The whole page in Markdown."""
    parts = ["# Three methods with three teachers\n", conditions(records), summary(records)]
    parts += [f"![Curves]({picture})\n", "## Share of a step\n"]
    parts += [scope(shares), shares_table(shares)]
    return "\n".join(parts)


def draw(records: list[Record], path: Path) -> None:
    """Curves over the steps, one row per setting: mean and standard deviation over the seeds."""
    found = groups(records)
    shown = [key for key in found if "supervised" not in key[0]]
    figure = Figure(figsize=(13, 2.4 * len(shown) + 0.6), layout="constrained")
    grid = figure.subplots(len(shown), 4, squeeze=False)
    for line, key in zip(grid, shown, strict=True):
        setting, labels = key
        fixmatch = next(iter(found[key].values()))[0]["method"] == "fixmatch"
        score = "accuracy" if fixmatch else "knn"
        metrics = [f"student_{score}", f"teacher_{score}", "precision" if fixmatch else "loss", "weights_apart"]
        for axes, metric in zip(line, metrics, strict=True):
            for teacher in filter(found[key].get, COLORS):
                curve(axes, found[key][teacher], metric, COLORS[teacher], teacher)
            baseline = found.get((setting.replace("FixMatch", "supervised only").split(",")[0], labels), {}).get("bn")
            if metric == "student_accuracy" and baseline:
                curve(axes, baseline, metric, BLACK, "supervised only")
            axes.set_title(metric.replace("_", " ").replace("apart", "apart, relative"), fontsize=9)
        line[0].set_ylabel(f"{setting}\n{f'{labels} labels per class' if fixmatch else ''}", fontsize=8)
        line[0].legend(fontsize=7, frameon=False)
    for axes in grid[-1]:
        axes.set_xlabel("steps")
    what = "Mean and standard deviation over the seeds; the last point uses all test images, the others 2,000"
    figure.suptitle(f"{what}\n{place(records)}", fontsize=8)
    figure.savefig(path, dpi=110)


def curve(axes: Any, runs: list[Record], metric: str, color: str, label: str) -> None:
    points: dict[int, list[float]] = {}
    for record in runs:
        for point in record["curve"]:
            if metric in point:
                points.setdefault(point["step"], []).append(percent(point, metric))
    if not points:
        return
    means = [statistics.mean(values) for values in points.values()]
    spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in points.values()]
    axes.plot(list(points), means, color=color, label=label, marker=".", linewidth=1.2)
    low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
    axes.fill_between(list(points), low, high, color=color, alpha=0.15, linewidth=0)
