"""Markdown tables of the rows, for bench_update.py, the report, docs/speed.md and the READMEs."""

from checks import EMAN, RULES
from tabulate import tabulate
from updates import COPY, GRAPH, LIMIT, LOOP, OURS

TOLERANCE = 1.10  # eman_kernels may be this much slower than a method that does less


def markdown(lines: list[list], headers: list[str]) -> str:
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True) + "\n"


def of_kind(rows: list[dict], kind: str) -> list[dict]:
    return [row for row in rows if row["kind"] == kind]


def groups(rows: list[dict]) -> dict[tuple[str, str, int], list[dict]]:
    """(model, dtype, threads) -> its rows, in the order of measurement."""
    found: dict[tuple[str, str, int], list[dict]] = {}
    for row in of_kind(rows, "update"):
        found.setdefault((row["model"], row["dtype"], row["threads"]), []).append(row)
    return found


def main_of_ours(rows: list[dict]) -> str:
    """The backend that `auto` selects: our first method that was measured."""
    return next(row["method"] for row in rows if row["method"].startswith(OURS) and row.get("median_ms"))


def keepers(rows: list[dict]) -> set[str]:
    """The methods observed to keep the EMAN rule, and their CUDA graph replays."""
    kept = {row["method"] for row in of_kind(rows, "rules") if all(row["rules"][rule] == "yes" for rule in EMAN)}
    return kept | {method + GRAPH for method in kept}


def update_table(rows: list[dict]) -> str:
    """The table of one model, dtype and number of threads."""
    loop = next((row.get("median_ms") for row in rows if row["method"] == LOOP), None)
    on_host = any(row.get("host_ms") for row in rows)
    lines, missing = [], notes(rows)
    for row in rows:
        ms = row.get("median_ms")
        if ms is None:
            missing.append(f"\n- {row['method']}: {row['why_not']}")
            continue
        gigabytes, counted = row.get("gigabytes"), row.get("operations")
        lines.append(
            [
                row["method"],
                f"{ms:.3f}",
                f"{row['q1_ms']:.3f} ... {row['q3_ms']:.3f}",
                f"{row['x_limit']:.2f}",
                f"{row['x_limit_q1']:.2f} ... {row['x_limit_q3']:.2f}",
                f"{loop / ms:.1f}" if loop else "",
                f"{1e3 * gigabytes / ms:.1f}" if gigabytes else "",
                f"{1e9 * gigabytes / row['elements']:.1f}" if gigabytes else "",
                f"{counted:,}" if counted is not None else "",
                row["syncs"] if row.get("syncs") is not None else "",
                row.get("lacks", ""),
                *([f"{row['host_ms']:.3f}"] if on_host else []),
            ]
        )
    headers = ["method", "ms", "quartiles", "x limit", "quartiles", "speedup over the loop", "GB/s", "B/element"]
    headers += ["operations", "host syncs", "not done"] + ["host ms"] * on_host
    return markdown(lines, headers) + "".join(missing) + "\n" * bool(missing)


def notes(rows: list[dict]) -> list[str]:
    """Remarks on the times, as lines below the table."""
    return [f"\n- {row['method']}: {row['note']}" for row in rows if row.get("note")]


