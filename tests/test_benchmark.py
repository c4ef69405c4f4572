"""The benchmark refuses a speed for a wrong result, sees what each library does, and counts what is claimed."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision

from eman_kernels import available_backends

REMEDY = "pip install '.[bench]'"
for package in ("tabulate", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is not installed: {REMEDY}")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import adapters  # noqa: E402
import checks  # noqa: E402
import compare  # noqa: E402
import counts  # noqa: E402
import gpu  # noqa: E402
import models  # noqa: E402
import peers  # noqa: E402
import tables  # noqa: E402
import timing  # noqa: E402
import updates  # noqa: E402

# Rounding to nearest at 0.999 is what is measured, whether the teacher moves or not.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not move")
CPU = torch.device("cpu")
OURS = "eman_kernels cpu" if available_backends()["cpu"] is None else "eman_kernels foreach"
needs_the_kernel = pytest.mark.skipif(OURS != "eman_kernels cpu", reason=f"{available_backends()['cpu']}")


# ---------------------------------------------------------------- counts: no noise of a machine touches them


@pytest.mark.parametrize(
    ("make", "dtype", "operations", "each"),
    [  # ResNet-50: 161 parameters and 106 float buffers, averaged; 53 counters, copied
        (updates.published_loop, "float32", 4 * 267 + 53, 9 * 4),  # two products, a sum, a copy
        (updates.lerp_loop, "float32", 320, 3 * 4),
        (updates.lerp_loop, "mixed", 320 + 267, 2 + 4 + 3 * 4),  # a cast of each student tensor first
        (updates.foreach, "float32", 2, 3 * 4),
        pytest.param(updates.ours("cpu"), "float32", 1, 3 * 4, marks=needs_the_kernel),
        pytest.param(updates.ours("cpu"), "mixed", 1, 2 + 2 * 4, marks=needs_the_kernel),
        pytest.param(updates.ours("cpu"), "bfloat16", 1, 3 * 2, marks=needs_the_kernel),
    ],
)
@torch.no_grad()
def test_operations_and_bytes_of_a_call(make, dtype, operations, each):
    teacher, student = models.pair("resnet50", dtype, CPU)
    following = make(teacher, student, 0.999)
    following.update()
    counted = counts.counts(following.update, following.plan(), torch.device("cpu"))
    counters = 53 * 2 * 8
    assert counted.operations == operations
    assert round(1e9 * counted.gigabytes) == each * (25_557_032 + 2 * 26_560) + counters
    assert counted.syncs == 0


@torch.no_grad()
def test_a_wait_for_the_device_is_counted():
    there = torch.ones(3)
    assert counts.counts(lambda: there.sum().item(), None, torch.device("cpu")).syncs == 1
    assert counts.counts(lambda: there.sum().item(), None, torch.device("cuda", 0)).syncs == 0


def slices(tensors):
    return models.Slices(10 * tensors, tensors, CPU), models.Slices(10 * tensors, tensors, CPU)


def python_work(update):
    """Calls and bytecode instructions of one call, in Python's own count."""

    def trace(frame, event, argument):
        frame.f_trace_opcodes = True
        seen[event] += 1
        return trace

    before = sys.gettrace()
    # Python 3.12 counts no opcodes before a frame has once asked for them.
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
    assert work[3][1] > 2 * work[2][1], "the measure does not see a loop"


@needs_the_kernel
def test_instructions_of_the_host():
    if reason := counts.no_callgrind():
        pytest.skip(reason)
    each = {}
    for method, (few, many) in counts.host_instructions().items():
        each[method] = (many - few) / (counts.SIZES[1] - counts.SIZES[0])
    # Some 990 a tensor on Python 3.11 and 3.14, kernel and all; the loop has 66,000.
    assert each[OURS] < 1100
    assert each[updates.LOOP] > 10 * each[OURS]


# ---------------------------------------------------------------- what each method does


def tiny_pair():
    torch.manual_seed(0)
    teacher = checks.Tiny(8).requires_grad_(False)
    return teacher, models.student_of(teacher)


LIBRARIES = peers.peers("bfloat16") | adapters.adapters()


