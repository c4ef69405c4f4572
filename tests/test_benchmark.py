"""The benchmarks time only correct methods, detect what each library does, and count work correctly."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from eman_kernels import EMANTeacher, available_backends, plan_for
from eman_kernels import __main__ as command

REMEDY = "pip install '.[bench]'"
for package in ("tabulate", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is not installed: {REMEDY}")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import adapters  # noqa: E402
import checks  # noqa: E402
import compare  # noqa: E402
import counts  # noqa: E402
import general  # noqa: E402
import gpu  # noqa: E402
import models  # noqa: E402
import parts  # noqa: E402
import peers  # noqa: E402
import step  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402
import updates  # noqa: E402

# The benchmarks measure rounding to nearest at 0.999, whether or not the teacher moves.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not move")
CPU = torch.device("cpu")
OURS = "eman_kernels cpu" if available_backends()["cpu"] is None else "eman_kernels foreach"
pair = functools.cache(models.pair)  # for tests that do not depend on the values
needs_the_kernel = pytest.mark.skipif(OURS != "eman_kernels cpu", reason=f"{available_backends()['cpu']}")


# ---------------------------------------------------------------- counts, which have no noise


@pytest.mark.parametrize(
    ("make", "dtype", "operations", "each"),
    [  # ResNet-50: 161 parameters and 106 float buffers are averaged, 53 counters are copied
        (updates.published_loop, "float32", 4 * 267 + 53, 9 * 4),  # two products, a sum, a copy
        (updates.lerp_loop, "float32", 320, 3 * 4),
        (updates.lerp_loop, "mixed", 320 + 267, 2 + 4 + 3 * 4),  # plus a cast of each student tensor
        (updates.foreach, "float32", 2, 3 * 4),
        pytest.param(updates.ours("cpu"), "float32", 1, 3 * 4, marks=needs_the_kernel),
        pytest.param(updates.ours("cpu"), "mixed", 1, 2 + 2 * 4, marks=needs_the_kernel),
        pytest.param(updates.ours("cpu"), "bfloat16", 1, 3 * 2, marks=needs_the_kernel),
    ],
)
@torch.no_grad()
def test_operations_and_bytes_of_a_call(make, dtype, operations, each):
    teacher, student = pair("resnet50", dtype, CPU)
    following = make(teacher, student, 0.999)
    following.update()
    counted = counts.count_work(following.update, following.plan(), torch.device("cpu"))
    counters = 53 * 2 * 8
    assert counted.operations == operations
    assert round(1e9 * counted.gigabytes) == each * (25_557_032 + 2 * 26_560) + counters
    assert counted.syncs == 0


@torch.no_grad()
def test_device_synchronizations_are_counted():
    there = torch.ones(3)
    assert counts.count_work(lambda: there.sum().item(), None, torch.device("cpu")).syncs == 1
    assert counts.count_work(lambda: there.sum().item(), None, torch.device("cuda", 0)).syncs == 0


def slices(tensors):
    return models.Slices(10 * tensors, tensors, CPU), models.Slices(10 * tensors, tensors, CPU)


def python_work(update):
    """Number of Python calls and bytecode instructions executed by one update."""

    def trace(frame, event, argument):
        frame.f_trace_opcodes = True
        seen[event] += 1
        return trace

    before = sys.gettrace()
    # Python 3.12 traces opcodes only after a frame has requested it once.
    for each in (lambda: None, update):
        seen = dict.fromkeys(("call", "opcode", "line", "return", "exception"), 0)
        sys.settrace(trace)
        try:
            each()
        finally:
            sys.settrace(before)
    return seen["call"], seen["opcode"]


@needs_the_kernel
@torch.no_grad()
def test_python_does_the_same_work_for_any_number_of_tensors():
    work = []
    for make in (updates.ours("cpu"), updates.published_loop):
        for tensors in (100, 300):
            update = make(*slices(tensors), 0.9).update
            update(), update()
            work.append(python_work(update))
    assert work[0] == work[1]
    assert work[0][0] <= 40
    assert work[0][1] <= 750
    assert work[3][1] > 2 * work[2][1], "the measurement does not detect a loop"


@pytest.mark.slow
@needs_the_kernel
def test_host_instructions():
    if reason := counts.why_not_callgrind():
        pytest.skip(reason)
    each = {}
    for method, (few, many) in counts.host_instructions().items():
        each[method] = (many - few) / (counts.SIZES[1] - counts.SIZES[0])
    # About 700 per tensor on Python 3.11, including the kernel, and 990 if the guards call torch for each of them: then
    # they have not found the fields of this torch. The loop executes 66,000.
    assert each[OURS] < 780
    assert each[updates.LOOP] > 10 * each[OURS]


# ---------------------------------------------------------------- correctness of the methods


def tiny_pair():
    torch.manual_seed(0)
    teacher = checks.Tiny(8).requires_grad_(False)
    return teacher, models.student_of(teacher)


LIBRARIES = peers.peers("bfloat16") | adapters.adapters()


@pytest.mark.filterwarnings("ignore")  # warnings of the libraries
@pytest.mark.parametrize("name", [name for name in LIBRARIES if "apex" not in name])
@torch.no_grad()
def test_a_library_does_exactly_what_it_claims(name):
    method = LIBRARIES[name]
    teacher, student = tiny_pair()
    begin = {key: tensor.double().clone() for key, tensor in models.tensors_of(teacher).items()}
    try:
        following = method.make(teacher, student, 0.9)
    except ImportError as error:
        pytest.skip(f"{error}: {REMEDY}")
    for key, tensor in following.teacher.items():
        assert torch.equal(tensor.double(), begin[key]), f"{key} has changed"
    following.update()
    goal = {key: tensor.double() for key, tensor in models.tensors_of(student).items()}
    for key in ("first.bias", "norm.weight", "norm.running_mean", "norm.running_var"):
        if key.startswith("norm.running") and "float buffers" not in method.claims:
            continue
        expected = 0.9 * begin[key] + 0.1 * goal[key]
        torch.testing.assert_close(following.teacher[key].double(), expected, rtol=1e-5, atol=1e-6, msg=key)
    counter = following.teacher.get("norm.num_batches_tracked", torch.tensor(0))
    assert (counter == 900) == ("counters" in method.claims)


SPOILED = {
    "float buffers averaged": "norm.running_var",
    "counters copied": "norm.num_batches_tracked",
    "non-persistent buffers": "scale",
    "tied weights once": "tied.weight",
}


@pytest.mark.parametrize("rule", checks.RULES[:5])
@torch.no_grad()
def test_only_the_broken_rule_is_reported(rule):
    def make(teacher, student, momentum):
        right = updates.ours("reference")(teacher, student, momentum)

        def update():
            if rule not in SPOILED and student.first.weight.dtype != teacher.first.weight.dtype:
                raise RuntimeError("expected one dtype\nmore text")
            before = {name: tensor.clone() for name, tensor in right.teacher.items()}
            right.update()
            if rule == "tied weights once":
                teacher.first.weight.lerp_(student.first.weight.to(teacher.first.weight.dtype), 1.0 - momentum)
            elif rule in SPOILED:
                right.teacher[SPOILED[rule]].copy_(before[SPOILED[rule]])

        return right._replace(update=update)

    kept = dict.fromkeys(checks.RULES, "yes") | {"bf16 teacher moves": "no"}
    kept[rule] = "no" if rule in SPOILED else "raises: expected one dtype"
    assert checks.check_rules(updates.Method(make), CPU) == kept


@torch.no_grad()
def test_a_moving_bf16_teacher_is_recognized():
    def make(teacher, student, momentum):
        def update():
            # Stochastic rounding: between 1 and 2 an ulp is 2 ** -7.
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.copy_(torch.lerp(t.float(), s.float(), 1 - momentum) + (torch.rand(t.shape) - 0.5) * 2**-7)

        return updates.Following(update, models.tensors_of(teacher))

    assert checks.check_rules(updates.Method(make), CPU)["bf16 teacher moves"] == "yes"


@torch.no_grad()
def test_rules_kept_by_eman_kernels_and_by_the_published_loop():
    kept = dict.fromkeys(checks.RULES, "yes") | {"bf16 teacher moves": "no"}
    assert checks.check_rules(updates.Method(updates.ours("reference")), CPU) == kept
    kept |= {"tied weights once": "no", "non-persistent buffers": "no"}
    assert checks.check_rules(updates.Method(updates.published_loop), CPU) == kept
    raised = checks.check_rules(updates.Method(updates.foreach), CPU)["fp32 teacher of a bf16 student"]
    assert raised.startswith("raises: ")


def idle(teacher, student, momentum):
    return updates.Following(lambda: None, models.tensors_of(teacher))


@torch.no_grad()
def test_a_method_that_does_nothing_keeps_no_rule():
    assert checks.check_rules(updates.Method(idle), CPU) == dict.fromkeys(checks.RULES, "no")


def small_network():
    layers = {"conv1": nn.Conv2d(3, 4, 3), "bn1": nn.BatchNorm2d(4), "fc": nn.Linear(4, 10)}
    return nn.Sequential(OrderedDict(layers))


def test_a_wrong_method_is_not_timed(monkeypatch):
    monkeypatch.setitem(models.MODELS, "small", small_network)
    monkeypatch.setattr(timing, "CACHE_BYTES", 1 << 20)
    threads = torch.get_num_threads()

    def drifting(teacher, student, momentum):
        right = updates.lerp_loop(teacher, student, momentum)

        def update():
            right.update()
            teacher.fc.bias[3] *= 1.02

        return right._replace(update=update)

    def without_counters(teacher, student, momentum):
        right = updates.lerp_loop(teacher, student, momentum)

        def update():
            right.update()
            teacher.bn1.num_batches_tracked -= 1

        return right._replace(update=update)

    def forgetful(teacher, student, momentum):
        right = updates.lerp_loop(teacher, student, momentum)

        def update():
            teacher.fc.bias *= 0.9
            right.update()

        return right._replace(update=update)

    def not_installed(teacher, student, momentum):
        raise ImportError("No module named 'x'")

    given = {
        updates.LOOP: updates.Method(updates.published_loop),
        "drifting": updates.Method(drifting, exact=True),
        "without counters": updates.Method(without_counters),
        "claims no counters": updates.Method(without_counters, ("parameters", "float buffers")),
        "forgetful": updates.Method(forgetful),
        "idle": updates.Method(idle),
        "not installed": updates.Method(not_installed),
        "absent": "not available",
    }
    for dtype in ("float32", "bfloat16"):
        rows = {row.method: row for row in timing.measure("small", dtype, CPU, threads, 2, given)}
        assert rows["drifting"].why_not == "fc.bias differs from torch.lerp's result"
        assert rows["without counters"].why_not == "bn1.num_batches_tracked differs from the student's"
        assert rows["forgetful"].why_not == "fc.bias differs from torch.lerp's result"
        assert rows["idle"].why_not == "conv1.weight differs from torch.lerp's result"
        assert rows["not installed"].why_not == "ImportError: No module named 'x'"
        assert rows["absent"].why_not == "not available"
        assert rows["claims no counters"].lacks == "counters"
        assert all((row.median_ms is None) == (row.why_not is not None) for row in rows.values())
        assert {method for method, row in rows.items() if row.median_ms} == {
            updates.LOOP, "claims no counters", updates.LIMIT, updates.COPY
        }  # fmt: skip
        assert "fc.bias differs" in tables.update_table(list(map(asdict, rows.values())))


def test_the_sizes_of_the_networks():
    wide = models.wide_resnet28_2()
    assert sum(tensor.numel() for tensor in wide.parameters()) == 1_467_610, "FixMatch's network for ten classes"
    assert wide(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert all(tensor.numel() % 2 for tensor in models.odd_sizes().parameters())


# ---------------------------------------------------------------- the commands


def run_main(monkeypatch, script, *arguments):
    """Call main() of a benchmark script in this process, with these command-line arguments."""
    module = pytest.importorskip(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        return module.main()
    finally:
        torch.set_num_threads(threads)


def test_bench_update_prints_a_table_and_writes_the_rows(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.json"
    chosen = ["--model", "wide_resnet28_2", "--device", "cpu", "--threads", "1", "--rounds", "2"]
    run_main(monkeypatch, "bench_update", *chosen, "--method", "published", OURS, "apex", "--json", file)
    printed = capsys.readouterr().out
    assert "wide_resnet28_2: host overhead of update()" in printed
    assert "GPU: not measured" in printed
    assert "\n- apex multi_tensor_axpby: ImportError: " in printed, "a missing library is skipped with the reason"
    rows = {row["method"]: row for row in json.loads(file.read_text())}
    assert {method for method, row in rows.items() if row["median_ms"]} == {
        updates.LOOP, OURS, updates.LIMIT, updates.COPY
    }  # fmt: skip
    assert all((row["median_ms"] is None) == (row["why_not"] is not None) for row in rows.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_bench_update_as_a_program(tmp_path, dtype):
    file = tmp_path / "rows.json"
    command = [sys.executable, BENCHMARKS / "bench_update.py", "--model", "resnet18", "--device", "cpu"]
    command += ["--method", "published", "foreach", "eman_kernels"]
    done = subprocess.run(
        [*command, "--threads", "1", "--dtype", dtype, "--rounds", "2", "--json", file], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "resnet18: host overhead of update()" in done.stdout
    assert "GPU: not measured" in done.stdout
    rows = {row["method"]: row for row in json.loads(file.read_text())}
    elements = sum(
        tensor.numel() for tensor in torchvision.models.resnet18().state_dict().values() if tensor.is_floating_point()
    )
    for row in rows.values():
        assert row["elements"] == elements
        assert row["torch"] == torch.__version__
        assert (row["median_ms"] is None) == (row["why_not"] is not None)
    measured = {method for method, row in rows.items() if row["median_ms"]}
    assert measured >= {updates.LOOP, OURS, "eman_kernels foreach", updates.LIMIT}
    assert ("foreach, lists kept" in measured) == (dtype != "mixed")
    assert "lerp loop" not in rows


@pytest.mark.slow
def test_bench_update_needs_only_what_make_bench_installs():
    recipe = re.search(r"pip install --editable \. (.*)", (BENCHMARKS.parent / "Makefile").read_text())[1].split()
    extra = re.search(r"^bench = \[(.*?)\]", (BENCHMARKS.parent / "pyproject.toml").read_text(), re.M | re.S)[1]
    libraries = [name.replace("-", "_") for name in re.findall(r'"([\w-]+)"', extra) if name not in recipe]
    assert {"timm", "lightning", "matplotlib"} <= set(libraries)
    # None in sys.modules makes the import fail.
    code = f"import sys; sys.modules.update(dict.fromkeys({libraries})); import bench_update; bench_update.main()"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, cwd=BENCHMARKS)
    assert done.returncode == 0, done.stderr
    assert "--threads" in done.stdout


def test_bad_arguments(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, "bench_update", "--rounds", "1")
    assert "--rounds must be at least 2" in capsys.readouterr().err


@pytest.mark.slow
def test_a_quick_report(tmp_path):
    pytest.importorskip("matplotlib", reason=f"matplotlib is not installed: {REMEDY}")
    page = (BENCHMARKS.parent / "docs" / "speed.md").read_text()
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "report.py", "--quick", "--device", "cpu", "--out", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (BENCHMARKS.parent / "docs" / "speed.md").read_text() == page, "a quick run must not change docs/speed.md"
    (file,) = tmp_path.glob("cpu-*.json")
    rows = json.loads(file.read_text())
    assert {row["kind"] for row in rows} == {"rules", "update", "elements", "tensors", "step", "instructions"}
    assert all({"device", "cpu", "torch", "eman_kernels", "date"} <= row.keys() for row in rows)
    timed = [row for row in rows if "x_limit" in row]
    assert {row["method"] for row in timed if row["kind"] == "update"} >= {updates.LOOP, OURS, "torch AveragedModel"}
    assert {row["size"] for row in timed if row["kind"] == "tensors"} == {10, 30, 100, 300, 1000, 3000, 10_000}
    assert all(row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] for row in timed)
    text = file.with_suffix(".md").read_text()
    for picture in ("float32", "growth", "step"):
        name = f"{file.stem}-{picture}.png"
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text


@pytest.mark.parametrize("devices", ["cpu", "nvidia"])
def test_the_pages_show_the_newest_report(devices):
    report = pytest.importorskip("report", reason=f"matplotlib is not installed: {REMEDY}")
    newest = max((BENCHMARKS / "results").glob(f"{devices}-*.json"))
    rows = json.loads(newest.read_text())
    place = report.place(rows[0]["device"])
    pages = {report.GUIDE / "speed.md": report.short(rows), BENCHMARKS / "README.md": report.block(rows, newest.stem)}
    for page, shown in pages.items():
        text = page.read_text()
        assert shown in text
        assert text == tables.embed(text, place, shown)
    for name in re.findall(rf"\(results/({newest.stem}-\w+\.png)\)", report.block(rows, newest.stem)):
        assert newest.with_name(name).exists()


def test_a_restricted_report_is_written_after_each_part(tmp_path, monkeypatch):
    """A failed part leaves a row with the reason, and earlier results are already in the file."""
    report = pytest.importorskip("report", reason=f"tabulate is not installed: {REMEDY}")
    file, seen = tmp_path / "rows.json", []

    def measure(model, dtype, *rest):
        seen.append((model, dtype, sorted(rest[-1]), json.loads(file.read_text())))
        if model == "second":
            raise RuntimeError("out of memory\nmore text")
        return [timing.Row(model, 1, dtype, "lerp loop", 10, 1, why_not="not measured")]

    def no_points(*rest):
        yield from ()

    monkeypatch.setattr(report, "measure", measure)
    monkeypatch.setattr(report, "growth", no_points)
    monkeypatch.setattr(report, "training_steps", lambda *rest: [{"kind": "step", "method": "x", "why_not": "no"}])
    given = SimpleNamespace(quick=True, model=["first", "second", "third"], dtype=["mixed"], method=["lerp loop"])
    rows = report.run(CPU, given, file)
    assert [(model, dtype) for model, dtype, *_ in seen] == [(m, "mixed") for m in ("first", "second", "third")]
    assert seen[0][2] == ["lerp loop", "torch.compile of the lerp loop"]
    assert [len(before) for *_, before in seen] == [2, 3, 4]  # first the rules of the two methods
    assert json.loads(file.read_text()) == rows
    (failed,) = tables.of_kind(rows, "failed")
    assert (failed["what"], failed["why_not"]) == ("second, mixed", "RuntimeError: out of memory")
    assert "second, mixed: RuntimeError" in report.text(rows, [])


def as_on_a_gpu(rows, mine):
    """The rows as a GPU's, with CUDA graph replays of `mine` and of foreach."""
    replays = [
        row | {"method": row["method"] + updates.GRAPH}
        for row in rows
        if row["kind"] == "update" and row["method"] in ("foreach, lists kept", mine)
    ]
    for row in replays:
        if row.get("x_limit"):
            row["x_limit"] = 0.9 if row["method"].startswith("foreach") else 0.8
    return [row | {"device": "NVIDIA X"} for row in rows + replays]


