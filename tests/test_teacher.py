"""EMANTeacher in training loops, checkpoints, copies and compiled code."""

import copy
import io
import operator
import pickle
import re
import shutil
import warnings

import pytest
import torch
from conftest import assert_same_bits, lerp
from torch import nn

from eman_kernels import (
    EMANTeacher,
    EMANTeachers,
    available_backends,
    ema_update_,
    eman_update_,
    plan_for,
    schedules,
)


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(4))


@pytest.fixture
def student():
    model = net()
    model(torch.randn(2, 3, 6, 6))
    return model


def train_step(student):
    student.train()
    student(torch.randn(4, 3, 6, 6)).pow(2).mean().backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= 0.1 * parameter.grad
    student.zero_grad()


def test_it_is_a_frozen_copy_in_eval_mode(student):
    student.train()
    teacher = EMANTeacher(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert student.training
    assert next(student.parameters()).requires_grad
    assert list(teacher.module.state_dict()) == list(student.state_dict())
    for mine, its in zip(teacher.module.state_dict().values(), student.state_dict().values(), strict=True):
        assert torch.equal(mine, its)
        assert mine.data_ptr() != its.data_ptr()


def test_train_does_not_change_its_mode(student):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher = EMANTeacher(student)

    both = Both()
    for module in (both, both.teacher):
        module.train()
        assert not any(m.training for m in both.teacher.modules())


def test_the_output_for_a_sample_does_not_depend_on_the_batch(student):
    train_step(student)
    teacher = EMANTeacher(student).train()
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(teacher(x)[:1], teacher(x[:1]))
    student.train()
    assert not torch.allclose(student(x)[:1], student(x[:2])[:1])


def test_forward_has_no_gradients(student):
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    assert not EMANTeacher(student)(x).requires_grad


def test_update_follows_parameters_and_statistics(student):
    teacher = EMANTeacher(student, momentum=0.9)
    for k in range(3):
        train_step(student)
        before = copy.deepcopy(teacher.module.state_dict())
        teacher.update(student)
        for name, tensor in teacher.module.state_dict().items():
            want = student.state_dict()[name]
            assert_same_bits(tensor, lerp(before[name], want, 0.9) if want.is_floating_point() else want, name)
        assert teacher.step == k + 1
    assert teacher.module[1].num_batches_tracked == student[1].num_batches_tracked > 0


def test_update_remembers_the_student_and_raises_without_one(student):
    """The constructor has seen the student too."""
    teacher = EMANTeacher(student, momentum=0.0)
    for _ in range(2):
        train_step(student)
        teacher.update()
        assert torch.equal(teacher.module[0].weight, student[0].weight)
    assert teacher.step == 2
    other = copy.deepcopy(student)
    teacher.update(other)
    train_step(student)
    teacher.update()
    assert torch.equal(teacher.module[0].weight, other[0].weight)
    for call in (lambda t: t.update(), lambda t: t.swap()):
        with pytest.raises(RuntimeError, match=r"no student has been seen.*update\(student\) or swapped\(student\)"):
            call(copy.deepcopy(teacher))
    freed = EMANTeacher(copy.deepcopy(student))
    with pytest.raises(RuntimeError, match="it has been freed"):
        freed.update()


def test_a_loaded_teacher_is_swapped_with_the_student_of_its_constructor(student):
    state = copy.deepcopy(EMANTeacher(student).state_dict())
    train_step(student)
    weight = student[0].weight.detach().clone()
    teacher = EMANTeacher(student)
    teacher.load_state_dict(state)
    with teacher.swapped():
        assert torch.equal(student[0].weight, state["module.0.weight"])
    assert torch.equal(student[0].weight, weight)
    teachers = EMANTeachers(student, [0.0, 0.5])
    train_step(student)
    teachers.update()
    assert torch.equal(teachers[0].module[0].weight, student[0].weight)


def test_momentum_may_be_a_schedule_and_be_overridden(student):
    asked = []

    def schedule(step):
        asked.append(step)
        return 0.5

    teacher = EMANTeacher(student, momentum=schedule)
    teacher.update(student)
    teacher.update(student, momentum=1.0)
    teacher.update(student)
    assert asked == [0, 2]
    assert teacher.step == 3
    with torch.no_grad():
        student[0].bias.fill_(5.0)
    teacher.update(student, momentum=0.0)
    assert (teacher.module[0].bias == 5).all()


def test_a_failed_update_does_not_count(student):
    teacher = EMANTeacher(student, momentum=lambda step: 2.0)
    with pytest.raises(ValueError, match="momentum must be in"):
        teacher.update(student)
    with pytest.raises(ValueError, match="cannot follow"):
        teacher.update(nn.Linear(2, 2), momentum=0.5)
    assert teacher.step == 0


def test_float32_teacher_of_a_bfloat16_student(student):
    student = student.to(torch.bfloat16)
    teacher = EMANTeacher(student, momentum=0.99, dtype=torch.float32)
    assert {t.dtype for t in teacher.module.state_dict().values()} == {torch.float32, torch.int64}
    with torch.no_grad():
        for tensor in student.parameters():
            tensor.mul_(1.05)
    before = copy.deepcopy(teacher.module.state_dict())
    teacher.update(student)
    for name, tensor in teacher.module.state_dict().items():
        if tensor.is_floating_point():
            assert_same_bits(tensor, lerp(before[name], student.state_dict()[name], 0.99), name)
    assert not plan_for(teacher.module, student).ineligible


@pytest.mark.parametrize("into", ["fresh", "planned"])
@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_resumes_exactly(student, into, assign):
    schedule = schedules.Cosine(0.9, 20)
    teacher = EMANTeacher(student, schedule)
    for _ in range(5):
        train_step(student)
        teacher.update(student)
    file = io.BytesIO()
    torch.save({"student": student.state_dict(), "teacher": teacher.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second_student = copy.deepcopy(student)
    second = EMANTeacher(second_student, schedule)
    if into == "planned":
        for _ in range(2):
            train_step(second_student)
            second.update(second_student)
    second_student.load_state_dict(saved["student"])
    second.load_state_dict(saved["teacher"], assign=assign)
    assert second.step == 5
    for one, other in ((student, teacher), (second_student, second)):
        torch.manual_seed(1)
        for _ in range(4):
            train_step(one)
            other.update(one)
    assert second.step == teacher.step == 9
    for name, tensor in teacher.module.state_dict().items():
        assert torch.equal(tensor, second.module.state_dict()[name]), name


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda teacher: pickle.loads(pickle.dumps(teacher))])
def test_deepcopy_and_pickle(student, clone):
    teacher = EMANTeacher(student, schedules.WarmUp(0.99), rules={"0.*": "copy"}, buffers="copy", backend="reference")
    teacher.update(student)
    twin = clone(teacher)
    train_step(student)
    for each in (teacher, twin):
        each.update(student)
    assert twin.step == teacher.step == 2
    assert (twin.rules, twin.buffer_rule, twin.backend) == ({"0.*": "copy"}, "copy", "reference")
    for name, tensor in teacher.module.state_dict().items():
        assert torch.equal(tensor, twin.module.state_dict()[name]), name
        assert tensor.data_ptr() != twin.module.state_dict()[name].data_ptr()


def test_to_another_dtype_after_the_plan_was_made(student):
    teacher = EMANTeacher(student, momentum=0.5)
    teacher.update(student)
    teacher.to(torch.float64)
    train_step(student)
    before = teacher.module[0].weight.clone()
    teacher.update(student)
    assert_same_bits(teacher.module[0].weight, lerp(before, student[0].weight.detach(), 0.5))


# ---------------------------------------------------------------- a low-precision copy for the forward


def test_cast_runs_a_copy_and_keeps_a_float32_master(student):
    train_step(student)
    teacher = EMANTeacher(student, momentum=0.9, cast=torch.bfloat16)
    x = torch.randn(4, 3, 6, 6)
    teacher(x)
    first = list(teacher.state.low_precision.copies)
    for _ in range(3):
        train_step(student)
        before = copy.deepcopy(teacher.module.state_dict())
        teacher.update(student)
        for name, tensor in teacher.module.state_dict().items():
            want = student.state_dict()[name]
            assert_same_bits(tensor, lerp(before[name], want, 0.9) if want.is_floating_point() else want, name)
        # The update wrote the copy too: no forward has run yet.
        for name, low in teacher.state.low_precision.tensors.items():
            assert torch.equal(low, teacher.module.state_dict()[name].to(torch.bfloat16))
        # The forward equals that of a freshly cast network whose BatchNorm is not cast.
        fresh = copy.deepcopy(teacher.module)
        for layer in (fresh[0], fresh[3]):
            layer.to(torch.bfloat16)
        out = teacher(x)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, fresh(x.to(torch.bfloat16)))
        assert all(map(operator.is_, teacher.state.low_precision.copies, first))
    plan = plan_for(teacher.module, student)
    assert not plan.ineligible
    assert [work.general for _, work in plan.works] == [True]
    assert {t.dtype for t in teacher.state_dict().values()} == {torch.float32, torch.int64}
    assert list(teacher.state_dict()) == list(EMANTeacher(student).state_dict())
    assert list(teacher.state.low_precision.tensors) == ["0.weight", "0.bias", "3.weight", "3.bias"]


