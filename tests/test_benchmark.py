"""The benchmark refuses a speed for a wrong result, sees what each library does, and counts what is claimed."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torchvision

from eman_kernels import available_backends

REMEDY = "pip install '.[bench]'"
for package in ("tabulate", "tqdm"):
    pytest.importorskip(package, reason=f"{package} is not installed: {REMEDY}")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import checks  # noqa: E402
import compare  # noqa: E402
import counts  # noqa: E402
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
    counted = counts.counts(following.update, following.plan())
    counters = 53 * 2 * 8
    assert counted.operations == operations
    assert round(1e9 * counted.gigabytes) == each * (25_557_032 + 2 * 26_560) + counters
    assert counted.syncs == 0


@torch.no_grad()
def test_a_wait_for_the_device_is_counted():
    there = torch.ones(3)
    assert counts.counts(lambda: there.sum().item(), None).syncs == 1


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
    # 776 a tensor when this was written, kernel and all; the loop has 65,000.
    assert each[OURS] < 900
    assert each[updates.LOOP] > 10 * each[OURS]


# ---------------------------------------------------------------- what each method does


def tiny_pair():
    torch.manual_seed(0)
    teacher = checks.Tiny(8).requires_grad_(False)
    return teacher, models.student_of(teacher)


@pytest.mark.filterwarnings("ignore")  # what a library warns of is its own matter
@pytest.mark.parametrize("name", [name for name in peers.peers("bfloat16") if "apex" not in name])
@torch.no_grad()
def test_a_library_does_what_it_claims_and_nothing_else_is_taken_for_it(name):
    method = peers.peers("bfloat16")[name]
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


def test_the_readme_shows_the_newest_report():
    report = pytest.importorskip("report", reason=f"matplotlib is not installed: {REMEDY}")
    newest = max((BENCHMARKS / "results").glob("cpu-*.json"))
    rows = json.loads(newest.read_text())
    readme = (BENCHMARKS.parent / "README.md").read_text()
    assert readme == tables.embed(readme, "make report", report.block(rows, newest.stem))
    for name in ("float32", "growth"):
        assert newest.with_name(f"{newest.stem}-{name}.png").exists()


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
