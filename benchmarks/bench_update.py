"""The teacher update by every method that this machine has, side by side: `make bench`.

timing.py says how a time is taken; `make report` measures everything, and draws it.
"""

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from growth import around_the_kernel
from models import DTYPES, MODELS, pair
from report import methods_for, only
from tables import title, update_table
from timing import machine, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["resnet50", "mobilenet_v3_large"], metavar="NAME",
                        help=f"{', '.join(MODELS)}, or one of torchvision's (default: %(default)s)")  # fmt: skip
    parser.add_argument("--method", nargs="+", metavar="PART", help="only methods with one of these in their name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", nargs="+", type=int, help="CPU threads (default: 1, then all)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"],
                        help="mixed: a float32 teacher of a bfloat16 student (default: float32)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=50, help="calls of each method (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row with the machine it is from")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not move")  # the tables say which teachers move
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA GPU here")
    all_threads = torch.get_num_threads()
    threads = arguments.threads or (sorted({1, all_threads}) if device.type == "cpu" else [all_threads])

    described = machine(device)
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    if device.type == "cpu":
        print("GPU: not measured here (--device cuda, where torch sees one)")
    rows = []
    for model in arguments.model:
        for dtype in arguments.dtype:
            methods = only(methods_for(device, dtype), arguments.method)
            for count in threads:
                measured = [
                    described | asdict(row) for row in measure(model, dtype, device, count, arguments.rounds, methods)
                ]
                rows += measured
                if arguments.json:  # as it goes: what comes later may fail
                    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
                print(f"\n### {title(model, dtype, count, measured)}\n\n{update_table(measured)}")
        around = around_the_kernel(*pair(model, "float32", device), arguments.rounds)
        print(
            f"{model}: update() apart from the kernel {around['host_warm_us']:.0f} us in a warm cache, "
            f"{around['host_cold_us']:.0f} us in a cold one; making the plan {around['plan_ms']:.1f} ms; "
            f"its table {around['table_bytes']:,} bytes"
        )
    if arguments.json:
        print(f"\nwritten: {arguments.json}")


if __name__ == "__main__":
    main()
