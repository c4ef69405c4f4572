"""Pictures of the rows: bars by method and model, growth curves, and the share of a step.

Axes start at 0, or are logarithmic and labeled so.
"""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter
from tables import by_size, duration, groups, keepers, main_of_ours, of_kind, on_threads
from updates import COPY, LIMIT, LOOP, OURS

matplotlib.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
# Wong's palette, which can be distinguished with any kind of color vision.
BLUE, ORANGE, GREY, BLACK, GREEN, PINK = "#0072B2", "#E69F00", "#BBBBBB", "#000000", "#009E73", "#CC79A7"
CURVES = {
    LOOP: (ORANGE, "s", "-"),
    "timm ModelEmaV3": (GREEN, "^", "-"),
    "foreach, lists kept": (PINK, "D", "-"),
    LIMIT: (BLACK, "", "--"),
}
CUT = 12  # multiples of the limit: longer bars are cut here, and their labels give the value


def place(rows: list[dict]) -> str:
    """The machine, versions and date of the measurements."""
    row = rows[0]
    device = row["cpu"] + " (CPU)" if row["device"] == "cpu" else row["device"]
    driver = f", driver {row['driver']}" if "driver" in row else ""
    return f"{device}{driver}, torch {row['torch']}, {row['date']}, commit {row.get('commit', 'unknown')}"


def bars(rows: list[dict], dtype: str, threads: int) -> Figure:
    found = {key[0]: at for key, at in groups(rows).items() if key[1:] == (dtype, threads)}
    kept = keepers(rows)
    shown = {
        model: [row for row in at if row.get("median_ms") and row["method"] not in (LIMIT, COPY)]
        for model, at in found.items()
    }
    # Two columns; the panel after the last one holds the legend.
    lines, most = len(shown) // 2 + 1, max(map(len, shown.values()))
    figure = Figure(figsize=(13, lines * (0.2 * most + 0.7) + 0.4), layout="constrained")
    *panels, last = figure.subplots(lines, 2).flat[: len(shown) + 1]
    for axes in figure.axes[len(shown) :]:
        axes.axis("off")
    for axes, (model, at) in zip(panels, shown.items(), strict=True):
        at = sorted(at, key=lambda row: -row["x_limit"])
        for y, row in enumerate(at):
            colour = BLUE if row["method"].startswith(OURS) else ORANGE if row["method"] in kept else GREY
            q1, length, q3 = (min(row[name], CUT) for name in ("x_limit_q1", "x_limit", "x_limit_q3"))
            axes.barh(y, length, color=colour, height=0.75)
            axes.hlines(y, q1, q3, color=BLACK, linewidth=1.2)
            cut = " (bar cut)" if row["x_limit"] > CUT else ""
            label = f"{row['x_limit']:.2f}, {duration(row['median_ms'])}{cut}"
            axes.text(max(length, q3) + 0.1, y, label, va="center", fontsize=7.5)
        axes.set_yticks(range(len(at)), [row["method"] for row in at], fontsize=8)
        axes.axvline(1, color=BLACK, linestyle="--", linewidth=1)
        axes.set_title(f"{model}: {at[0]['elements'] / 1e6:.1f} M elements, {at[0]['tensors']} tensors", fontsize=9)
        axes.set_xlim(0, CUT + 2.5)
        axes.margins(y=0.02)
        axes.set_xlabel("multiples of the limit", fontsize=8)
    colours = {
        BLUE: "eman_kernels",
        ORANGE: "keeps the EMAN rule",
        GREY: "does less: does not update counters or buffers",
    }
    handles = [Patch(color=colour, label=label) for colour, label in colours.items()]
    handles.append(Line2D([], [], color=BLACK, linestyle="--", label="the limit: one flat lerp of the same size"))
    handles.append(Line2D([], [], color=BLACK, linewidth=1.2, label="interquartile range"))
    last.legend(handles=handles, loc="center", frameon=False, fontsize=10)
    on = f", {on_threads(threads)}" if rows[0]["device"] == "cpu" else ""
    figure.suptitle(
        f"One update, {dtype}{on}, cold cache: medians, as multiples of the limit and as durations. {place(rows)}",
        fontsize=9,
    )
    return figure


def logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers (also between powers of ten if the axis has few of them)."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))


