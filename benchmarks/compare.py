"""Compare two result files. Exit status 1 if eman_kernels got slower than the tolerance allows, or does more work.

The criterion is the multiple of the limit, because the limit is measured in the same rounds and a slower machine slows
both. The ratio of the times is shown as well.
"""

import argparse
import json
import sys
from pathlib import Path

from tables import markdown
from updates import OURS

KEY = ("kind", "model", "dtype", "threads", "size", "method")
COUNTED = ("operations", "syncs", "gigabytes", "table_bytes")


def load_rows(file: Path) -> dict[tuple, dict]:
    return {tuple(row.get(name) for name in KEY): row for row in json.loads(file.read_text())}


def compare(old: dict[tuple, dict], new: dict[tuple, dict], tolerance: float) -> tuple[list[list[str]], list[str]]:
    """Return the rows of the table, and the regressions of eman_kernels."""
    lines, worse = [], []
    for key, before in old.items():
        mine = str(key[-1]).startswith(OURS)
        after = new.get(key)
        if after is None or not before.get("x_limit"):
            continue
        name = ", ".join(str(part) for part in key if part is not None)
        if not after.get("x_limit"):
            if mine:
                worse.append(f"{name}: no longer measured: {after.get('why_not')}")
            continue
        times, ratio = after["median_ms"] / before["median_ms"], after["x_limit"] / before["x_limit"]
        cells = [f"{row['median_ms']:.3f} ({row['q1_ms']:.3f} ... {row['q3_ms']:.3f})" for row in (before, after)]
        lines.append([name, *cells, f"{times:.2f}", f"{ratio:.2f}"])
        if mine and ratio > tolerance:
            worse.append(f"{name}: {before['x_limit']:.2f} x limit, now {after['x_limit']:.2f}")
        for count in COUNTED:
            if mine and count in before and after.get(count, 0) > before[count] * (1 + 1e-9):
                worse.append(f"{name}: {count} {before[count]:g}, now {after[count]:g}")
    return lines, worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1.10,
        help="allowed ratio of the multiples of the limit (default: %(default)s)",
    )
    arguments = parser.parse_args()
    old, new = load_rows(arguments.old), load_rows(arguments.new)
    lines, worse = compare(old, new, arguments.tolerance)
    if not lines:
        parser.error("the two files have no measurements in common")
    for name, rows in (("old", old), ("new", new)):
        row = next(iter(rows.values()))
        print(f"{name}: {row['device']}, torch {row['torch']}, {row['date']}, commit {row.get('commit')}")
    print(
        f"\n{markdown(lines, ['', 'old ms (quartiles)', 'new ms (quartiles)', 'ratio of times', 'ratio of x limit'])}"
    )
    print(
        "\n".join(
            ["regressions:", *worse] if worse else [f"no regression of eman_kernels beyond {arguments.tolerance}"]
        )
    )
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