@pytest.mark.filterwarnings("ignore")  # what a library warns of is its own matter
@pytest.mark.parametrize("name", [name for name in LIBRARIES if "apex" not in name])
@torch.no_grad()
def test_a_library_does_what_it_claims_and_nothing_else_is_taken_for_it(name):
    method = LIBRARIES[name]
    teacher, student = tiny_pair()
    begin = {key: tensor.double().clone() for key, tensor in models.tensors_of(teacher).items()}
    try:
        following = method.make(teacher, student, 0.9)
    except ImportError as error:
        pytest.skip(f"{error}: {REMEDY}")
    for key, tensor in following.teacher.items():
        assert torch.equal(tensor.double(), begin[key]), f"{key} is not where it began"
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
def test_a_broken_rule_is_seen_and_no_other(rule):
    def make(teacher, student, momentum):
        right = updates.ours("reference")(teacher, student, momentum)

        def update():
            if rule not in SPOILED and student.first.weight.dtype != teacher.first.weight.dtype:
                raise RuntimeError("expected one dtype\nat length")
            before = {name: tensor.clone() for name, tensor in right.teacher.items()}
            right.update()
            if rule == "tied weights once":
                teacher.first.weight.lerp_(student.first.weight.to(teacher.first.weight.dtype), 1.0 - momentum)
            elif rule in SPOILED:
                right.teacher[SPOILED[rule]].copy_(before[SPOILED[rule]])

        return right._replace(update=update)

    kept = dict.fromkeys(checks.RULES, "yes") | {"bf16 teacher moves": "no"}
    kept[rule] = "no" if rule in SPOILED else "raises: expected one dtype"
    assert checks.rules_kept(updates.Method(make), CPU) == kept


@torch.no_grad()
def test_a_bf16_teacher_that_moves_is_seen():
    def make(teacher, student, momentum):
        def update():
            # Rounded up as often as it lies nearer to the next; an ulp is 2 ** -7 from 1 to 2.
            for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
                t.copy_(torch.lerp(t.float(), s.float(), 1 - momentum) + (torch.rand(t.shape) - 0.5) * 2**-7)

        return updates.Following(update, models.tensors_of(teacher))

    assert checks.rules_kept(updates.Method(make), CPU)["bf16 teacher moves"] == "yes"


@torch.no_grad()
def test_rules_of_ours_and_of_the_published_loop():
    kept = dict.fromkeys(checks.RULES, "yes") | {"bf16 teacher moves": "no"}
    assert checks.rules_kept(updates.Method(updates.ours("reference")), CPU) == kept
    kept |= {"tied weights once": "no", "non-persistent buffers": "no"}
    assert checks.rules_kept(updates.Method(updates.published_loop), CPU) == kept
    raised = checks.rules_kept(updates.Method(updates.foreach), CPU)["fp32 teacher of a bf16 student"]
    assert raised.startswith("raises: ")


def at_rest(teacher, student, momentum):
    return updates.Following(lambda: None, models.tensors_of(teacher))


@torch.no_grad()
def test_who_does_nothing_keeps_no_rule():
    assert checks.rules_kept(updates.Method(at_rest), CPU) == dict.fromkeys(checks.RULES, "no")


def test_a_wrong_method_gets_no_figure():
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

    def unwilling(teacher, student, momentum):
        raise ImportError("No module named 'x'")

    given = {
        updates.LOOP: updates.Method(updates.published_loop),
        "drifting": updates.Method(drifting, exact=True),
        "without counters": updates.Method(without_counters),
        "claims no counters": updates.Method(without_counters, ("parameters", "float buffers")),
        "forgetful": updates.Method(forgetful),
        "at rest": updates.Method(at_rest),
        "unwilling": updates.Method(unwilling),
        "absent": "not here",
    }
    for dtype in ("float32", "bfloat16"):
        rows = {row.method: row for row in timing.measure("resnet18", dtype, CPU, 1, 2, given)}
        assert rows["drifting"].why_not == "fc.bias is not what torch.lerp gives"
        assert rows["without counters"].why_not == "bn1.num_batches_tracked is not the student's"
        assert rows["forgetful"].why_not == "fc.bias is not what torch.lerp gives"
        assert rows["at rest"].why_not == "conv1.weight is not what torch.lerp gives"
        assert rows["unwilling"].why_not == "ImportError: No module named 'x'"
        assert rows["absent"].why_not == "not here"
        assert rows["claims no counters"].lacks == "counters"
        assert all((row.median_ms is None) == (row.why_not is not None) for row in rows.values())
        assert {method for method, row in rows.items() if row.median_ms} == {
            updates.LOOP, "claims no counters", updates.LIMIT, updates.COPY
        }  # fmt: skip
        assert "fc.bias is not" in tables.update_table(list(map(asdict, rows.values())))