def test_a_gpu_report_does_not_mention_threads_and_compares_replays_with_replays():
    """With the rows of the newest recorded CPU report, and its pictures."""
    report = pytest.importorskip("report", reason=f"matplotlib is not installed: {REMEDY}")
    pictures = pytest.importorskip("pictures", reason=f"matplotlib is not installed: {REMEDY}")
    recorded = json.loads(max((BENCHMARKS / "results").glob("cpu-*.json")).read_text())
    recorded = [row for row in recorded if row["kind"] != "update" or row["model"] == "wide_resnet28_2"]
    mine = tables.main_of_ours(tables.of_kind(recorded, "update"))
    rows = as_on_a_gpu(recorded, mine)
    assert re.search(r"\d threads?\b", report.text(recorded, []))
    assert not re.search(r"\d threads?\b", report.text(rows, []).replace(rows[0]["cpu"], ""))
    threads = max(row["threads"] for row in tables.of_kind(rows, "update"))
    figures = [pictures.bars(rows, "float32", threads), pictures.growth_curves(rows), pictures.step_bars(rows)]
    for figure in figures:
        said = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
        assert len(said) > 10
        assert not [line for line in said if "thread" in line and "thread" not in rows[0]["cpu"]]
    replay = "foreach, lists kept" + updates.GRAPH
    assert replay in tables.keepers(rows)
    assert f"times the time of {replay}" not in tables.verdicts(rows), "our replay is faster"
    for row in rows:
        if row.get("method") == mine + updates.GRAPH:
            row["x_limit"] = 9.0
    assert f"times the time of {replay}" in tables.verdicts(rows)


