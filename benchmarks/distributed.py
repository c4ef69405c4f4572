"""An update on 1, 2 and 4 shards: time, operations, collectives and bytes per step and process.

Uses gloo on the CPU; writes results/distributed.json and .md. The estimates below the table are not measured.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from tables import markdown
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from eman_kernels import EMANTeacher, plan_for

RESULTS = Path(__file__).parent / "results"
SIZES = (1, 2, 4)
WIDTH, LAYERS = 1024, 8
ROUNDS, WARM_UP = 30, 5


class Dispatched(TorchDispatchMode):
    """Counts torch operations that write a tensor. Passes of eman_kernels are not dispatched; the plan counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.is_mutable
        return function(*args, **kwargs or {})


def network() -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(LAYERS)]
    return nn.Sequential(*blocks)


def measure(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = f"file://{folder}/store-{size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
    rows = []
    for sync in ("none", "mean"):
        student, other = (fully_shard(network(), mesh=mesh) for _ in range(2))
        teacher = EMANTeacher(student, 0.999, module=other, sync_buffers=sync)
        for _ in range(WARM_UP):
            teacher.update(student)
        with CommDebugMode() as collectives:
            teacher.update()
        with Dispatched() as dispatched:
            teacher.update()
        times = []
        for _ in range(ROUNDS):
            dist.barrier()
            start = time.perf_counter()
            teacher.update()
            times.append(time.perf_counter() - start)
        every = [None] * size
        dist.all_gather_object(every, times)
        slowest = [max(of) for of in zip(*every, strict=True)]  # a step takes as long as its slowest process
        plan = plan_for(teacher.module, student)
        local = [t._local_tensor if isinstance(t, DTensor) else t for t in [*other.parameters(), *other.buffers()]]
        floats = [t for t in local if t.is_floating_point()]
        reduced = sum(b.numel() * b.element_size() for b in other.buffers() if b.is_floating_point())
        rows.append(
            {
                "shards": size,
                "sync_buffers": sync,
                "ms": statistics.median(slowest) * 1e3,
                "quartiles": [q * 1e3 for q in statistics.quantiles(slowest, n=4)[::2]],
                "passes": len(plan.works),
                "operations": dispatched.count,
                "collectives": collectives.get_total_counts(),
                "bytes": sum(3 * t.numel() * t.element_size() for t in floats),
                "bytes_reduced": reduced if sync != "none" and size > 1 else 0,
            }
        )
    if rank == 0:
        Path(folder, f"{size}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def table(rows: list[dict]) -> str:
    one = {row["sync_buffers"]: row["ms"] for row in rows if row["shards"] == 1}
    lines = [
        [
            row["shards"],
            row["sync_buffers"],
            f"{row['ms'] / one[row['sync_buffers']]:.2f}",
            f"{row['ms']:.2f} ({row['quartiles'][0]:.2f} ... {row['quartiles'][1]:.2f})",
            row["passes"],
            row["operations"],
            row["collectives"],
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['bytes_reduced'] / 1e3:.0f}",
        ]
        for row in rows
    ]
    heads = [
        "shards",
        "sync_buffers",
        "relative to 1 shard",
        "ms (quartiles)",
        "eman_kernels passes",
        "torch operations",
        "collectives",
        "MB per process",
        "kB reduced",
    ]
    return markdown(lines, heads)


def estimate(parameters: float = 7e9, gpus: int = 256, gb_s: float = 3350, share: float = 0.8) -> str:
    """An estimate; none of these figures is measured."""
    each = parameters / gpus
    moved, kept = 12 * each, 4 * each
    update = moved / (share * gb_s * 1e9)
    whole = moved * gpus / (share * gb_s * 1e9)
    written = 4 * parameters
    lines = [
        f"**Estimate, not measured**: float32 teacher and student, "
        f"{parameters / 1e9:.0f} B parameters sharded over "
        f"{gpus} GPUs with {gb_s / 1e3:.2f} TB/s each (H100 datasheet), of which an update is assumed "
        f"to reach {share:.0%}.",
        "",
        f"- Each GPU holds {each / 1e6:.1f} M elements of the teacher: {kept / 1e6:.0f} MB.",
        f"- An update reads teacher and student and writes the teacher, 12 bytes per element: "
        f"{moved / 1e6:.0f} MB per GPU, "
        f"{moved / 1e6:.0f} MB / ({share} x {gb_s / 1e3:.2f} TB/s) = {update * 1e6:.0f} us. "
        f"The GPUs do not communicate. With a bf16 student it is 10 bytes per element: {10 * each / 1e6:.0f} MB.",
        f"- A full teacher per GPU would need {written / 1e9:.0f} GB of memory and {whole * 1e3:.0f} ms per update. "
        f"Gathering it for an update would send {written / 1e9:.0f} GB over the network in each step.",
        f"- A checkpoint of the teacher has 4 bytes per parameter: {written / 1e9:.0f} GB, "
        f"{kept / 1e6:.0f} MB from each GPU. "
        f"Copying that to the host over a PCIe link of 25 GB/s takes {kept / 25e9 * 1e3:.1f} ms; writing all of it to "
        f"a file system with 10 GB/s in total takes {written / 10e9:.1f} s.",
    ]
    return "\n".join(lines) + "\n"


def page(about: dict, rows: list[dict]) -> str:
    return (
        f"{LAYERS} linear layers of {WIDTH} x {WIDTH} with BatchNorm, float32, FSDP2 on gloo, one thread per process, "
        f"{about['cpus']} CPUs in total, torch {about['torch']}, {about['date']}. Time of the slowest process after a "
        f"barrier, median of {ROUNDS} rounds. All shards share the CPUs and their memory, so the table shows the work "
        "per process, not scaling.\n\n"
        f"{table(rows)}\n{estimate()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="output folder")
    args = parser.parse_args()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            torch.multiprocessing.spawn(measure, (size, folder), nprocs=size)
            rows += json.loads(Path(folder, f"{size}.json").read_text())
    about = {
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "distributed.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    text = page(about, rows)
    (args.out / "distributed.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