def curve(axes: Axes, rows: list[dict], kind: str) -> None:
    ours = main_of_ours(of_kind(rows, kind))
    for method, (colour, marker, line) in (CURVES | {ours: (BLUE, "o", "-")}).items():
        points = [(size, at[method]) for size, at in by_size(rows, kind).items() if at.get(method, {}).get("median_ms")]
        sizes = [size for size, _ in points]
        axes.plot(sizes, [row["median_ms"] for _, row in points], color=colour, marker=marker, linestyle=line,
                  markersize=4, linewidth=1.2, label=method)  # fmt: skip
        axes.fill_between(sizes, [row["q1_ms"] for _, row in points], [row["q3_ms"] for _, row in points],
                          color=colour, alpha=0.2, linewidth=0)  # fmt: skip
    axes.set_xscale("log")
    logarithmic(axes)
    axes.set_ylabel("time of one update, ms (log scale)")
    axes.grid(color="#DDDDDD", linewidth=0.5)


def around(axes: Axes, rows: list[dict], kind: str) -> None:
    """eman_kernels only: host overhead, time to build the plan, and size of the chunk table."""
    ours = main_of_ours(of_kind(rows, kind))
    points = [(size, at[ours]) for size, at in by_size(rows, kind).items() if at.get(ours, {}).get("median_ms")]
    sizes = [size for size, _ in points]
    lines = {
        "host overhead of update(), warm cache": (BLUE, "o", [row["host_warm_us"] / 1e3 for _, row in points]),
        "host overhead of update(), cold cache": (GREEN, "^", [row["host_cold_us"] / 1e3 for _, row in points]),
        "building the plan, once": (ORANGE, "s", [row["plan_ms"] for _, row in points]),
    }
    for label, (colour, marker, values) in lines.items():
        axes.plot(sizes, values, color=colour, marker=marker, markersize=4, linewidth=1.2, label=label)
    axes.set_xscale("log")
    logarithmic(axes)
    axes.set_ylabel("time, ms (log scale)")
    axes.grid(color="#DDDDDD", linewidth=0.5)
    table = axes.twinx()
    table.plot(sizes, [row["table_bytes"] / 1e3 for _, row in points], color=BLACK, linestyle=":", label="chunk table")
    logarithmic(table)
    table.set_ylabel("chunk table, kB (log scale, dotted)")
    table.spines["right"].set_visible(True)


def growth_curves(rows: list[dict]) -> Figure:
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    panels = figure.subplots(2, 2)
    fixed = {kind: next(row for row in of_kind(rows, kind) if row["tensors"] > 1) for kind in ("elements", "tensors")}
    labels = (
        ("elements", f"elements, in {fixed['elements']['tensors']} tensors (log scale)"),
        ("tensors", f"tensors, with {fixed['tensors']['elements']:,} elements in total (log scale)"),
    )
    for column, (kind, label) in enumerate(labels):
        curve(panels[0, column], rows, kind)
        around(panels[1, column], rows, kind)
        for axes in panels[:, column]:
            axes.set_xlabel(label)
    for row in panels:
        row[1].legend(frameon=False, fontsize=8, loc="upper left")
    for column in range(2):
        panels[0, column].set_title("one update, float32", fontsize=9)
        panels[1, column].set_title("eman_kernels: work outside the kernel", fontsize=9)
    threads = f"{on_threads(fixed['elements']['threads'])}, " if rows[0]["device"] == "cpu" else ""
    figure.suptitle(f"{threads}cold cache; medians with interquartile bands. {place(rows)}", fontsize=8)
    return figure


def fixmatch_steps(rows: list[dict]) -> list[dict]:
    return [row for row in of_kind(rows, "step") if row.get("model") == "wide_resnet28_2" and row.get("median_ms")]


