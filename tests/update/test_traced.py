"""The operator, and updates in compiled graphs: the bits of eager code, one graph, no replanning or recompiling."""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import assert_same_bits
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from eman_kernels import EMANTeacher, EMANTeachers, ema_update_, eman_update_, schedules
from eman_kernels.update import eager

GRAD = "ignore:The .grad attribute of a Tensor that is not a leaf"  # the compiler and opcheck access .grad
COMPILERS = ["eager", "aot_eager", "inductor"]
op = torch.ops.eman_kernels.ema_update_


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Records each plan that is made."""
    made: list[object] = []
    plan = eager.Plan

    def recorded(*args: object) -> object:
        made.append(plan(*args))
        return made[-1]

    monkeypatch.setattr(eager, "Plan", recorded)
    return made


def compiled(function: Callable, backend: str, fullgraph: bool = True) -> tuple[Callable, list[object]]:
    """Compile with this backend. Also returns a list with one item per compiled graph."""
    graphs: list[object] = []
    inner = torch._dynamo.lookup_backend(backend)

    def counted(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return inner(graph, inputs)

    return torch.compile(function, backend=counted, fullgraph=fullgraph), graphs


def double(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)


def lists() -> tuple[list[Tensor], list[Tensor]]:
    teachers = [torch.randn(7, 3), torch.randn(5), torch.tensor(3)]
    return teachers, [torch.randn(7, 3), torch.randn(5), torch.tensor(8)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def walk(student: nn.Module) -> None:
    """Change parameters as an optimizer does, and buffers as a forward in training mode does."""
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += torch.randn_like(parameter)
        student(torch.randn(6, 3))


def assert_same(actual: nn.Module, expected: nn.Module) -> None:
    for name, tensor in expected.state_dict().items():
        if isinstance(tensor, Tensor):
            assert_same_bits(actual.state_dict()[name], tensor, name)


CALLS = {
    "plain": {},
    "copied": {"copied": [True, False, False]},
    "found_inf": {"found_inf": torch.zeros(())},
    "nonfinite": {"nonfinite": "skip", "skipped": torch.tensor(0)},
    "stochastic": {"rounding": "stochastic", "seed": 3, "step": torch.tensor(5)},
    "backend": {"backend": "foreach"},
}


@pytest.mark.filterwarnings(GRAD)
@pytest.mark.parametrize("options", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_passes_four_of_four(options: dict, requires_grad: bool):
    teachers, students = lists()
    for tensor in students[:2]:
        tensor.requires_grad_(requires_grad)
    results = torch.library.opcheck(op.default, (teachers, students, double(0.9)), options)
    assert list(results.values()) == ["SUCCESS"] * 4


def test_the_operator_behaves_like_an_optimizer_step():
    teachers, students = lists()
    for tensor in teachers[:2] + students[:2]:
        tensor.requires_grad_()
    expected = torch.lerp(teachers[0].detach(), students[0].detach(), 1 - 0.9)
    saved = teachers[0] ** 2
    op(teachers, students, double(0.9))
    assert_same_bits(teachers[0], expected)
    assert teachers[0].is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_copied_selects_tensors_that_are_not_averaged():
    teachers, students = lists()
    expected = torch.lerp(teachers[1], students[1], 1 - 0.9)
    op(teachers, students, double(0.9), copied=[True, False, False])
    assert_same_bits(teachers[0], students[0])
    assert_same_bits(teachers[1], expected)
    with pytest.raises(ValueError, match="zip"):
        op(teachers, students, double(0.9), copied=[True])


def test_the_operator_raises_the_errors_of_the_function():
    teachers, students = lists()
    before = [tensor.clone() for tensor in teachers]
    for arguments, options, match in [
        ((teachers, students[:2], double(0.9)), {}, "same length"),
        ((teachers, students, double(1.5)), {}, r"in \[0, 1\]"),
        ((teachers, students, double(0.9)), {"nonfinite": "skp"}, "unknown nonfinite"),
        ((teachers, teachers, double(0.9)), {}, "share memory"),
    ]:
        with pytest.raises(ValueError, match=match):
            op(*arguments, **options)
    for tensor, was in zip(teachers, before, strict=True):
        assert_same_bits(tensor, was)


@pytest.mark.parametrize(("backend", "call"), [*((backend, op) for backend in COMPILERS), ("eager", ema_update_)])
def test_lists_in_a_graph(backend: str, call: Callable, plans: list):
    teachers, students = lists()
    expected = [tensor.clone() for tensor in teachers]
    step, graphs = compiled(lambda t, s, m: call(t, s, m), backend)
    made = []
    for momentum in (0.9, 0.5, 0.99, 0.0, 0.7):
        for tensor in students:
            tensor += 1
        step(teachers, students, double(momentum))
        ema_update_(expected, students, momentum)
        for tensor, other in zip(teachers, expected, strict=True):
            assert_same_bits(tensor, other)
        made.append(len(graphs))
    assert made == made[:1] * 5
    # One per list. aot_eager, a debugging backend, runs the operator on new copies each time.
    assert len(plans) == 2 or backend == "aot_eager"


def test_a_momentum_given_as_a_number_costs_exactly_one_more_graph():
    teachers, students = lists()
    expected = [tensor.clone() for tensor in teachers]
    step, graphs = compiled(lambda m: ema_update_(teachers, students, m), "eager")
    for momentum in (0.9, 0.5, 0.99, 0.7):
        step(momentum)
        ema_update_(expected, students, momentum)
    assert_same_bits(teachers[0], expected[0])
    assert len(graphs) == 2


OPTIONS = {
    "constant": {"momentum": 0.9},
    "cosine": {"momentum": schedules.Cosine(0.9, 10)},
    "half life": {"momentum": schedules.HalfLife(10)},
    "power function": {"momentum": schedules.PowerFunction(0.1)},
    "warm-up": {"momentum": schedules.WarmUp(0.999)},
    "capturable": {"momentum": schedules.WarmUp(0.999), "capturable": True},
    "stochastic": {"momentum": 0.99, "dtype": torch.bfloat16, "rounding": "stochastic", "seed": 3},
    "nonfinite": {"nonfinite": "skip"},
    "rules": {"rules": {"0.*": "copy", "2.bias": "skip"}},
    "buffers": {"buffers": "copy"},
    "cast": {"cast": torch.bfloat16},
    "float32 of bfloat16": {"dtype": torch.float32},
}


def pair_of(options: dict) -> tuple[list[nn.Module], list[EMANTeacher]]:
    students = [network(), network()]
    if options.get("dtype") is torch.float32:
        students = [student.bfloat16() for student in students]
    return students, [EMANTeacher(student, **options) for student in students]


@pytest.mark.parametrize(
    ("backend", "options"),
    [pytest.param("eager", options, id=f"eager-{name}") for name, options in OPTIONS.items()]
    # The graphs of these differ by whether they have a tensor besides those of the networks.
    + [(backend, OPTIONS[name]) for backend in COMPILERS[1:] for name in ("nonfinite", "stochastic")],
)
def test_a_teacher_in_a_graph_equals_one_in_eager_code(backend: str, options: dict, plans: list):
    students, teachers = pair_of(options)
    step, graphs = compiled(lambda: teachers[0].update(students[0]), backend)
    for k in range(5):
        with torch.no_grad():
            for parameters in zip(*(student.parameters() for student in students), strict=True):
                noise = torch.randn_like(parameters[0])
                for parameter in parameters:
                    parameter += noise
            for student in students:
                student[1].running_mean += k
                student[1].num_batches_tracked += 1
                if options.get("nonfinite"):
                    student[0].weight[0, 0] = torch.nan
        step()
        teachers[1].update(students[1])
        assert_same(teachers[0].module, teachers[1].module)
        assert teachers[0].step == teachers[1].step == k + 1
    assert len(graphs) == 1
    assert len(plans) == 2 or backend == "aot_eager"
    if options.get("nonfinite"):
        assert teachers[0].skipped == teachers[1].skipped == 5
    # Continue in eager code without passing the student, then resume from a checkpoint.
    for teacher in teachers:
        teacher.update()
        assert teacher.step == 6
    assert_same(teachers[0].module, teachers[1].module)
    resumed = EMANTeacher(students[0], **options)
    resumed.load_state_dict(teachers[0].state_dict())
    assert resumed.step == 6


@pytest.mark.filterwarnings(GRAD)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_whole_training_step(backend: str, plans: list):
    """Forward, backward, optimizer and update: only torch's code breaks the graph, never the update."""
    students = [network(), network()]
    teachers = [EMANTeacher(student, schedules.WarmUp(0.99)) for student in students]
    optimizers = [torch.optim.SGD(student.parameters(), lr=0.1) for student in students]

    def step(i: int, x: Tensor) -> Tensor:
        loss = (students[i](x) - teachers[i](x)).square().mean() + students[i](x).square().mean()
        loss.backward()
        optimizers[i].step()
        optimizers[i].zero_grad()
        teachers[i].update(students[i])
        return loss.detach()

    torch._dynamo.utils.counters.clear()
    in_graphs, graphs = compiled(lambda x: step(0, x), backend, fullgraph=False)
    made = []
    for _ in range(6):
        x = torch.randn(8, 3)
        assert torch.allclose(in_graphs(x), step(1, x), rtol=1e-4)
        made.append((len(graphs), len(plans)))
    assert made[1:] == made[1:2] * 5  # the second step has gradients and optimizer state
    for a, b in zip(teachers[0].state_dict().values(), teachers[1].state_dict().values(), strict=True):
        assert torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-6)
    assert teachers[0].step == 6
    assert any(node.target is op for graph in graphs for node in graph.graph.nodes)
    assert not any("eman_kernels" in reason for reason in torch._dynamo.utils.counters["graph_break"])