def test_the_networks():
    wide = models.wide_resnet28_2()
    assert sum(tensor.numel() for tensor in wide.parameters()) == 1_467_610, "FixMatch's for ten classes"
    assert wide(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert all(tensor.numel() % 2 for tensor in models.odd_sizes().parameters())


# ---------------------------------------------------------------- the commands


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_it_prints_the_table_and_writes_the_rows(tmp_path, dtype):
    file = tmp_path / "rows.json"
    command = [sys.executable, BENCHMARKS / "bench_update.py", "--model", "resnet18", "--device", "cpu"]
    command += ["--method", "published", "foreach", "eman_kernels"]
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
    assert measured >= {updates.LOOP, OURS, "eman_kernels foreach", updates.LIMIT}
    assert ("foreach, lists kept" in measured) == (dtype != "mixed")
    assert "lerp loop" not in rows


def test_bad_arguments():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "bench_update.py", "--rounds", "1"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "--rounds must be at least 2" in done.stderr


@pytest.fixture(scope="module")
def quick_report(tmp_path_factory):
    pytest.importorskip("matplotlib", reason=f"matplotlib is not installed: {REMEDY}")
    out = tmp_path_factory.mktemp("results")
    readme = (BENCHMARKS.parent / "README.md").read_text()
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "report.py", "--quick", "--device", "cpu", "--out", out],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (BENCHMARKS.parent / "README.md").read_text() == readme, "a quick run has no figure for the README"
    return out


