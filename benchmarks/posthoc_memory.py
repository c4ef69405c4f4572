"""Snapshots and synthesis of a network of 1 GB: how long the training waits, peak memory, and time per snapshot.

Writes results/posthoc-memory.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from tables import markdown
from timing import machine
from torch import nn

from eman_kernels import EMANTeachers, Snapshots, schedules, synthesize


class PeakMemory:
    """The largest growth of this process's resident memory within the context, in MB: anonymous, and with files."""

    def __enter__(self) -> "PeakMemory":
        self.anonymous = self.all = 0.0
        self._before = self._read()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            anonymous, every = (now - before for now, before in zip(self._read(), self._before, strict=True))
            self.anonymous, self.all = max(self.anonymous, anonymous), max(self.all, every)

    @staticmethod
    def _read() -> tuple[float, float]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return tuple(int(lines[key].split()[0]) / 1024 for key in ("RssAnon", "VmRSS"))


def measure_storing(folder: Path, layers: int, width: int, stored: int) -> list[list[str]]:
    student = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    size = sum(parameter.numel() for parameter in student.parameters()) * 4 / 1e6
    teachers = EMANTeachers(student, [schedules.PowerFunction(0.05), schedules.PowerFunction(0.10)])
    snapshots = Snapshots(teachers, folder, every=1)
    waits, cpu, writes = [], [], []
    for _ in range(stored):
        teachers.update(student)
        begin, begin_cpu = time.perf_counter(), time.thread_time()
        snapshots.store_if_due()
        waits.append(time.perf_counter() - begin)
        cpu.append(time.thread_time() - begin_cpu)
        begin = time.perf_counter()
        snapshots.wait()
        writes.append(time.perf_counter() - begin)
    return [
        ["network, float32", f"{size:,.0f} MB"],
        ["a snapshot of two averages: the training waits", f"{min(waits):.2f} s ({min(cpu):.2f} s of CPU time)"],
        ["a snapshot of two averages: another thread writes", f"{min(writes):.2f} s"],
    ]


def measure_synthesis(folder: Path, lengths: list[float]) -> dict[str, float]:
    with PeakMemory() as peak:
        begin, begin_cpu = time.perf_counter(), time.thread_time()
        averages = synthesize(folder, lengths)
        seconds, cpu = time.perf_counter() - begin, time.thread_time() - begin_cpu
    result = sum(tensor.numel() * tensor.element_size() for average in averages for tensor in average.values()) / 1e6
    files = len(list(folder.iterdir()))
    return {"result": result, "anonymous": peak.anonymous, "all": peak.all, "s": seconds / files, "cpu": cpu / files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=5793, help="of 8 linear layers (default: %(default)s, 1 GB)")
    parser.add_argument("--snapshots", type=int, default=3, help="default: %(default)s")
    default = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=default, metavar="FOLDER", help="default: benchmarks/results")
    parser.add_argument("--synthesize", nargs="+", help=argparse.SUPPRESS)  # in a process of its own
    arguments = parser.parse_args()
    if arguments.synthesize:
        folder, *lengths = arguments.synthesize
        print(json.dumps(measure_synthesis(Path(folder), [float(length) for length in lengths])))
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = measure_storing(Path(folder), 8, arguments.width, arguments.snapshots)
        for lengths in (["0.1"], ["0.05", "0.07", "0.1"]):
            command = [sys.executable, __file__, "--synthesize", folder, *lengths]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            what = f"synthesis of {len(lengths)}" if len(lengths) > 1 else "synthesis"
            lines += [
                [f"{what}: results", f"{found['result']:,.0f} MB"],
                [f"{what}: peak memory", f"{found['anonymous']:,.0f} MB, {found['all']:,.0f} MB with the mapped file"],
                [f"{what}: time per file", f"{found['s']:.2f} s ({found['cpu']:.2f} s of CPU time)"],
            ]
    described = machine(torch.device("cpu"))
    threads = torch.get_num_threads()
    head = f"{described['cpu']}, {threads} threads, torch {described['torch']}, {described['date']}; smallest times"
    text = f"# Snapshots and synthesis of a network of 1 GB\n\n{head}.\n\n{markdown(lines, ['', ''])}"
    (arguments.out / "posthoc-memory.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