def test_the_update_reads_buffers_written_by_the_forward_before_it():
    student = network()
    teacher = EMANTeacher(student, 0.0)

    def step(x: Tensor) -> Tensor:
        before = teacher(x)
        y = student(x)
        teacher.update(student)
        return y.sum() + before.sum()

    compiled(step, "inductor")[0](torch.randn(6, 3))
    assert student[1].num_batches_tracked == 1
    assert_same(teacher.module, student)


def test_what_a_graph_depends_on_can_change():
    student = network()
    teacher = EMANTeacher(student, 0.5)
    step, graphs = compiled(lambda s: teacher.update(s), "eager")

    def follows(s: nn.Module) -> None:
        walk(s)
        expected = EMANTeacher(s, 0.5)
        expected.module.load_state_dict(teacher.module.state_dict())
        step(s)
        expected.update(s)
        assert_same(teacher.module, expected.module)
        assert teacher.state.student() is s

    follows(student)
    student[0].weight = nn.Parameter(torch.randn(4, 3))
    follows(student)
    for module in (student, teacher.module):
        module[2] = nn.Linear(4, 5)
        module.add_module("3", nn.Linear(5, 2))
    follows(student)
    teacher.rules = {"3.*": "copy"}
    walk(student)
    step(student)
    assert_same_bits(teacher.module[3].weight, student[3].weight)
    teacher.rules = {}
    other = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.Linear(5, 2))
    follows(other)
    follows(student)
    teacher.momentum = 0.0
    step(student)
    assert_same(teacher.module, student)
    made = len(graphs)
    follows_no_more = teacher.step
    step(student)
    assert (len(graphs), teacher.step) == (made, follows_no_more + 1)