def test_cast_accepts_the_arguments_of_the_network(student):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4)

        def forward(self, indices, *, scale):
            return {"out": self.embedding(indices) * scale["by"]}

    teacher = EMANTeacher(Net(), cast=torch.float16)
    out = teacher(torch.tensor([1, 2]), scale={"by": torch.tensor(2.0)})["out"]
    assert out.dtype == torch.float16
    assert torch.equal(out, teacher.module.embedding.weight.half()[1:3] * 2)


def change_in_place(teacher):
    with torch.no_grad():
        teacher.module[0].weight.add_(1)


def load(teacher, assign=False):
    state = {name: t + 1 if t.is_floating_point() else t for name, t in teacher.state_dict().items()}
    teacher.load_state_dict(state, assign=assign)


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        load,
        lambda teacher: load(teacher, assign=True),
        lambda teacher: teacher.module.load_state_dict({n: t + 1 for n, t in teacher.module.state_dict().items()}),
        lambda teacher: setattr(teacher.module[0].weight, "data", teacher.module[0].weight.data + 1),
        lambda teacher: teacher.module[0].to(torch.float64).to(torch.float32),
        lambda teacher: teacher.module.__setitem__(3, nn.Linear(128, 4)),
    ],
)
def test_cast_detects_changes_of_the_master(student, change):
    teacher = EMANTeacher(student, momentum=1.0, cast=torch.bfloat16)
    teacher.update(student)
    x = torch.randn(2, 3, 6, 6)
    teacher(x)
    change(teacher)
    fresh = copy.deepcopy(teacher.module)
    for layer in (fresh[0], fresh[3]):
        layer.to(torch.bfloat16)
    assert torch.equal(teacher(x), fresh(x.to(torch.bfloat16)))
    train_step(student)
    teacher.update(student, momentum=0.0)
    assert torch.equal(teacher.state.low_precision.tensors["0.weight"], student[0].weight.to(torch.bfloat16))