def test_git_and_nvidia_smi_are_optional(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    described = timing.machine(CPU)
    assert "commit" not in described
    assert described["torch"] == torch.__version__


def test_an_error_during_graph_capture_ends_the_capture_and_is_raised(monkeypatch):
    ended = []

    class Context:
        def __init__(self, *what):
            pass

        def __enter__(self):
            pass

        def __exit__(self, kind, *rest):
            ended.append(kind)

    graph = SimpleNamespace(replay=lambda: "replayed")
    for name, value in {"CUDAGraph": lambda: graph, "graph": Context, "stream": Context}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    assert timing.capture_graph(lambda: None)() == "replayed"

    def refuse():
        raise RuntimeError("capturable")

    with pytest.raises(RuntimeError, match="capturable"):
        timing.capture_graph(refuse)
    assert ended == [None] * 4


def test_the_sleep_covers_the_launches_of_the_host():
    milliseconds = [command.sleep_cycles(host) / command.CYCLES for host in (0.05, 10.0, 300.0)]
    assert milliseconds == [0.3, 20.2, 50.0]


def test_a_note_reports_more_launches_than_the_queue_holds(monkeypatch):
    monkeypatch.setattr(timing, "time_once", lambda update, device, cache: (1.0, 2.0))
    monkeypatch.setattr(timing, "make_eviction_buffer", lambda device: None)
    names = {"few": 1024, "many": 1121, "many" + updates.GRAPH: 1121, updates.LIMIT: 1}
    rows = {name: timing.Row("m", 1, "float32", name, 1, 1, operations=n) for name, n in names.items()}
    timing.time_in_turn(rows, dict.fromkeys(names), torch.device("cuda"), 2, "")
    assert {name for name, row in rows.items() if row.note} == {"many"}
    assert "\n- many: 1,121 launches, of which 1,024 are queued" in tables.update_table(
        list(map(asdict, rows.values()))
    )


# ---------------------------------------------------------------- the share of a training step


@needs_the_kernel
def test_full_chunks_in_reverse_order_give_the_same_bits():
    torch.manual_seed(0)
    student = nn.Linear(300, 300)
    teachers = [EMANTeacher(student, 0.9) for _ in range(2)]
    with torch.no_grad():
        student.weight.add_(1.0)
        student.bias.add_(1.0)
    for teacher in teachers:
        teacher.update(student)
    tables = [plan_for(teacher.module, student).works[0][1].table for teacher in teachers]
    before = tables[1].clone()
    step.reverse_full_chunks(teachers[1], student)
    n_full = 300 * 300 // 16384  # csrc/README.md
    assert n_full == 5
    assert tables[1][:n_full].tolist() == before[:n_full].tolist()[::-1]
    assert torch.equal(tables[1][n_full:], before[n_full:])
    for teacher in teachers:
        teacher.update(student)
    for name, tensor in teachers[0].module.state_dict().items():
        assert torch.equal(tensor, teachers[1].module.state_dict()[name]), name


def test_a_step_is_timed_for_the_host_and_for_the_device(monkeypatch):
    """With a clock that the work advances; on a GPU, the events are those of the device's clock."""
    clock = {"host": 0.0, "device": 0.0}

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = clock["device"]

        def elapsed_time(self, end):
            return end.at - self.at

    def work(host, device):
        clock["host"] += host
        clock["device"] += device

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: work(1000.0, 0.0))
    monkeypatch.setattr(step.time, "perf_counter", lambda: 1e-3 * clock["host"])
    train, update = functools.partial(work, 20.0, 30.0), functools.partial(work, 2.0, 3.0)
    gpu_device = torch.device("cuda", 0)
    assert step.time_on_host(train, update, gpu_device) == pytest.approx((22.0, 2.0))
    assert step.time_on_device(train, update, gpu_device) == [(33.0, 3.0)] * (step.IN_A_ROW - 1)