@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_found_inf_in_a_graph(found_inf: float):
    student = network()
    teacher, other = EMANTeacher(student, 0.5), EMANTeacher(student, 0.5)
    walk(student)
    step, graphs = compiled(lambda inf: teacher.update(student, found_inf=inf), "inductor")
    for _ in range(2):
        step(torch.tensor([found_inf]))
        other.update(student, found_inf=torch.tensor([found_inf]))
    assert teacher.step == other.step == (0 if found_inf else 2)
    assert_same(teacher.module, other.module)
    assert len(graphs) == 1


def test_several_teachers_and_a_network_in_a_graph():
    student = network()
    teachers, others = (EMANTeachers(student, [0.5, schedules.WarmUp(0.9)]) for _ in range(2))
    network_, other, wrapped = network(), network(), nn.DataParallel(student).cpu()

    def step(m: Tensor) -> None:
        teachers.update(student)
        eman_update_(network_, wrapped, m, rules={"0.*": "copy"}, buffers="skip")

    in_graph, graphs = compiled(step, "aot_eager")
    made = []
    for _ in range(3):
        walk(student)
        in_graph(double(0.3))
        made.append(len(graphs))
        others.update(student)
        eman_update_(other, student, 0.3, rules={"0.*": "copy"}, buffers="skip")
    assert made == made[:1] * 3
    assert_same(network_, other)
    for teacher, expected in zip(teachers, others, strict=True):
        assert_same(teacher.module, expected.module)
        assert teacher.step == 3


