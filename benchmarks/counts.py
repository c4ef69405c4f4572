"""Measures without noise: operations, bytes and host syncs of a call, and instructions executed on the host.

valgrind's callgrind counts the instructions in a separate process, which runs `python counts.py`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eman_kernels.plan.chunks import COPY_CODES, PAIR_CODES
from eman_kernels.plan.plan import Plan

BYTES_OF_CODE = {code: 2 * t.itemsize + s.itemsize for (_, t, s), code in PAIR_CODES.items()}
BYTES_OF_CODE |= {code: 2 * size for size, code in COPY_CODES.items()}
SIZES = (100, 300)  # numbers of tensors for which instructions are counted


@dataclass
class Counts:
    operations: int  # each is at least one launch on a GPU
    gigabytes: float  # read and written
    syncs: int  # device synchronizations; on a CPU, those that would happen on a GPU


class Counting(TorchDispatchMode):
    """Counts dispatched operations that write a tensor; views and allocations do not count."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.names: list[str] = []
        self.bytes = 0
        self.syncs = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero"):
            self.syncs += args[0].device == self.device
            return result
        schema = function._schema
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | (kwargs or {})
        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        made = any(r.alias_info is None for r in schema.returns) and not name.startswith(("empty", "new_empty"))
        if (not written and not made) or name == "record_stream":
            return result
        self.names.append(name)
        for argument, value in given.items():
            only_written = argument in written and name.rstrip("_").endswith(("copy", "zero", "fill"))
            size = sum(tensor.nbytes for tensor in tree_leaves(value) if isinstance(tensor, Tensor))
            self.bytes += size * ((not only_written) + (argument in written))
        if made:
            self.bytes += sum(tensor.nbytes for tensor in tree_leaves(result) if isinstance(tensor, Tensor))
        return result


def bytes_moved_by(table: Tensor) -> int:
    """Bytes read and written by a run of this chunk table (format: csrc/chunk.h)."""
    packed = table[:, 3].cpu()
    numel, code = packed & 0xFFFFFFFF, packed >> 32 & 0xFFFF
    return sum(n * BYTES_OF_CODE[c] for n, c in zip(numel.tolist(), code.tolist(), strict=True))


def count_work(update, plan: Plan | None, device: torch.device) -> Counts:
    """Count the work of one call (not the first). One of our kernels is one operation; its table gives the bytes."""
    with Counting(device) as counted:
        update()
    tables = [work.table for backend, work in plan.works if backend.TAKES_TABLE] if plan else []
    size = counted.bytes + sum(map(bytes_moved_by, tables))
    return Counts(len(counted.names) + len(tables), size / 1e9, counted.syncs)


def count_launches(update) -> int:
    """Number of kernels and copies that a call launches on the GPU, according to torch's profiler."""
    activity = torch.profiler.ProfilerActivity
    # Without acc_events, some versions of torch warn that events are discarded.
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA], acc_events=True) as profiled:
        update()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


# ---------------------------------------------------------------- host instructions


def why_not_callgrind() -> str | None:
    """Return the reason why instructions cannot be counted on this machine, or None."""
    if not shutil.which("valgrind") or not shutil.which("vgdb"):
        return "valgrind is not installed"
    return None if torch._C._valgrind_supported_platform() else "torch was built without valgrind bindings"


def host_instructions(timeout: float = 600) -> dict[str, list[int]]:
    """Method -> instructions of one call on one thread, for each number of one-element tensors in SIZES."""
    with tempfile.TemporaryDirectory() as folder:
        out, go, log = Path(folder, "out"), Path(folder, "go"), Path(folder, "log")
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--collect-atstart=no"]
        command += [f"--callgrind-out-file={out}", sys.executable, __file__, str(go)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        with log.open("w") as stream:
            child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            # With instrumentation on from the start, importing torch would take minutes.
            wait_for(lambda: "ready" in log.read_text(), child, log, timeout)
            subprocess.run(["vgdb", f"--pid={child.pid}", "instrumentation", "on"], check=True, capture_output=True)
            go.touch()
            child.wait(timeout)
        finally:
            child.kill()
            child.wait()
        names = next(line for line in log.read_text().splitlines() if line.startswith("ready")).split("\t")[1:]
        totals = []
        for k in range(len(names) * len(SIZES)):
            lines = Path(f"{out}.{k + 1}").read_text().splitlines()
            totals.append(int(next(line for line in lines if line.startswith("totals:")).split()[1]))
    return {name: totals[k * len(SIZES) : (k + 1) * len(SIZES)] for k, name in enumerate(names)}


def wait_for(condition, child: subprocess.Popen, log: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if child.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"callgrind did not start: {log.read_text()[-500:]}")
        time.sleep(0.1)


@torch.no_grad()
def run_under_callgrind(go: Path) -> None:
    """Run in the process under callgrind: warm up, then count one call per method and size."""
    import updates

    made = {updates.LOOP: updates.published_loop, "foreach, lists kept": updates.foreach}
    ours = {n: how for n, how in updates.our_methods(torch.device("cpu")).items() if isinstance(how, updates.Method)}
    name = next(iter(ours))
    made[name] = ours[name].make
    updates = []
    for make in made.values():
        for size in SIZES:
            teacher, student = (nn.ParameterList(torch.zeros(1) for _ in range(size)) for _ in range(2))
            updates.append(make(teacher, student, 0.9).update)
    for update in updates * 32:  # until Python has specialized its bytecode
        update()
    print("ready", *made, sep="\t", flush=True)
    while not go.exists():
        time.sleep(0.05)
    for update in updates:
        update()
        torch._C._valgrind_toggle()
        update()
        torch._C._valgrind_toggle_and_dump_stats()


if __name__ == "__main__":
    run_under_callgrind(Path(sys.argv[1]))