def test_the_table_of_a_step_has_the_hosts_times_on_a_gpu():
    row = {"kind": "step", "method": "x", "model": "m", "dtype": "float32", "step_ms": 40.0}
    row |= dict.fromkeys(("median_ms", "q1_ms", "q3_ms", "median_percent", "q1_percent", "q3_percent"), 0.5)
    assert "host" not in tables.step_table([row])
    table = tables.step_table([row | {"host_step_ms": 12.3, "host_update_ms": 0.25}])
    assert re.search(r"\| m, float32 +\| x +\| 40 .*\| 12\.3 +\| 0\.25 +\|", table)


# ---------------------------------------------------------------- the general kernels, mode by mode


def test_the_bytes_of_a_mode():
    """Read and written per element of the student: 2 bytes of bfloat16 or 4 of float32 for each access."""
    expected = {"nearest": 4 + 8, "stochastic": 4 + 4, "stochastic, bf16 student": 2 + 4, "cast": 4 + 8 + 2}
    expected |= {"skip": 4 + 8, "three teachers": 4 + 3 * 8}
    assert {name: mode.bytes_per_element for name, mode in general.MODES.items()} == expected


@needs_the_kernel
def test_every_mode_is_timed_if_its_bits_are_right(monkeypatch):
    monkeypatch.setitem(models.MODELS, "small", small_network)
    monkeypatch.setattr(timing, "CACHE_BYTES", 1 << 20)
    rows = general.measure_modes("small", CPU, 2)
    assert [row["mode"] for row in rows] == [updates.COPY, *general.MODES]
    assert all(row["q1_ms"] <= row["median_ms"] <= row["q3_ms"] for row in rows)
    assert rows[0]["x_copy"] == 1
    elements = sum(t.numel() for t in small_network().state_dict().values() if t.is_floating_point())
    assert [round(1e9 * row["gigabytes"]) for row in rows] == [elements * n for n in (8, 12, 8, 6, 14, 12, 28)]

    right = general.Case.run

    def drifting(self, backend, work):
        right(self, backend, work)
        if backend.NAME == "cpu" and work.casts:
            self.pairs[-1].cast[3] += 1

    monkeypatch.setattr(general.Case, "run", drifting)
    rows = general.measure_modes("small", CPU, 2)
    assert {row["mode"]: row.get("why_not") for row in rows if "median_ms" not in row} == {
        "cast": "its bits differ from the reference's"
    }


