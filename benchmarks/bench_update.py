"""`make bench`: compare the teacher update across all methods that are available on this machine.

timing.py documents the timing method; `make report` measures everything and draws pictures.
"""

import argparse
import json
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from growth import measure_host_overhead
from models import DTYPES, MODELS, pair
from report import methods_for, select_methods
from tables import title, update_table
from timing import machine, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["resnet50", "mobilenet_v3_large"], metavar="NAME",
                        help=f"{', '.join(MODELS)}, or any torchvision model (default: %(default)s)")  # fmt: skip
    parser.add_argument("--method", nargs="+", metavar="PART", help="only methods whose name contains one of these")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", nargs="+", type=int, help="CPU threads (default: 1, then all)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"],
                        help="mixed: float32 teacher, bfloat16 student (default: float32)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=50, help="calls of each method (default: %(default)s)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all rows to FILE, each with the machine and versions"
    )
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*does not move")  # the tables show which teachers move
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2, for quartiles")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch does not see a CUDA GPU")
    all_threads = torch.get_num_threads()
    threads = arguments.threads or (sorted({1, all_threads}) if device.type == "cpu" else [all_threads])

    described = machine(device)
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    if device.type == "cpu":
        print("GPU: not measured (use --device cuda if torch sees a GPU)")
    rows = []
    for model in arguments.model:
        for dtype in arguments.dtype:
            methods = select_methods(methods_for(device, dtype), arguments.method)
            for count in threads:
                measured = [
                    described | asdict(row) for row in measure(model, dtype, device, count, arguments.rounds, methods)
                ]
                rows += measured
                if arguments.json:  # after each table, in case a later measurement fails
                    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
                print(f"\n### {title(model, dtype, count, measured)}\n\n{update_table(measured)}")
        overhead = measure_host_overhead(*pair(model, "float32", device), arguments.rounds)
        print(
            f"{model}: host overhead of update(): {overhead['host_warm_us']:.0f} us with a warm cache, "
            f"{overhead['host_cold_us']:.0f} us with a cold cache; building the plan: {overhead['plan_ms']:.1f} ms; "
            f"chunk table: {overhead['table_bytes']:,} bytes"
        )
    if arguments.json:
        print(f"\nwritten: {arguments.json}")


if __name__ == "__main__":
    main()