def step_bars(rows: list[dict]) -> Figure:
    found = fixmatch_steps(rows)[::-1]
    figure = Figure(figsize=(8, 2.2), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(found):
        error = [[row["median_percent"] - row["q1_percent"]], [row["q3_percent"] - row["median_percent"]]]
        colour = BLUE if row["method"].startswith(OURS) else ORANGE
        axes.barh(y, row["median_percent"], color=colour, height=0.6)
        axes.errorbar(row["median_percent"], y, xerr=error, color=BLACK, linewidth=0.8, capsize=2)
        text = f"  {row['median_percent']:.2f} %: {row['median_ms']:.2f} of {row['step_ms']:.0f} ms"
        axes.text(row["q3_percent"], y, text, va="center", fontsize=8)
    axes.set_yticks(range(len(found)), [row["method"] for row in found])
    axes.set_xlim(0, 1.45 * max(row["q3_percent"] for row in found))
    axes.set_xlabel("the teacher update's share of a training step, %")
    one = found[0]
    batch = f"WideResNet-28-2, {one['labelled']} labeled and {one['unlabelled']} unlabeled images"
    axes.set_title(f"{batch}; medians with quartiles\n{place(rows)}", fontsize=8)
    return figure


SPEED = {
    LOOP: "published EMAN loop",
    "timm ModelEmaV3": "timm ModelEmaV3",
    "foreach, lists kept": "torch._foreach_lerp_\non lists kept by hand",
    OURS: "eman_kernels",
}


def speed_rows(rows: list[dict]) -> dict[str, dict]:
    """The rows that the README's chart shows: ResNet-50 in float32 on a GPU, by the method's label in the chart."""
    measured = [row for row in of_kind(rows, "update") if row.get("median_ms")]
    found = {row["method"]: row for row in measured if (row["model"], row["dtype"]) == ("resnet50", "float32")}
    found[OURS] = found[main_of_ours(list(found.values()))]
    return {label: found[method] for method, label in SPEED.items() if method in found}


def speed(rows: list[dict], dark: bool) -> Figure:
    """The README's chart: host time and GPU time of one update, for a light or a dark page. Ours is the last row."""
    # A background of its own: a viewer in dark mode may show the chart on a light page.
    page, text, ours, others = (
        ("#0D1117", "#E6EDF3", "#58A6FF", "#6E7681") if dark else ("#FFFFFF", "#1F2328", BLUE, GREY)
    )
    found = speed_rows(rows)
    figure = Figure(figsize=(9, 2.9), layout="constrained", facecolor=page)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, what in zip(panels, ("host_ms", "median_ms"), ("Host (CPU) time", "GPU time"), strict=True):
        times = [row[key] for row in found.values()]
        bars = axes.barh(range(len(times)), times, color=[others] * (len(times) - 1) + [ours], height=0.66)
        labels = axes.bar_label(bars, [f"{time:.2f} ms" for time in times], padding=4, color=text, fontsize=11)
        labels[-1].set_fontweight("bold")
        axes.set_title(f"{what} per training step", color=text, fontsize=12, loc="left")
        axes.set_xlim(0, 1.3 * max(times))
        axes.set_facecolor("none")
        axes.set_yticks(range(len(found)), list(found))
        axes.tick_params(left=False, bottom=False, labelbottom=False, colors=text, labelsize=11)
        axes.spines[["bottom", "left"]].set_visible(False)
    panels[0].invert_yaxis()
    panels[0].get_yticklabels()[-1].set_fontweight("bold")
    row = next(iter(found.values()))
    figure.supxlabel(
        f"ResNet-50 ({row['tensors']} tensors, {row['elements'] / 1e6:.1f} M elements), float32. "
        f"{row['device']}, torch {row['torch']}, {row['date']}. Medians.",
        color=text,
        fontsize=9.5,
    )
    return figure


def draw_speed(rows: list[dict], folder: Path) -> None:
    """Write speed-light.svg and speed-dark.svg. The same rows give the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": "eman_kernels"}):
        for dark, name in ((False, "light"), (True, "dark")):
            figure = speed(rows, dark)
            figure.savefig(folder / f"speed-{name}.svg", metadata={"Date": None})


def draw(rows: list[dict], stem: Path) -> list[Path]:
    """Draw every picture for which there are rows; file names start with `stem`."""
    keys = list(groups(rows))
    threads = max((key[2] for key in keys), default=0)
    figures = {dtype: bars(rows, dtype, threads) for dtype in dict.fromkeys(key[1] for key in keys)}
    if of_kind(rows, "elements") and of_kind(rows, "tensors"):
        figures["growth"] = growth_curves(rows)
    if fixmatch_steps(rows):
        figures["step"] = step_bars(rows)
    paths = []
    for name, figure in figures.items():
        paths.append(stem.with_name(f"{stem.name}-{name}.png"))
        figure.savefig(paths[-1], dpi=110)
    return paths