def delete_and_make_a_layer(teacher):
    """The new tensors can have the addresses and versions of the old ones."""
    del teacher.module[0]
    teacher.module.insert(0, nn.Conv2d(3, 8, 3))


def share_and_write(teacher):
    """A new parameter on the same memory has its own version counter."""
    with torch.no_grad():
        for layer in (teacher.module[0], teacher.module[3]):
            layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
            layer.weight.add_(1)


def swap_impls(teacher):
    weight = teacher.module[0].weight
    torch.utils.swap_tensors(weight, nn.Parameter(torch.randn_like(weight), requires_grad=False))


def expected(teacher, x):
    """The forward of a freshly cast network whose BatchNorm is not cast."""
    fresh = copy.deepcopy(teacher.module).eval()
    for layer in (fresh[0], fresh[3]):
        layer.to(torch.bfloat16)
    if fresh[1].weight.dtype != torch.bfloat16:
        fresh[1].float()
    with torch.no_grad():
        return fresh(x.to(torch.bfloat16))


@pytest.mark.parametrize("updates", [0, 1, 2])
@pytest.mark.parametrize(
    "change",
    [
        delete_and_make_a_layer,
        share_and_write,
        swap_impls,
        lambda teacher: teacher.half(),
        lambda teacher: teacher.double(),
        lambda teacher: teacher.bfloat16(),
        lambda teacher: setattr(teacher, "module", net().eval()),
    ],
    ids=lambda change: change.__name__,
)
def test_the_copy_follows_every_change_of_the_teacher(student, change, updates):
    teacher = EMANTeacher(student, momentum=0.5, cast=torch.bfloat16)
    x = torch.randn(2, 3, 6, 6)
    teacher(x)
    for _ in range(updates):
        teacher.update(student)
    change(teacher)
    if isinstance(teacher.module[3], nn.LazyLinear):
        teacher.module(x)
    for _ in range(2):
        assert torch.equal(teacher(x), expected(teacher, x))
        train_step(student)
        teacher.update(student)


def test_a_float64_network_with_a_copy():
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 4)).double()
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16)
    x = torch.randn(2, 3, 6, 6)
    for _ in range(2):
        assert torch.equal(teacher(x), expected(teacher, x))
        with torch.no_grad():
            student[0].weight.add_(1)
            student[1].running_mean.add_(1)
        before = teacher.module[0].weight.clone()
        teacher.update(student)
        assert_same_bits(teacher.module[0].weight, lerp(before, student[0].weight.detach(), 0.5))


def test_the_forward_runs_the_teachers_modules(student):
    """Hooks, attributes and values stored by a forward: there is no second network."""
    seen = []
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16)
    x = torch.randn(2, 3, 6, 6)
    teacher(x)
    teacher.module[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    teacher.module[0].padding = (1, 1)
    teacher.module[3] = nn.Linear(288, 4)
    assert teacher(x).shape == (2, 4)
    assert seen == [torch.bfloat16]

    class Keeps(nn.Linear):
        def forward(self, x):
            self.kept = super().forward(x)
            return self.kept

    teacher = EMANTeacher(Keeps(3, 3), 0.5, cast=torch.bfloat16)
    out = teacher(torch.randn(2, 3))
    assert teacher.module.kept is out
    assert teacher.module.weight.dtype == torch.float32
    assert {name for name, _ in teacher.named_parameters()} == {"module.weight", "module.bias"}


def test_a_module_under_two_names_keeps_its_tensors_when_it_runs_with_a_copy():
    """If both names were substituted, the copy would remain in the module, and updates would miss it."""
    layer = nn.Linear(4, 4)
    student = nn.Sequential(layer, nn.Sequential(layer, nn.BatchNorm1d(4)))
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16)
    held = list(teacher.module.parameters())
    out = teacher(torch.ones(2, 4))
    assert out.dtype == torch.bfloat16
    assert [id(p) for p in teacher.module.parameters()] == [id(p) for p in held]
    with torch.no_grad():
        layer.weight.fill_(3)
        teacher.module[0].weight.fill_(1)
    teacher.update(student)
    assert (teacher.module[0].weight == 2).all()
    assert (teacher.module[1][0].weight == 2).all()


class TwoNames(nn.Module):
    """One module holds a parameter under two names and reads both."""

    def __init__(self):
        super().__init__()
        self.one = self.two = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x @ self.one + x @ self.two