def on_threads(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


def title(model: str, dtype: str, threads: int, rows: list[dict]) -> str:
    device = rows[0].get("device", "cpu")
    where = on_threads(threads) if device == "cpu" else device
    return f"{model}, {dtype}, {rows[0]['elements']:,} elements in {rows[0]['tensors']} tensors, {where}"


def rules_table(rows: list[dict]) -> str:
    """Which method keeps which rule. Error messages are below the table, where they do not widen a column."""
    lines, raised = [], []
    for row in of_kind(rows, "rules"):
        lines.append([row["method"], *("no: raises" if "raises" in (a := row["rules"][r]) else a for r in RULES)])
        messages = {answer for answer in row["rules"].values() if "raises" in answer}
        raised += [f"\n- {row['method']} {message}" for message in sorted(messages)]
    return markdown(lines, ["method", *RULES]) + "".join(raised) + "\n" * bool(raised)


def duration(ms: float) -> str:
    return f"{ms:.2f} ms" if ms >= 0.1 else f"{1e3 * ms:.1f} us"


def summary(rows: list[dict], dtype: str, only: list[str] | None = None) -> str:
    """Multiple of the limit and duration by method (all, or `only` these) and model, with the most threads measured."""
    threads = max(key[2] for key in groups(rows))
    chosen = {key[0]: found for key, found in groups(rows).items() if key[1:] == (dtype, threads)}
    kept = keepers(rows)
    measured = list(dict.fromkeys(row["method"] for found in chosen.values() for row in found if row.get("median_ms")))
    lines = []
    for method in filter(measured.__contains__, only or measured):
        cells = []
        for found in chosen.values():
            row = next(row for row in found if row["method"] == method)
            cells.append(f"{row['x_limit']:.2f}, {duration(row['median_ms'])}" if row.get("median_ms") else "none")
        name = f"**{method}**" if method.startswith(OURS) else method
        lines.append([name, "" if method in (LIMIT, COPY) else "yes" if method in kept else "no", *cells])
    return markdown(lines, ["method", "keeps the EMAN rule", *chosen])


def summary_methods(rows: list[dict]) -> list[str]:
    """The methods for a summary: handwritten, the fastest library that keeps the rule, ours, and the limit."""
    return [LOOP, "foreach, lists kept", "timm ModelEmaV3", main_of_ours(of_kind(rows, "update")), LIMIT]


def by_size(rows: list[dict], kind: str) -> dict[int, dict[str, dict]]:
    """Size -> method -> row, for one growth curve."""
    found: dict[int, dict[str, dict]] = {}
    for row in of_kind(rows, kind):
        found.setdefault(row["size"], {})[row["method"]] = row
    return found


def growth_table(rows: list[dict], kind: str) -> str:
    points = by_size(rows, kind)
    methods = list(dict.fromkeys(row["method"] for row in of_kind(rows, kind) if row.get("median_ms")))
    lines, missing = [], []
    for size, at in points.items():
        if not at[LIMIT].get("median_ms"):
            missing.append(f"\n- {size:,} {kind}: {at[LIMIT]['why_not']}")
            continue
        mine = next((row for name, row in at.items() if name.startswith(OURS) and row.get("host_warm_us")), None)
        cells = [f"{at[method]['median_ms']:.3f}" if at.get(method, {}).get("median_ms") else "" for method in methods]
        missing += [f"\n- {size:,} {kind}, {note[3:]}" for note in notes(list(at.values()))]
        around = 4 * [""]
        if mine is not None:
            around = [f"{mine['host_warm_us']:.0f}", f"{mine['host_cold_us']:.0f}", f"{mine['plan_ms']:.1f}"]
            around.append(f"{mine['table_bytes']:,}")
        lines.append([f"{size:,}", *cells, *around])
    headers = [kind, *(f"{method}, ms" for method in methods)]
    headers += ["host overhead warm, us", "host overhead cold, us", "building the plan, ms", "chunk table, bytes"]
    return markdown(lines, headers) + "".join(missing) + "\n" * bool(missing)


def embed(page: str, by: str, new: str) -> str:
    """Replace the section of the page between the two comments that name `by` as its writer."""
    begin, end = f"<!-- written by {by} -->\n", f"<!-- end of {by} -->\n"
    before, rest = page.split(begin)
    return before + begin + new + end + rest.split(end)[1]


def step_table(rows: list[dict]) -> str:
    found = [row for row in of_kind(rows, "step") if not row.get("why_not")]
    on_host = any(row.get("host_step_ms") for row in found)  # on a GPU, where two networks are trained
    lines = []
    for row in found:
        update = f"{row['median_ms']:.2f} ({row['q1_ms']:.2f} ... {row['q3_ms']:.2f})"
        share = f"{row['median_percent']:.2f} % ({row['q1_percent']:.2f} ... {row['q3_percent']:.2f})"
        lines.append([row["method"], f"{row['step_ms']:.0f}", update, share])
        if on_host:
            lines[-1] = [f"{row['model']}, {row['dtype']}", *lines[-1]]
            lines[-1] += [f"{row['host_step_ms']:.1f}", f"{row['host_update_ms']:.2f}"]
    headers = ["update by", "step, ms", "update, ms (quartiles)", "share of the step (quartiles)"]
    return markdown(lines, ["step of", *headers, "host, step, ms", "host, update, ms"] if on_host else headers)


def timed(row: dict) -> str:
    return f"{duration(row['median_ms'])} ({duration(row['q1_ms'])} ... {duration(row['q3_ms'])})"


def modes_table(rows: list[dict]) -> str:
    """The general kernels: the time over that in which one flat copy moves as many bytes, and the time."""
    lines, missing = [], []
    for row in of_kind(rows, "mode"):
        if row.get("why_not"):
            missing.append(f"\n- {row['model']}, {row['mode']}, {row['method']}: {row['why_not']}")
            continue
        chunk = f"{row['chunk_bytes'] // 1024} KB" if row.get("chunk_bytes") else ""
        per_copy = f"{row['x_copy']:.2f} ({row['x_copy_q1']:.2f} ... {row['x_copy_q3']:.2f})"
        moved = f"{1e3 * row['gigabytes'] / row['median_ms']:,.0f}"
        lines.append([row["model"], row["mode"], row["method"], chunk, per_copy, timed(row), moved])
    headers = [
        "model",
        "mode",
        "method",
        "full chunk",
        "x copy of as many bytes (quartiles)",
        "time (quartiles)",
        "GB/s",
    ]
    return markdown(lines, headers) + "".join(missing) + "\n" * bool(missing)


def host_table(rows: list[dict]) -> str:
    """The host's time of an update, without the kernel, and of building its plan."""
    names = ("host_warm_us", "host_cold_us", "teacher_warm_us", "teacher_cold_us")
    lines = [
        [row["model"], *(f"{row[name]:.0f}" for name in names), f"{row['plan_ms']:.1f}"]
        for row in of_kind(rows, "host")
    ]
    update = ["eman_update_, warm, us", "cold, us", "EMANTeacher.update, warm, us", "cold, us"]
    return markdown(lines, ["model", *update, "building the plan, ms"])


def cpu_teacher_table(rows: list[dict]) -> str:
    lines = [[row["model"], row["method"], timed(row)] for row in of_kind(rows, "cpu teacher")]
    return markdown(lines, ["model", "method", "time (quartiles)"])


def instructions_table(rows: list[dict]) -> str:
    """Instructions per tensor and per call: the line through the two measured sizes."""
    lines = []
    for row in of_kind(rows, "instructions"):
        if row.get("why_not"):
            return f"Not counted: {row['why_not']}.\n"
        (few, many), (low, high) = row["sizes"], row["instructions"]
        each = (high - low) / (many - few)
        lines.append([row["method"], f"{each:,.0f}", f"{low - each * few:,.0f}"])
    return markdown(lines, ["method", "instructions per tensor", "instructions per call"])


def verdicts(rows: list[dict]) -> str:
    """Whether eman_kernels meets its goals, with each exception."""
    kept = keepers(rows)
    behind, far, slower = [], [], []
    for (model, dtype, threads), found in groups(rows).items():
        timed = {row["method"]: row for row in found if row.get("median_ms")}
        if not any(method.startswith(OURS) for method in timed):
            continue
        mine = timed[main_of_ours(found)]
        where = f"{model}, {dtype}" + (f", {on_threads(threads)}" if mine.get("device", "cpu") == "cpu" else "")
        for method, row in timed.items():
            if method in (LIMIT, COPY) or method.startswith(OURS):
                continue
            # Compare graph replays with our graph replay: neither includes host work.
            same_way = timed.get(mine["method"] + GRAPH) if method.endswith(GRAPH) else mine
            if same_way is None:
                continue
            ratio = same_way["x_limit"] / row["x_limit"]
            if method in kept and ratio > 1:
                behind.append(f"{where}: {ratio:.2f} times the time of {method}")
            if method not in kept and ratio > TOLERANCE:
                slower.append(f"{where}: {ratio:.2f} times the time of {method}")
        if mine["elements"] > 5_000_000 and mine["x_limit"] > 1.15:
            far.append(f"{where}: {mine['x_limit']:.2f} ({mine['x_limit_q1']:.2f} ... {mine['x_limit_q3']:.2f})")
    claims = {
        "Fastest of all methods that keep the EMAN rule, for every model and dtype": behind,
        "Within 1.15 times the limit for models with over 5 M elements": far,
        "Never more than 10 % slower than a method that does less": slower,
    }
    parts = []
    for claim, exceptions in claims.items():
        parts.append(f"- {claim}: {'not met for:' if exceptions else 'met.'}")
        parts += [f"  - {exception}" for exception in exceptions]
    return "\n".join(parts) + "\n"