def test_a_schedule_that_cannot_be_traced_breaks_the_graph_and_is_used():
    student = network()
    momentum = lambda step: 0.0 if step < 2 else 1.0  # noqa: E731
    teacher = EMANTeacher(student, momentum)
    step, _ = compiled(lambda: teacher.update(student), "eager", fullgraph=False)
    for _ in range(2):
        walk(student)
        step()
        assert_same(teacher.module, student)
    before = teacher.module[0].weight.clone()
    walk(student)
    step()
    assert_same_bits(teacher.module[0].weight, before)
    assert teacher.step == 3


def test_networks_that_differ_are_an_error_at_compile_time():
    student = network()
    teacher = EMANTeacher(student)
    student[2] = nn.Linear(4, 3)
    with pytest.raises(Exception, match=r"2.weight: the teacher's shape is \(2, 4\), the student's \(3, 4\)"):
        compiled(lambda: teacher.update(student), "eager")[0]()
    assert teacher.step == 0


def test_swapping_breaks_the_graph_and_is_right():
    student = network().eval()
    teacher = EMANTeacher(student, 0.5)
    walk(student.train())
    student.eval()
    x = torch.randn(5, 3)

    def evaluate() -> Tensor:
        with teacher.swapped(student):
            return student(x)

    assert torch.allclose(torch.compile(evaluate, backend="eager")(), teacher(x))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(evaluate, backend="eager", fullgraph=True)()


def test_importing_and_updating_do_not_import_dynamo():
    code = (
        "import sys, torch\n"
        "import eman_kernels\n"
        "student = torch.nn.Linear(2, 2)\n"
        "teacher = eman_kernels.EMANTeacher(student)\n"
        "teacher.update(student)\n"
        "with teacher.swapped(): pass\n"
        "lists = [torch.zeros(1)], [torch.ones(1)]\n"
        "eman_kernels.ema_update_(*lists, 0.9)\n"
        "torch.ops.eman_kernels.ema_update_(*lists, torch.tensor(0.9))\n"
        "assert not {'torch._dynamo', 'triton'} & sys.modules.keys()\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ---------------------------------------------------------------- make_fx


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_update_of_lists(mode):
    def step(teacher, student):
        ema_update_([teacher], [student], 0.75)
        return teacher * 2

    graph = make_fx(step, tracing_mode=mode)(torch.zeros(3), torch.ones(3))
    teacher = torch.full((3,), 4.0)
    assert graph(teacher, torch.zeros(3)).tolist() == [6.0] * 3
    assert teacher.tolist() == [3.0] * 3


@pytest.mark.parametrize("schedule", [0.5, lambda step: 1 - 1 / (step + 2)])
def test_make_fx_records_the_update_of_a_teacher(schedule):
    student = nn.Linear(1, 1, bias=False)
    teacher, eager = EMANTeacher(student, schedule), EMANTeacher(student, schedule)

    def step(x):
        teacher.update(student)
        return teacher(x)

    graph = make_fx(step)(torch.ones(1, 1))
    eager.update(student)
    for value in (3.0, 5.0):
        with torch.no_grad():
            student.weight.fill_(value)
        result = graph(torch.ones(1, 1))
        eager.update(student)
        assert_same_bits(teacher.module.weight, eager.module.weight)
        assert torch.equal(result, eager(torch.ones(1, 1)))
    assert teacher.step == eager.step == 3
    teacher.update(student)