def test_a_parameter_under_two_names_of_one_module_is_read_through_its_copy():
    student = TwoNames()
    teacher = EMANTeacher(student, 0.0, cast=torch.bfloat16)
    x = torch.randn(2, 4)
    for _ in range(2):
        assert torch.equal(teacher(x), copy.deepcopy(student).bfloat16()(x.bfloat16()))
        assert teacher.module.one is teacher.module.two
        assert teacher.module.one.dtype == torch.float32
        with torch.no_grad():
            student.one.add_(1)
        teacher.update(student)


def test_tied_weights_share_their_copy():
    student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    student[1].weight = student[0].weight
    teacher = EMANTeacher(student, 0.0, cast=torch.float16)
    teacher(torch.randn(1, 4))
    assert teacher.state.low_precision.tensors["0.weight"] is teacher.state.low_precision.tensors["1.weight"]
    assert len(teacher.state.low_precision.copies) == 3
    with torch.no_grad():
        student[0].weight.add_(1)
    teacher.update(student)
    x = torch.randn(2, 4)
    assert torch.equal(teacher(x), copy.deepcopy(student).half()(x.half()))


@pytest.mark.parametrize(
    "write",
    [
        lambda weight: weight.data.copy_(torch.ones_like(weight)),
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.numpy().fill(3.0),
    ],
)
def test_refresh_after_a_write_that_torch_does_not_track(student, write):
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16)
    teacher.refresh()
    x = torch.randn(2, 3, 6, 6)
    before = teacher(x)
    write(teacher.module[0].weight)
    assert torch.equal(teacher(x), before), "the write was detected: the docstring of refresh() is wrong"
    low = teacher.state.low_precision.copies[0]
    teacher.refresh()
    assert torch.equal(teacher(x), expected(teacher, x))
    assert teacher.state.low_precision.copies[0] is low  # in place, because a captured graph reads it


def test_a_teacher_that_requires_grad_with_a_copy(student):
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16)
    teacher.module.requires_grad_(True)
    x = torch.randn(2, 3, 6, 6)
    for _ in range(2):
        assert torch.equal(teacher(x), expected(teacher, x))
        with torch.no_grad():
            teacher.module[0].weight.add_(1)
        teacher.update(student)
    assert not any(low.requires_grad for low in teacher.state.low_precision.copies)


def test_a_new_master_that_looks_like_a_freed_one():
    """The same addresses and version with other values, because Python and torch reuse what was freed last."""
    layer = nn.Linear(16, 16, bias=False)
    teacher = EMANTeacher(layer, 0.5, cast=torch.bfloat16)
    module, x = teacher.module, torch.eye(16)
    alike = 0
    for number in range(100):
        teacher(x)
        old = module.weight
        looks = id(old), old._version, old.data_ptr()
        module.weight = old = None
        new = nn.Parameter(torch.empty(16, 16), requires_grad=False)
        new.data.fill_(number)  # not counted in the version
        module.weight = new
        alike += looks == (id(new), new._version, new.data_ptr())
        del new
        assert torch.equal(teacher(x), torch.full((16, 16), number, dtype=torch.bfloat16))
    if not alike:
        pytest.skip("this Python reused no address")


def test_updates_of_several_teachers_write_the_copies_in_use(student):
    teachers = EMANTeachers(student, [0.5, 0.75], cast=torch.bfloat16)
    teachers[1](torch.randn(2, 3, 6, 6))
    train_step(student)
    teachers.update(student)
    copy = teachers[1].state.low_precision
    for name, low in copy.tensors.items():
        assert torch.equal(low, teachers[1].module.state_dict()[name].to(low.dtype)), name


@pytest.mark.parametrize("backend", ["cpu", "foreach", "reference"])
def test_an_update_allocates_no_new_copies(student, backend, monkeypatch):
    if reason := available_backends()[backend]:
        pytest.skip(reason)
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16, backend=backend)
    x = torch.randn(2, 3, 6, 6)
    teacher(x)
    train_step(student)
    teacher.update(student)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "_foreach_copy_", None)
        out = teacher(x)
    assert torch.equal(out, expected(teacher, x))


def test_swapped_with_a_copy(student):
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16)
    train_step(student)
    x = torch.randn(2, 3, 6, 6)
    before = teacher(x)
    with teacher.swapped(student):
        assert torch.equal(teacher(x), expected(teacher, x))
        assert not torch.equal(teacher(x), before)
    assert torch.equal(teacher(x), before)


# ---------------------------------------------------------------- torch.compile