def test_the_report(quick_report):
    (file,) = quick_report.glob("cpu-*.json")
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
        assert (quick_report / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text


@pytest.mark.parametrize("devices", ["cpu", "nvidia"])
def test_the_readmes_show_the_newest_report(devices):
    report = pytest.importorskip("report", reason=f"matplotlib is not installed: {REMEDY}")
    newest = max((BENCHMARKS / "results").glob(f"{devices}-*.json"))
    rows = json.loads(newest.read_text())
    place = report.place(rows[0]["device"])
    for folder, shown in ((BENCHMARKS.parent, report.short(rows)), (BENCHMARKS, report.block(rows, newest.stem))):
        readme = (folder / "README.md").read_text()
        assert shown in readme
        assert readme == tables.embed(readme, place, shown)
    for name in re.findall(rf"\(results/({newest.stem}-\w+\.png)\)", report.block(rows, newest.stem)):
        assert newest.with_name(name).exists()


def test_a_narrowed_report_is_written_piece_by_piece(tmp_path, monkeypatch):
    """What fails costs its own rows, and what was measured before it lies in the file."""
    report = pytest.importorskip("report", reason=f"tabulate is not installed: {REMEDY}")
    file, seen = tmp_path / "rows.json", []

    def measure(model, dtype, *rest):
        seen.append((model, dtype, sorted(rest[-1]), json.loads(file.read_text())))
        if model == "second":
            raise RuntimeError("out of memory\nat length")
        return [timing.Row(model, 1, dtype, "lerp loop", 10, 1, why_not="not today")]

    def no_points(*rest):
        yield from ()

    monkeypatch.setattr(report, "measure", measure)
    monkeypatch.setattr(report, "growth", no_points)
    monkeypatch.setattr(report, "training_steps", lambda *rest: [{"kind": "step", "method": "x", "why_not": "no"}])
    given = SimpleNamespace(quick=True, model=["first", "second", "third"], dtype=["mixed"], method=["lerp loop"])
    rows = report.run(CPU, given, file)
    assert [(model, dtype) for model, dtype, *_ in seen] == [(m, "mixed") for m in ("first", "second", "third")]
    assert seen[0][2] == ["lerp loop", "torch.compile of the lerp loop"]
    assert [len(before) for *_, before in seen] == [2, 3, 4]  # what each of the two methods gets right comes first
    assert json.loads(file.read_text()) == rows
    (failed,) = tables.of_kind(rows, "failed")
    assert (failed["what"], failed["why_not"]) == ("second, mixed", "RuntimeError: out of memory")
    assert "second, mixed: RuntimeError" in report.text(rows, [])


def as_on_a_gpu(rows):
    replays = [
        row | {"method": row["method"] + updates.GRAPH}
        for row in rows
        if row["kind"] == "update" and row["method"] in ("foreach, lists kept", OURS)
    ]
    for row in replays:
        if row.get("x_limit"):
            row["x_limit"] = 0.9 if row["method"].startswith("foreach") else 0.8
    return [row | {"device": "NVIDIA X"} for row in rows + replays]


def test_a_gpus_report_says_nothing_of_threads_and_compares_replays_with_replays(quick_report):
    report = pytest.importorskip("report", reason=f"matplotlib is not installed: {REMEDY}")
    pictures = pytest.importorskip("pictures", reason=f"matplotlib is not installed: {REMEDY}")
    (file,) = quick_report.glob("cpu-*.json")
    rows = as_on_a_gpu(json.loads(file.read_text()))
    assert "1 thread" not in report.text(rows, [])
    figures = [pictures.bars(rows, "float32", 1), pictures.growth_curves(rows), pictures.step_bars(rows)]
    for figure in figures:
        said = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
        assert len(said) > 10
        assert not [line for line in said if "thread" in line and "thread" not in rows[0]["cpu"]]
    replay = "foreach, lists kept" + updates.GRAPH
    assert replay in tables.keepers(rows)
    assert f"of the time of {replay}" not in tables.verdicts(rows), "ours replayed is ahead of it"
    for row in rows:
        if row.get("method") == OURS + updates.GRAPH:
            row["x_limit"] = 9.0
    assert f"of the time of {replay}" in tables.verdicts(rows)


def test_a_machine_without_git_and_nvidia_smi(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    described = timing.machine(CPU)
    assert "commit" not in described
    assert described["torch"] == torch.__version__


def test_what_a_graph_refuses_has_a_reason_and_ends_the_capture(monkeypatch):
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
    assert timing.graphed(lambda: None)() == "replayed"

    def refuse():
        raise RuntimeError("capturable")

    with pytest.raises(RuntimeError, match="capturable"):
        timing.graphed(refuse)
    assert ended == [None] * 4


def test_the_sleep_is_as_long_as_the_host_needs():
    milliseconds = [timing.sleep_cycles(host) / timing.CYCLES for host in (0.05, 10.0, 300.0)]
    assert milliseconds == [0.3, 20.2, 50.0]


def test_more_launches_than_the_queue_holds_are_said(monkeypatch):
    monkeypatch.setattr(timing, "time_once", lambda update, device, cache: (1.0, 2.0))
    monkeypatch.setattr(timing, "nothing_cached", lambda device: None)
    names = {"few": 1024, "many": 1121, "many" + updates.GRAPH: 1121, updates.LIMIT: 1}
    rows = {name: timing.Row("m", 1, "float32", name, 1, 1, operations=n) for name, n in names.items()}
    timing.take(rows, dict.fromkeys(names), torch.device("cuda"), 2, "")
    assert {name for name, row in rows.items() if row.note} == {"many"}
    assert "\n- many: 1,121 launches, of which 1,024 queue up" in tables.update_table(list(map(asdict, rows.values())))


# ---------------------------------------------------------------- make gpu


def test_every_stage_of_make_gpu_is_rehearsed(tmp_path):
    command = [sys.executable, BENCHMARKS / "gpu.py", "correct", "evidence", "variants"]
    done = subprocess.run(
        [*command, "--rehearse", "--no-build", "--out", tmp_path], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    variants = (tmp_path / "variants-variants.log").read_text()
    assert ("9 builds in" if shutil.which("nvcc") and shutil.which("g++") else "0 builds in") in variants
    assert re.search(r"^tiny, 640,000 elements", variants, re.M)
    assert not re.search(r"Error|other bits", variants)
    summary = (tmp_path / "summary.txt").read_text()
    assert len(re.findall(r": ok, \d+ s$", summary, re.M)) == 7, summary
    assert len(re.findall(r"^    \d+/\d+ tests collected", summary, re.M)) == 4
    assert "self-check: passed" in summary
    assert (tmp_path / "environment.log").read_text().startswith("eman_kernels ")
    done = subprocess.run([*command[:2], "speed"], capture_output=True, text=True)
    assert "no such stage: speed; there are correct, figures, evidence, variants" in done.stderr
    limits = {stage: sum(c.seconds for c in its) for stage, its in gpu.stages("python", tmp_path).items()}
    assert max(limits.values()) <= 480, limits


def test_a_command_that_takes_too_long_leaves_what_it_has(tmp_path):
    script = (
        "import time; print('so far', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('in short')"
    )
    log = tmp_path / "log"
    assert gpu.run([sys.executable, "-c", script], log, 3, dict(os.environ)) == "stopped after 3 s"
    assert log.read_text() == "so far\nin short\n"
    assert gpu.run(["no-such-program"], log, 3, dict(os.environ)).startswith("not started: ")
    assert gpu.run([sys.executable, "-c", "exit(3)"], log, 9, dict(os.environ)).startswith("exit status 3, ")


def test_the_summary_of_make_gpu_has_at_most_40_lines(tmp_path):
    summary = [(f"stage, {k}: ok, 1 s", [f"line {i}" for i in range(100)] if k else []) for k in range(9)]
    lines = gpu.shortened(summary)
    assert len(lines) <= 40
    assert [line for line in lines if not line.startswith(" ")] == [head for head, _ in summary]
    log = tmp_path / "log"
    log.write_text("x\nFAILED tests/test_cuda.py::test_x - RuntimeError\n1 failed, 3 passed in 2.00s\n")
    assert gpu.findings("cuda", log) == log.read_text().splitlines()[1:]
    log.write_text(
        '==PROF== Connected\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","eman_update","gpu__time_duration.sum","us","104.2"\n'
        '"0","eman_update","dram__bytes_read.sum","Mbyte","204.9"\n"0","eman_update","other","x","1"\n'
    )
    assert gpu.findings("ncu", log) == ["eman_update 0: time 104.2 us, read 204.9 Mbyte"]


def test_the_table_of_the_variants():
    variants = pytest.importorskip("variants")
    row = {"model": "m", "elements": 1000, "by the rule": False}
    rows = [row | {"method": "flat copy", "chunk": None, "median_ms": 0.5}]
    rows += [
        row | {"method": "cuda", "chunk": c, "median_ms": c / 1e6, "by the rule": c == 2048} for c in variants.CHUNKS
    ]
    rows[-1] = row | {"method": "cuda", "chunk": 16384, "why_not": "other bits"}
    lines = variants.table_of(rows).splitlines()
    assert lines[2].split() == ["flat", "copy", "500.0"]
    assert lines[3].split() == ["cuda", "1.0", "2.0*", "4.1", "8.2", "none"]
    assert lines[4] == "  cuda, 16384: other bits"


# ---------------------------------------------------------------- two reports side by side


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
        ({}, 0, "nowhere worse"),
        ({"median_ms": 10.0}, 0, "2.00"),  # a slower machine: the limit slowed with it
        ({"x_limit": 1.14}, 0, "nowhere worse"),
        ({"x_limit": 1.3}, 1, "1.05 x limit, now 1.30"),
        ({"operations": 2}, 1, "operations 1, now 2"),
        ({"gigabytes": 0.4}, 1, "gigabytes 0.3, now 0.4"),
        ({"median_ms": None, "x_limit": None, "why_not": "it broke"}, 1, "no figure any more: it broke"),
        ({"kind": "other"}, 2, "no measurement in common"),
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


def test_a_slower_peer_is_no_regression():
    old, new = ({(row["method"],): row for row in a_report()} for _ in range(2))
    new[("timm ModelEmaV3",)]["x_limit"] = 9.0
    lines, worse = compare.compare(old, new, 1.1)
    assert len(lines) == 2
    assert not worse
