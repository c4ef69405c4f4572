"""The benchmark runs, refuses a speed for a wrong result, and counts what is claimed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch.utils._python_dispatch import TorchDispatchMode

from eman_kernels import EMANTeacher, available_backends

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import bench_update  # noqa: E402


class Count(TorchDispatchMode):
    """Operations that would each be a launch: views and allocations are none."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in ("detach", "alias", "empty", "view"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def resnet50_pair():
    return bench_update.models_of("resnet50", "float32", torch.device("cpu"))


def test_operations_a_step():
    teacher, student = resnet50_pair()
    with Count() as loop:
        bench_update.published_loop(teacher, student)()
    assert len(loop.names) == 4 * 267 + 53 == 1121
    ours = EMANTeacher(student)
    ours.update(student)
    with Count() as count:
        ours.update(student)
    expected = [] if available_backends()["cpu"] is None else ["_foreach_lerp_", "_foreach_copy_"]
    assert count.names == expected


def test_a_wrong_method_gets_no_figure(monkeypatch):
    def drifting(teacher, student):
        right = bench_update.lerp_loop(teacher, student)

        def update():
            right()
            teacher.fc.bias[3] *= 1.001

        return update

    def without_counters(teacher, student):
        right = bench_update.lerp_loop(teacher, student)

        def update():
            right()
            teacher.bn1.num_batches_tracked -= 1

        return update

    monkeypatch.setattr(
        bench_update,
        "methods",
        lambda device: {
            bench_update.LOOP: bench_update.published_loop,
            "drifting": drifting,
            "without counters": without_counters,
            "absent": "not here",
        },
    )
    rows = {row.method: row for row in bench_update.measure("resnet18", "float32", torch.device("cpu"), 1, 2)}
    assert rows["drifting"].why_not == "fc.bias is not what torch.lerp gives"
    assert rows["without counters"].why_not == "bn1.num_batches_tracked is not the student's"
    assert rows["absent"].why_not == "not here"
    assert all((rows[method].median_ms is None) == (rows[method].why_not is not None) for method in rows)
    assert "fc.bias is not" in bench_update.table(list(rows.values()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
def test_it_prints_the_table_and_writes_the_rows(tmp_path, dtype):
    file = tmp_path / "rows.json"
    command = [sys.executable, BENCHMARKS / "bench_update.py", "--model", "resnet18", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--threads", "1", "--dtype", dtype, "--rounds", "2", "--json", file], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "resnet18: update() apart from the kernel" in done.stdout
    assert "GPU: not measured here" in done.stdout
    rows = {row["method"]: row for row in json.loads(file.read_text())}
    elements = sum(
        tensor.numel() for tensor in torchvision.models.resnet18().state_dict().values() if tensor.is_floating_point()
    )
    for row in rows.values():
        assert row["elements"] == elements
        assert row["torch"] == torch.__version__
        assert (row["median_ms"] is None) == (row["why_not"] is not None)
    measured = {method for method, row in rows.items() if row["median_ms"]}
    assert measured >= {bench_update.LOOP, "lerp loop", "eman_kernels foreach", bench_update.LIMIT}
    if available_backends()["cpu"] is None:
        assert "eman_kernels cpu" in measured
    assert ("foreach, lists kept" in measured) == (dtype != "mixed")


def test_bad_arguments():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_update.py", "--rounds", "1"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--rounds must be at least 2" in done.stderr