# ---------------------------------------------------------------- parts of the benchmarks


def test_a_second_call_measures_what_is_missing_or_wrong(tmp_path, capsys):
    file, measured = tmp_path / "rows.json", []
    row = {"kind": "mode", "method": OURS, "median_ms": 1.0, "x_copy": None}

    def part(name, *rows):
        def measure():
            measured.append(name)
            if not rows:
                raise RuntimeError("out of memory")
            return list(rows)

        return name, measure

    wrong = row | {"why_not": "its bits differ"}
    peer = {"kind": "mode", "method": "timm", "why_not": "ImportError"}
    graph = {"kind": "update", "method": OURS + updates.GRAPH, "why_not": "a captured graph would freeze the step"}
    assert not parts.run(
        [part("good", row, peer, graph), part("broken"), part("wrong", row, wrong)], {"device": "x"}, file
    )
    assert [(row["part"], row["device"]) for row in json.loads(file.read_text())] == [("good", "x")] * 3 + [
        ("wrong", "x")
    ] * 2
    assert "RuntimeError: out of memory" in capsys.readouterr().out
    assert parts.run([part("good", wrong), part("broken", row), part("wrong", row)], {"device": "x"}, file)
    assert measured == ["good", "broken", "wrong", "broken", "wrong"]
    assert [row["part"] for row in json.loads(file.read_text())] == ["good"] * 3 + ["broken", "wrong"]
    assert all("x_copy" not in row for row in json.loads(file.read_text()))