class Graphs:
    """A torch.compile backend that runs graphs unchanged and counts them."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("forward_first", [False, True])
def test_compiled_it_is_one_graph_that_follows(student, cast, fullgraph, forward_first):
    teacher = EMANTeacher(student, 0.5, cast=cast)
    x = torch.randn(2, 3, 6, 6)
    if forward_first:
        teacher(x)
    graphs = Graphs()
    compiled = torch.compile(teacher, backend=graphs, fullgraph=fullgraph)
    outputs = [compiled(x)]
    for _ in range(4):
        train_step(student)
        teacher.update(student)
        outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], teacher(x), rtol=0, atol=1e-5)
        assert not torch.equal(outputs[-1], outputs[-2])
    for change in (change_in_place, load, lambda teacher: teacher.module[0].weight.data.mul_(2)):
        change(teacher)
        teacher.refresh()
        torch.testing.assert_close(compiled(x), teacher(x), rtol=0, atol=1e-5)
    # The graph needs no refresh.
    teacher.module[0].weight.data.mul_(2)
    changed = compiled(x)
    teacher.refresh()
    torch.testing.assert_close(changed, teacher(x), rtol=0, atol=1e-5)
    with teacher.swapped(student):
        torch.testing.assert_close(compiled(x), teacher(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(compiled(x), teacher(x), rtol=0, atol=1e-5)
    assert graphs.count == 1


@pytest.mark.build
@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # warnings of the compiler
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
def test_compiled_by_inductor(student, cast):
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler, and there is no g++")
    teacher = EMANTeacher(student, 0.5, cast=cast)
    compiled = torch.compile(teacher, fullgraph=True)
    x = torch.randn(2, 3, 6, 6)
    for _ in range(4):
        train_step(student)
        teacher.update(student)
        # In bfloat16, fused layers round less often than separate ones.
        torch.testing.assert_close(compiled(x), teacher(x), **({} if cast else {"rtol": 0, "atol": 1e-5}))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda teacher: pickle.loads(pickle.dumps(teacher))])
def test_cast_and_copies_of_the_teacher(student, clone):
    teacher = EMANTeacher(student, momentum=0.5, cast=torch.bfloat16)
    x = torch.randn(2, 3, 6, 6)
    teacher(x)  # makes the low-precision copy
    teacher.update(student)
    twin = clone(teacher)
    train_step(student)
    twin.update(student)
    assert not torch.equal(twin(x), teacher(x))
    assert (
        twin.state.low_precision.tensors["0.weight"].data_ptr()
        != teacher.state.low_precision.tensors["0.weight"].data_ptr()
    )


def test_bad_casts(student):
    with pytest.raises(ValueError, match=r"cast must be torch\.bfloat16 or torch\.float16, but is torch\.float32"):
        EMANTeacher(student, cast=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match=r"cast=torch\.bfloat16 is not narrower than the teacher.*dtype="):
            EMANTeacher(student, dtype=dtype, cast=torch.bfloat16)


# ---------------------------------------------------------------- the step, found_inf, skipped elements


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_found_inf_leaves_the_teacher_its_counters_and_its_step(student, capturable, dtype):
    teacher = EMANTeacher(student, schedules.WarmUp(0.9), capturable=capturable)
    train_step(student)
    teacher.update(student, found_inf=torch.tensor(0, dtype=dtype))
    assert teacher.step == 1
    before = copy.deepcopy(teacher.state_dict())
    train_step(student)
    teacher.update(student, found_inf=torch.tensor([1], dtype=dtype))
    assert teacher.step == 1
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    teacher.update(student, found_inf=torch.tensor(0, dtype=dtype))
    assert teacher.step == 2
    assert teacher.module[1].num_batches_tracked == student[1].num_batches_tracked


def test_found_inf_of_gradscaler(student):
    """GradScaler's tensor, in the loop of the README, with a real overflow."""
    teacher = EMANTeacher(student, momentum=0.5)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(3):
        loss = student(torch.randn(4, 3, 6, 6)).sum() * (float("inf") if step == 1 else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        (found_inf,) = scaler._found_inf_per_device(optimizer).values()
        scaler.update()
        teacher.update(student, found_inf=found_inf)
    assert teacher.step == 2


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16, "rounding": "stochastic", "seed": 5}], ids=str)
def test_a_step_on_the_device_is_the_same_as_one_on_the_host(student, options):
    schedule = schedules.Cosine(0.9, 8)
    teachers = [EMANTeacher(student, schedule, capturable=capturable, **options) for capturable in (False, True)]
    for _ in range(4):
        train_step(student)
        for teacher in teachers:
            teacher.update(student)
    assert isinstance(teachers[1].state.step, torch.Tensor)
    assert [teacher.step for teacher in teachers] == [4, 4]
    for one, other in zip(*(teacher.module.state_dict().values() for teacher in teachers), strict=True):
        assert torch.equal(one, other)
    resumed = EMANTeacher(student, schedule, capturable=True, **options)
    resumed.update(student)
    step = resumed.state.step
    resumed.load_state_dict(teachers[0].state_dict())
    assert resumed.step == 4
    assert resumed.state.step is step  # in place, because a captured graph reads it there
    train_step(student)
    for teacher in (*teachers, resumed):
        teacher.update(student)
    for one, *others in zip(*(t.module.state_dict().values() for t in (*teachers, resumed)), strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_nonfinite_elements_are_skipped_and_counted(student):
    teacher = EMANTeacher(student, momentum=0.5, nonfinite="skip")
    before = copy.deepcopy(teacher.module[0].weight)
    with torch.no_grad():
        student[0].weight[0] = torch.nan
        student[0].weight[1, 0, 0, 0] = torch.inf
    teacher.update(student)
    teacher.update(student)
    assert teacher.skipped == 2 * (27 + 1)
    assert torch.equal(teacher.module[0].weight[0], before[0])
    propagating = EMANTeacher(student, momentum=0.5)
    propagating.update(student)
    assert propagating.module[0].weight[0].isnan().all()
    assert propagating.skipped is None
    # Counting goes on from the checkpoint, in which every value is a tensor.
    state = teacher.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert int(state["_extra_state"]) == 2
    for resumed in (EMANTeacher(student, 0.5, nonfinite="skip"), copy.deepcopy(teacher)):
        counter = resumed.skipped
        resumed.load_state_dict(state)
        assert resumed.skipped == 2 * (27 + 1)
        assert counter is None or resumed.skipped is counter  # in place, because a captured graph reads it there
        resumed.update(student)
        assert resumed.skipped == 3 * (27 + 1)
    new = EMANTeacher(student, 0.5, nonfinite="skip").state_dict()
    assert new.keys() == state.keys(), "a checkpoint has the same names before the first update"
    assert int(new["_skipped"]) == 0
    nested = nn.ModuleDict({"teachers": EMANTeachers(student, [0.5, 0.9], nonfinite="skip")})
    nested["teachers"].update(student)
    again = nn.ModuleDict({"teachers": EMANTeachers(student, [0.5, 0.9], nonfinite="skip")})
    again.load_state_dict(nested.state_dict())
    assert again["teachers"].skipped == 27 + 1
    # A file without a count, and one that is refused, leave it as it is.
    del state["_skipped"]
    teacher.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        teacher.load_state_dict(state | {"_skipped": torch.tensor(7), "module.0.bias": torch.zeros(3)})
    assert teacher.skipped == 2 * (27 + 1)


# ---------------------------------------------------------------- several teachers, and swapping


def test_several_teachers_equal_separate_ones(student):
    momenta = [0.9, schedules.WarmUp(0.99), torch.tensor(0.9999, dtype=torch.float64)]
    teachers = EMANTeachers(student, momenta, nonfinite="skip", cast=torch.float16)
    alone = [EMANTeacher(student, momentum) for momentum in momenta]
    for _ in range(3):
        train_step(student)
        teachers.update(student)
        for teacher in alone:
            teacher.update(student)
    assert [teacher.step for teacher in teachers] == [3, 3, 3]
    for i, teacher in enumerate(alone):
        for name, tensor in teacher.module.state_dict().items():
            assert torch.equal(tensor, teachers[i].module.state_dict()[name]), (i, name)
    ((_, work),) = plan_for(teachers[0].module, student).works
    assert (work.n_teachers, work.general, sum(map(len, work.places.values()))) == (3, True, 3 * 9)
    x = torch.randn(2, 3, 6, 6)
    for out, teacher in zip(teachers(x), alone, strict=True):
        torch.testing.assert_close(out.float(), teacher(x), rtol=0.05, atol=0.05)
    assert teachers.skipped == 0
    assert len(teachers) == 3


def test_several_teachers_resume(student):
    teachers = EMANTeachers(student, [0.9, 0.5])
    train_step(student)
    teachers.update(student)
    again = EMANTeachers(student, [0.9, 0.5])
    again.load_state_dict(teachers.state_dict())
    train_step(student)
    again.update(student)
    teachers.update()
    for one, other in zip(teachers.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_one_of_several_is_replaced(student):
    """The plan depends on all teachers, not only on the first."""
    teachers = EMANTeachers(student, [0.0, 0.0])
    teachers.update(student)
    teachers.teachers[1] = EMANTeacher(student, 0.0)
    train_step(student)
    teachers.update(student)
    assert torch.equal(teachers[1].module[0].weight, student[0].weight)


def test_a_single_one_of_several_follows_the_optimizer(student):
    teachers = EMANTeachers(student, [0.5])
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    teachers.follow(optimizer, student)
    student(torch.randn(2, 3, 6, 6)).sum().backward()
    optimizer.step()
    assert [teacher.step for teacher in teachers] == [1]


def test_teachers_that_share_memory(student):
    teachers = EMANTeachers(student, [0.9, 0.5])
    teachers[1].module[0].weight = teachers[0].module[0].weight
    with pytest.raises(ValueError, match=r"teacher 1's 0\.weight and teacher 0's 0\.weight share memory"):
        teachers.update(student)
    teachers = EMANTeachers(student, [0.9, 0.5])
    memory = torch.zeros(10)
    teachers[0].module[1].weight.data, teachers[1].module[1].weight.data = memory[:8], memory[2:]
    with pytest.raises(ValueError, match=r"teacher 1's 1\.weight and teacher 0's 1\.weight share memory"):
        teachers.update(student)
    for momenta in ([], 9 * [0.9]):
        with pytest.raises(ValueError, match="momenta must be 1 to 8"):
            EMANTeachers(student, momenta)


def test_swapped(student):
    teacher = EMANTeacher(student, momentum=0.9)
    train_step(student)
    teacher.update(student)
    student.eval()
    x = torch.randn(2, 3, 6, 6)
    theirs, own = teacher(x), student(x)
    addresses = [t.data_ptr() for t in student.state_dict().values()]
    with teacher.swapped(student):
        assert torch.equal(student(x), theirs)
        assert torch.equal(teacher(x), own)
        with pytest.raises(RuntimeError, match="swapped with its student: update it after the swap"):
            teacher.update(student)
        with pytest.raises(RuntimeError, match="swapped already"), teacher.swapped():
            pass
    assert torch.equal(student(x), own)
    assert torch.equal(teacher(x), theirs)
    assert addresses == [t.data_ptr() for t in student.state_dict().values()]
    with pytest.raises(ZeroDivisionError), teacher.swapped():
        1 / 0  # noqa: B018
    assert torch.equal(student(x), own)
    teacher.update(student)


def test_autograd_notices_a_swap(student):
    teacher = EMANTeacher(student)
    loss = student(torch.randn(4, 3, 6, 6)).pow(2).sum()
    with (
        teacher.swapped(student),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        loss.backward()


def test_networks_that_cannot_be_swapped(student):
    teacher = EMANTeacher(student, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"0\.weight: the teacher is torch\.float64, the student torch\.float32"):
        teacher.swapped(student).__enter__()
    student.tied = student[0]
    student.view = nn.Module()
    teacher = EMANTeacher(student)
    student.view.weight = student[0].weight
    teacher.module.view.weight = nn.Parameter(teacher.module[0].weight.clone(), requires_grad=False)
    with pytest.raises(ValueError, match=r"the student's view\.weight and the student's 0\.weight share memory"):
        teacher.swapped(student).__enter__()


def test_bad_modes(student):
    with pytest.raises(ValueError, match="unknown rounding='up': it must be one of 'nearest', 'stochastic'"):
        EMANTeacher(student, rounding="up")
    with pytest.raises(ValueError, match="unknown nonfinite='drop': it must be one of 'propagate', 'skip'"):
        EMANTeacher(student, nonfinite="drop")
    with pytest.raises(ValueError, match=r"seed must be in \[0, 2\^32\), but is -1"):
        EMANTeacher(student, seed=-1)
    with pytest.raises(ValueError, match=r"found_inf must have one element, but its shape is \(2,\)"):
        EMANTeacher(student).update(student, found_inf=torch.zeros(2))


def test_bad_arguments(student):
    for momentum in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="momentum must be in"):
            EMANTeacher(student, momentum)
    with pytest.raises(ValueError, match="unknown backend='quick'"):
        EMANTeacher(student, backend="quick")
    with pytest.raises(ValueError, match=r"floating-point dtype, but is torch\.int8"):
        EMANTeacher(student, dtype=torch.int8)


# ---------------------------------------------------------------- what a low-precision forward writes


class Writes(nn.Module):
    """Writes its buffers, and a parameter, in the forward: in place or by assignment."""

    def __init__(self, assign):
        super().__init__()
        self.assign = assign
        self.layer = nn.Linear(4, 4)
        self.codes = nn.Parameter(torch.full((4,), 1 / 3))
        for name, value in (("count", torch.zeros(())), ("largest", torch.zeros(1)), ("seen", torch.full((2,), 1 / 3))):
            self.register_buffer(name, value)

    def forward(self, x):
        with torch.no_grad():
            if self.assign:
                self.count = self.count + 1
                self.largest = torch.maximum(self.largest, x.max())
                self.seen = torch.stack([self.seen[0] + 1, self.seen[1]])
            else:
                self.count += 1
                self.largest.clamp_(min=x.max())
                self.seen[0] += 1
                self.codes[0] = 5
        return self.layer(x) + self.codes


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("how", ["eager", "inference", "compiled"])
def test_a_low_precision_forward_keeps_what_it_writes(assign, how):
    if how == "compiled":
        torch.compiler.reset()  # another test of this process may have made torch skip the frame
    student = Writes(assign)
    teacher = EMANTeacher(student, 1.0, cast=torch.bfloat16)
    buffers = [id(buffer) for buffer in teacher.buffers()]
    run = torch.compile(teacher, backend="eager", fullgraph=True) if how == "compiled" else teacher
    with torch.inference_mode(how == "inference"):
        run(torch.ones(1, 4))
        run(torch.full((1, 4), 3.0))
    module = teacher.module
    assert (module.count, module.largest) == (2, 3)
    assert torch.allclose(module.seen, torch.tensor([7 / 3, 1 / 3]), atol=0.02)
    assert module.seen[1] == torch.tensor(1 / 3)  # what is not written is not rounded either
    assert all(t.dtype == torch.float32 for t in teacher.module.state_dict().values())
    assert [id(buffer) for buffer in teacher.buffers()] == buffers
    if not assign and how != "compiled":
        assert torch.equal(module.codes, torch.tensor([5.0, 1 / 3, 1 / 3, 1 / 3]))
    teacher.update(student)
    assert module.count == 2


def test_a_buffer_that_a_low_precision_forward_enlarges():
    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.register_buffer("seen", torch.zeros(0, 2))

        def forward(self, x):
            self.seen = torch.cat([self.seen, x])
            return self.layer(x)

    teacher = EMANTeacher(Grows(), cast=torch.bfloat16)
    for n in (1, 2):
        teacher(torch.ones(1, 2))
        assert torch.equal(teacher.module.seen, torch.ones(n, 2))


def test_a_low_precision_forward_that_raises_keeps_what_it_wrote():
    class Raises(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            raise ArithmeticError

    teacher = EMANTeacher(Raises(), cast=torch.bfloat16)
    for _ in range(2):
        with pytest.raises(ArithmeticError):
            teacher(torch.ones(1, 2))
    assert teacher.module.count == 2


def test_torch_jit_trace_with_a_copy(student):
    teacher, x = EMANTeacher(student, cast=torch.bfloat16), torch.randn(2, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"cast=.*deepcopy\(teacher\.module\)\.to"):
            torch.jit.trace(teacher, x)
    low = copy.deepcopy(teacher.module).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(low, x.bfloat16())
    torch.testing.assert_close(traced(x.bfloat16()), teacher(x), rtol=0.1, atol=0.1)
    assert teacher.cast is torch.bfloat16


# ---------------------------------------------------------------- dtypes


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex64))
        self.layer = nn.Linear(3, 3)
        self.register_buffer("angles", torch.polar(torch.ones(3), torch.arange(3.0)))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("dtype", "of_complex"),
    [
        (torch.float64, torch.complex128),
        (torch.float32, torch.complex64),
        (torch.bfloat16, torch.complex64),
        (torch.float16, torch.complex64),
    ],
)
def test_complex_tensors_stay_complex(dtype, of_complex, shared):
    student = Rotary()
    teacher = EMANTeacher(student, 0.5, dtype=dtype, rules={"layer.bias": "share"} if shared else None)
    module = teacher.module
    assert module.weight.dtype == module.angles.dtype == of_complex
    assert module.layer.weight.dtype == dtype
    assert torch.equal(module.angles, student.angles.to(of_complex))
    before = module.weight.detach().clone()
    with torch.no_grad():
        student.weight.add_(1 + 1j)
    teacher.update(student)
    torch.testing.assert_close(module.weight.detach(), before + (0.5 + 0.5j))
    teacher.to(torch.bfloat16)
    assert module.weight.dtype == of_complex


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_a_float32_teacher_stays_float32_when_tensors_are_assigned(student, several, within):
    student = student.bfloat16()
    teacher = EMANTeacher(student, 0.5, dtype=torch.float32)
    if several:
        teacher = EMANTeachers(student, [0.5], dtype=torch.float32)
    holder = nn.ModuleDict({"teacher": teacher}) if within else teacher
    state = {n: t.bfloat16() * 3 if t.is_floating_point() else t for n, t in holder.state_dict().items()}
    holder.load_state_dict(state, assign=True)
    for name, tensor in holder.state_dict().items():
        assert torch.equal(tensor, state[name].float() if state[name].is_floating_point() else state[name]), name
        assert tensor.dtype != torch.bfloat16, name
    teacher.update(student)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    plain = EMANTeacher(student)
    plain.load_state_dict({name: t.half() for name, t in plain.state_dict().items()}, assign=True)
    assert {p.dtype for p in plain.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("name", "relation"),
    [
        ("decay", "momentum=decay"),
        ("m", "momentum=m"),
        ("beta", "momentum=beta"),
        ("tau", "momentum=1 - tau"),
        ("alpha", "momentum=alpha"),
        ("alpha", "momentum=1 - alpha"),
    ],
)
def test_other_names_of_the_momentum_are_explained(name, relation):
    student = nn.Linear(2, 2)
    teacher, several = EMANTeacher(student), EMANTeachers(student, [0.9, 0.99])
    plain, given = copy.deepcopy(student), {name: 0.9}
    for call in (
        lambda: EMANTeacher(student, **given),
        lambda: EMANTeachers(student, [0.9], **given),
        lambda: teacher.update(student, **given),
        lambda: several.update(student, **given),
        lambda: eman_update_(plain, student, **given),
        lambda: ema_update_([plain.weight], [student.weight], **given),
    ):
        with pytest.raises(TypeError, match=re.escape(relation)):
            call()
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'"):
        teacher.update(student, rate=0.9)
    with pytest.raises(TypeError, match="missing"):
        eman_update_(plain, student)


def test_a_momentum_for_one_update_of_several_teachers():
    student = nn.Linear(2, 2)
    teachers = EMANTeachers(student, [0.9, lambda step: 0.99])
    with torch.no_grad():
        student.weight.fill_(8)
        for teacher in teachers:
            teacher.module.weight.fill_(0)
    teachers.update(student, momentum=0.75)
    assert all((teacher.module.weight == 2).all() for teacher in teachers)
    assert [teacher.step for teacher in teachers] == [1, 1]
    teachers.update(momentum=torch.tensor(0.0))
    assert all((teacher.module.weight == 8).all() for teacher in teachers)


def test_state_dict_takes_its_prefix_by_position():
    """As torch still allows, with a warning; the counts get the prefix too."""
    student = nn.Linear(1, 1)
    teacher = EMANTeacher(student, nonfinite="skip")
    teacher.update(student)
    by_name = teacher.state_dict(prefix="ema.")
    assert "ema._skipped" in by_name
    for arguments, prefix in ((({}, "ema."), "ema."), (({},), "")):
        with pytest.warns(FutureWarning, match="Positional args"):
            by_position = teacher.state_dict(*arguments)
        assert [*by_position] == [*teacher.state_dict(prefix=prefix)]