def test_a_part_fails_without_the_cuda_backend(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parts, "available_backends", lambda: {"cuda": "the extension was built without CUDA"})
    assert run_main(monkeypatch, "parts", "modes", "--json", tmp_path / "rows.json") == 1
    assert capsys.readouterr().out == "the cuda backend is not available: the extension was built without CUDA\n"


# ---------------------------------------------------------------- make gpu


def test_the_stages_of_make_gpu(tmp_path, monkeypatch, capsys):
    stages = gpu.stages("python", tmp_path)
    default = [stage for stage in stages if stage not in gpu.ON_REQUEST]
    limits = [command.seconds for stage in default for command in stages[stage]]
    assert gpu.BUILD_SECONDS + sum(limits) <= 800, limits
    assert default[:4] == ["kernels", "modes", "step", "host"]
    page = (BENCHMARKS / "README.md").read_text()
    for stage in default:
        seconds = sum(command.seconds for command in stages[stage])
        assert re.search(rf"^\| `{stage}` \| .* \| {seconds} s \|$", page, re.M), stage
    assert {name for its in stages.values() for name, *_ in its} >= set(parts.PARTS)
    with pytest.raises(SystemExit, match="2"):
        run_main(monkeypatch, "gpu", "speed", "--out", tmp_path)
    assert "no such stage: speed; choose from kernels, modes, step" in capsys.readouterr().err


class Machine:
    """Stands for the commands of gpu.py, on a machine with a GPU."""

    def __init__(self, monkeypatch, tmp_path):
        self.ran, self.failing, self.cuda = [], set(), "available"
        self.call = functools.partial(run_main, monkeypatch, "gpu", "--out", tmp_path)
        monkeypatch.setattr(gpu, "run", self.run)
        monkeypatch.setattr(gpu, "ask", self.ask)
        monkeypatch.setattr(shutil, "which", lambda program: None if program == "ncu" else f"/{program}")

    def run(self, command, log, seconds, environment):
        self.ran.append((log.stem, seconds, environment.get("TORCH_CUDA_ARCH_LIST")))
        log.write_text("1 failed, 3 passed in 2.00s\n")
        return "exit status 1, 2 s" if log.stem in self.failing else "ok, 1 s"

    def ask(self, python, code, environment):
        return '{"device": "NVIDIA X-1", "architecture": "12.0"}' if code == gpu.PROBE else self.cuda

    def names(self):
        ran = [name for name, *_ in self.ran if name != "environment"]
        self.ran = []
        return ran


@pytest.fixture
def machine(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(gpu, "fingerprint", lambda: "1234")
    return Machine(monkeypatch, tmp_path)


def test_make_gpu_continues_with_what_is_missing(machine, tmp_path, monkeypatch):
    machine.failing = {"kernels-graphs"}
    assert machine.call("kernels", "modes", "profile") == 1
    assert ("build", gpu.BUILD_SECONDS, "12.0") in machine.ran, "for the device's own architecture"
    assert machine.names() == ["build", "kernels-general", "kernels-graphs", "modes-modes"]
    folder = tmp_path / "nvidia-x-1-1234"
    lines = (folder / "summary.txt").read_text().splitlines()
    assert "kernels, graphs: exit status 1, 2 s" in lines
    assert "profile, ncu: skipped: no ncu on PATH" in lines
    assert lines.count("    1 failed, 3 passed in 2.00s") == 3
    machine.failing = set()
    assert machine.call("kernels", "modes", "host") == 0
    assert machine.names() == ["kernels-graphs", "host-host"]
    assert len(json.loads((folder / "summary.json").read_text())) == 6, "the results of both calls"
    monkeypatch.setattr(gpu, "fingerprint", lambda: "5678")
    assert machine.call("modes") == 0
    assert machine.names() == ["build", "modes-modes"], "other kernels have results of their own"
    machine.call("--rehearse", "--no-build", "modes")
    assert [seconds for name, seconds, _ in machine.ran if name == "modes-modes"] == [None], "no limit in a rehearsal"


def test_make_gpu_runs_no_stage_without_the_cuda_backend(machine, tmp_path, capsys):
    """Whether or not the build says that it succeeded."""
    machine.cuda = "the extension was built without CUDA"
    for failing in (set(), {"build"}):
        machine.failing = failing
        assert machine.call("modes") == 1
        assert machine.names()[-1].startswith("build")
        assert "the cuda backend is not available: the extension was built without CUDA" in capsys.readouterr().out
    machine.cuda = "available"
    assert machine.call("modes") == 0
    assert machine.names() == ["modes-modes"]


def test_make_gpu_without_a_gpu(monkeypatch, tmp_path, capsys):
    answers = ["ModuleNotFoundError: No module named 'torch'", '{"device": null, "architecture": "9.0"}']
    monkeypatch.setattr(gpu, "ask", lambda *given: answers.pop(0))
    assert run_main(monkeypatch, "gpu", "--out", tmp_path) == 1
    assert run_main(monkeypatch, "gpu", "--out", tmp_path) == 1
    assert capsys.readouterr().out.splitlines() == [
        "torch cannot be imported: ModuleNotFoundError: No module named 'torch'",
        "torch does not see a CUDA GPU (--rehearse runs the parts that work without one)",
    ]
    assert not list(tmp_path.iterdir())


def test_what_make_gpu_asks_of_python(tmp_path):
    ask = functools.partial(gpu.ask, sys.executable, environment=dict(os.environ))
    assert ask(code="print(1); print(2)") == "2"
    assert ask(code="import no_such_module") == "ModuleNotFoundError: No module named 'no_such_module'"
    assert re.fullmatch(r"[0-9a-f]{8}", gpu.fingerprint())


@pytest.mark.slow
@needs_the_kernel
def test_every_stage_of_make_gpu_can_be_rehearsed(tmp_path):
    stages = gpu.stages("python", tmp_path)
    command = [sys.executable, BENCHMARKS / "gpu.py", *stages, "--rehearse", "--no-build", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    summary = (folder / "summary.txt").read_text()
    assert len(re.findall(r": ok, \d+ s$", summary, re.M)) == sum(map(len, stages.values())), summary
    assert len(re.findall(r"^    \d+/\d+ tests collected", summary, re.M)) == 6
    assert "self-check: passed" in summary
    for part in parts.PARTS:
        rows = json.loads((folder / f"{part}.json").read_text())
        assert not list(filter(parts.is_wrong, rows)), part
        assert {row["torch"] for row in rows} == {torch.__version__}
    command = [sys.executable, BENCHMARKS / "report.py", "--from", folder, "--out", tmp_path / "report"]
    subprocess.run(command, check=True, capture_output=True)
    (page,) = (tmp_path / "report").glob("*-parts.md")
    page = page.read_text()
    for row in json.loads((folder / "modes.json").read_text()):
        assert f"| {row['mode']} " in page
        assert f"{row['x_copy']:.2f} ({row['x_copy_q1']:.2f} ... {row['x_copy_q3']:.2f})" in page
    for title in ("Correctness", "Host time", "A teacher in CPU memory", "Growth with the number of t", "Share of a"):
        assert f"\n## {title}" in page
    assert re.search(r"\*\*eman_kernels cpu\*\* +\| yes", page), "whether a method keeps the rule is measured"
    for mode in ("stochastic", "cast"):
        assert f"{mode} cpu\n" in (folder / "profile-ncu.log").read_text()
    variants = (folder / "variants-variants.log").read_text()
    assert ("9 builds in" if shutil.which("nvcc") and shutil.which("g++") else "0 builds in") in variants
    assert re.search(r"^tiny, 640,000 elements", variants, re.M)
    assert not re.search(r"Error|differs from", variants)


def test_a_command_that_takes_too_long_keeps_its_output(tmp_path, monkeypatch):
    """The limit is reached when the command has printed its first line, however long that takes on this machine."""
    script = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits an ignored SIGINT
try:
    print("first line", flush=True)
    time.sleep(3600)
except KeyboardInterrupt:
    print("summary")
"""
    log = tmp_path / "log"

    class Child(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout != 3:
                return super().wait()  # after the signal: wait for the end, not for 15 seconds
            while "first line" not in log.read_text():
                assert self.poll() is None, "the command ended without its first line"
                time.sleep(0.01)
            raise subprocess.TimeoutExpired(self.args, timeout)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", Child)
        assert gpu.run([sys.executable, "-c", script], log, 3, dict(os.environ)) == "stopped after 3 s"
    assert log.read_text() == "first line\nsummary\n"
    assert gpu.run(["no-such-program"], log, None, dict(os.environ)).startswith("not started: ")
    assert gpu.run([sys.executable, "-c", "exit(3)"], log, None, dict(os.environ)).startswith("exit status 3, ")


def test_a_command_that_ignores_the_interrupt_is_killed(tmp_path, monkeypatch):
    signals = []

    class Child:
        pid = 12345

        def __init__(self, *arguments, **options):
            pass

        def wait(self, timeout=None):
            if signals[-1:] != [signal.SIGKILL]:
                raise subprocess.TimeoutExpired("command", timeout)

    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.setattr(os, "killpg", lambda pid, signal: signals.append(signal))
    assert gpu.run(["command"], tmp_path / "log", 9, {}) == "stopped after 9 s"
    assert signals == [signal.SIGINT, signal.SIGKILL]


def test_the_summary_of_make_gpu_is_short(tmp_path):
    summary = [(f"stage, {k}: ok, 1 s", [f"line {i}" for i in range(100)] if k else []) for k in range(9)]
    lines = gpu.shorten(summary)
    assert len(lines) <= gpu.SUMMARY_LINES
    assert [line for line in lines if not line.startswith(" ")] == [head for head, _ in summary]
    log = tmp_path / "log"
    log.write_text("x\nFAILED tests/test_cuda.py::test_x - RuntimeError\n1 failed, 3 passed in 2.00s\n")
    assert gpu.key_lines("cuda", log) == log.read_text().splitlines()[1:]
    log.write_text(
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","eman_update","gpu__time_duration.sum","us","104.2"\n'
        '"0","eman_update","dram__bytes_read.sum","Mbyte","204.9"\n"0","eman_update","other","x","1"\n'
    )
    assert gpu.key_lines("ncu", log) == ["eman_update 0: time 104.2 us, read 204.9 Mbyte"]


def test_the_table_of_variants():
    variants = pytest.importorskip("variants")
    row = {"model": "m", "elements": 1000, "by the rule": False}
    rows = [row | {"method": "flat copy", "chunk": None, "median_ms": 0.5}]
    rows += [
        row | {"method": "cuda", "chunk": c, "median_ms": c / 1e6, "by the rule": c == 2048} for c in variants.CHUNKS
    ]
    rows[-1] = row | {"method": "cuda", "chunk": 16384, "why_not": "wrong result"}
    lines = variants.format_table(rows).splitlines()
    assert lines[2].split() == ["flat", "copy", "500.0"]
    assert lines[3].split() == ["cuda", "1.0", "2.0*", "4.1", "8.2", "none"]
    assert lines[4] == "  cuda, 16384: wrong result"


# ---------------------------------------------------------------- comparing two reports


def a_report(**changed):
    row = {"kind": "update", "model": "resnet50", "dtype": "float32", "threads": 2, "method": OURS, "operations": 1}
    row |= {"gigabytes": 0.3, "median_ms": 5.0, "q1_ms": 4.9, "q3_ms": 5.1, "x_limit": 1.05}
    row |= {"device": "cpu", "torch": "2", "date": "today"}
    peer = row | {"method": "timm ModelEmaV3", "x_limit": 1.5, "operations": 54}
    kind = {name: value for name, value in changed.items() if name == "kind"}
    return [row | changed, peer | kind]


@pytest.mark.parametrize(
    ("changed", "status", "says"),
    [
        ({}, 0, "no regression"),
        ({"median_ms": 10.0}, 0, "2.00"),  # a slower machine, on which the limit is slower too
        ({"x_limit": 1.14}, 0, "no regression"),
        ({"x_limit": 1.3}, 1, "1.05 x limit, now 1.30"),
        ({"operations": 2}, 1, "operations 1, now 2"),
        ({"gigabytes": 0.4}, 1, "gigabytes 0.3, now 0.4"),
        ({"median_ms": None, "x_limit": None, "why_not": "it broke"}, 1, "no longer measured: it broke"),
        ({"kind": "other"}, 2, "no measurements in common"),
    ],
)
def test_compare(tmp_path, monkeypatch, capsys, changed, status, says):
    for name, rows in (("old", a_report()), ("new", a_report(**changed))):
        (tmp_path / name).write_text(json.dumps(rows))
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "old"), str(tmp_path / "new")])
    with pytest.raises(SystemExit) as stopped:
        sys.exit(compare.main())
    assert stopped.value.code == status
    out = capsys.readouterr()
    assert says in out.out + out.err


def test_a_slower_peer_is_not_a_regression():
    old, new = ({(row["method"],): row for row in a_report()} for _ in range(2))
    new[("timm ModelEmaV3",)]["x_limit"] = 9.0
    lines, worse = compare.compare(old, new, 1.1)
    assert len(lines) == 2
    assert not worse
