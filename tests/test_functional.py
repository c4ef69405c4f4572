"""eman_update_ and ema_update_: against the published loop, their plan cache, and their errors."""

import copy
import gc
import weakref

import pytest
import torch
import torchvision
from conftest import assert_same_bits, lerp, profiled
from torch import nn
from torch._subclasses import FakeTensorMode

import eman_kernels
from eman_kernels import EMANTeacher, ema_update_, eman_update_, plan_for
from eman_kernels.networks import guards
from eman_kernels.update import eager
from eman_kernels.update.arguments import make_arguments


def perturbed(model):
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.05)
            else:
                tensor.add_(900)
    return other


@pytest.mark.parametrize("backend", ["cpu", "foreach", "reference"])
def test_a_whole_resnet_against_torch_lerp_and_the_published_formula(backend):
    if reason := eman_kernels.available_backends()[backend]:
        pytest.skip(reason)
    teacher = torchvision.models.resnet50().requires_grad_(False)
    student = perturbed(teacher)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    eman_update_(teacher, student, 0.999, backend=backend)
    followed = student.state_dict()
    for name, tensor in teacher.state_dict().items():
        if not tensor.is_floating_point():
            assert torch.equal(tensor, followed[name])
            continue
        assert_same_bits(tensor, lerp(before[name], followed[name], 0.999), name)
        published = before[name] * 0.999 + followed[name] * (1.0 - 0.999)
        ulp = torch.finfo(torch.float32).eps * torch.maximum(before[name].abs(), followed[name].abs())
        assert ((tensor - published).abs() <= ulp).all(), (
            f"{name}: differs from the published loop by more than about an ulp"
        )
    if backend == "cpu":
        assert "320 tensors" in plan_for(teacher, student).describe()
        assert not plan_for(teacher, student).ineligible


def test_the_published_loop_drifts_where_this_update_does_not():
    """For a teacher equal to its student, m t + (1 - m) s changes many elements and t + (1 - m)(s - t) none."""
    student = torch.rand(100_000) + 0.5
    teacher = student.clone()
    ema_update_([teacher], [student], 0.999)
    assert torch.equal(teacher, student)
    published = student * torch.tensor(0.999) + student * torch.tensor(1 - 0.999)
    assert (published != student).float().mean() > 0.1


def test_closed_form_after_k_steps():
    teacher, student = torch.zeros(1000, dtype=torch.float64), torch.ones(1000, dtype=torch.float64)
    for k in range(1, 101):
        ema_update_([teacher], [student], 0.97)
        torch.testing.assert_close(teacher, torch.full_like(teacher, 1 - 0.97**k), rtol=1e-13, atol=0)


def test_networks_and_their_plan_are_not_kept_alive():
    teacher, student = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)
    eman_update_(teacher, student, 0.5)
    plan = weakref.ref(plan_for(teacher, student))
    weight = weakref.ref(student.weight)
    del student
    gc.collect()
    assert weight() is None
    assert plan() is None
    other = nn.Linear(3, 3)
    eman_update_(teacher, other, 0.5)
    plan = weakref.ref(plan_for(teacher, other))
    del teacher
    gc.collect()
    assert plan() is None


def test_the_plan_of_a_list_is_cached(monkeypatch):
    plans, real = [], eager.Plan
    monkeypatch.setattr(eager, "Plan", lambda *args: plans.append(real(*args)) or plans[-1])
    teachers, students = [torch.zeros(3), torch.zeros(4)], [torch.ones(3), torch.ones(4)]
    for _ in range(3):
        ema_update_(teachers, students, 0.5)
    assert len(plans) == 1
    ema_update_(teachers, students[::1], 0.5, backend="reference")
    students[1] = torch.full((4,), 2.0)
    ema_update_(teachers, students, 0.0)
    ema_update_(teachers[:1], students[:1], 0.0)
    assert len(plans) == 4
    assert teachers[1].tolist() == [2.0] * 4


def test_one_teacher_of_two_students_and_two_teachers_of_one():
    students = [nn.Linear(2, 2) for _ in range(2)]
    teachers = [copy.deepcopy(students[0]).requires_grad_(False) for _ in range(2)]
    for teacher in teachers:
        for student in students:
            eman_update_(teacher, student, 0.0)
            assert torch.equal(teacher.weight, student.weight)


def test_options_of_one_pair_may_change():
    teacher, student = nn.BatchNorm1d(3).requires_grad_(False), nn.BatchNorm1d(3)
    student.running_mean.fill_(8.0)
    rules = {"running_mean": "skip"}
    eman_update_(teacher, student, 0.5, rules=rules)
    assert teacher.running_mean.tolist() == [0.0] * 3
    rules["running_mean"] = "ema"
    eman_update_(teacher, student, 0.5, rules=rules)
    assert teacher.running_mean.tolist() == [4.0] * 3
    eman_update_(teacher, student, 0.5, buffers="copy")
    assert teacher.running_mean.tolist() == [8.0] * 3


@pytest.mark.parametrize("momentum", [-0.1, 1.0001, float("nan"), float("inf")])
def test_momentum_out_of_range(momentum):
    teacher, student = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\]"):
        ema_update_([teacher], [student], momentum)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\]"):
        eman_update_(nn.Linear(1, 1), nn.Linear(1, 1), momentum)
    assert (teacher == 0).all()


def test_momentum_of_a_wrong_type():
    teacher, student = [torch.zeros(1)], [torch.ones(1)]
    with pytest.raises(TypeError, match=r"a number in .*not a str"):
        ema_update_(teacher, student, "0.5")
    for tensor in (torch.ones(1), torch.tensor(1), torch.tensor(0.5, dtype=torch.float16)):
        with pytest.raises(TypeError, match=r"must be 0-d and float32 or float64, but it is torch\.\w+ of shape"):
            ema_update_(teacher, student, tensor)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\], but is 1.5"):
        ema_update_(teacher, student, torch.tensor(1.5))
    with pytest.raises(ValueError, match=r"momentum is on meta and the teacher on cpu; move it there"):
        ema_update_(teacher, student, torch.tensor(0.5, device="meta"))
    assert teacher[0] == 0


@pytest.mark.parametrize("backend", ["cpu", "foreach", "reference"])
def test_a_teacher_that_requires_grad_is_updated_without_a_graph(backend):
    if reason := eman_kernels.available_backends()[backend]:
        pytest.skip(reason)
    teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
    want = lerp(teacher.weight.detach(), student.weight.detach(), 0.25)
    eman_update_(teacher, student, 0.25, backend=backend)
    assert_same_bits(teacher.weight, want)
    ema_update_([teacher.bias], [student.bias], 0.0, backend=backend)
    assert torch.equal(teacher.bias, student.bias)
    for tensor in teacher.parameters():
        assert tensor.is_leaf
        assert tensor.requires_grad
        assert tensor.grad_fn is None


def test_autograd_notices_the_update():
    """A backward pass that needs the old teacher raises, as after any in-place operation."""
    teacher, student = torch.randn(3), torch.randn(3)
    x = torch.randn(3, requires_grad=True)
    loss = (x * teacher).sum()
    ema_update_([teacher], [student], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_default_device_changes_nothing():
    """Tables that the host reads stay in host memory."""
    student = nn.Linear(300, 300)
    teacher = eman_kernels.EMANTeacher(student, momentum=0.0)
    with torch.no_grad():
        student.weight.fill_(2.0)
    with torch.device("meta"):
        teacher.update(student)
        assert teacher.state_dict()["_extra_state"] == 1
    assert (teacher.module.weight == 2).all()


def test_inference_mode():
    teacher, student = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    with torch.inference_mode():
        eman_update_(teacher, student, 0.0, backend="foreach")
        made_there = torch.zeros(3)
        ema_update_([made_there], [torch.ones(3)], 0.5)
    assert torch.equal(teacher.weight, student.weight)
    with torch.no_grad():
        student.weight.fill_(3.0)
    eman_update_(teacher, student, 0.0, backend="foreach")
    assert (teacher.weight == 3).all()
    assert (made_there == 0.5).all()


def test_the_same_module_or_shared_memory():
    net = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match=r"the same module.*deepcopy"):
        eman_update_(net, net, 0.5)
    shallow = copy.copy(net)
    with pytest.raises(ValueError, match="share memory"):
        eman_update_(shallow, net, 0.5)


def test_lists_of_different_length_or_shape():
    with pytest.raises(ValueError, match="2 teacher tensors and 1 student tensors"):
        ema_update_([torch.zeros(1), torch.zeros(1)], [torch.ones(1)], 0.5)
    with pytest.raises(ValueError, match="0 teacher tensors and 1 student"):
        ema_update_([], [torch.ones(1)], 0.5)
    with pytest.raises(ValueError, match=r"teacher_tensors\[1\]: the teacher's shape is \(2,\), the student's \(3,\)"):
        ema_update_([torch.zeros(1), torch.zeros(2)], [torch.ones(1), torch.ones(3)], 0.5)
    ema_update_([], [], 0.5)


def test_a_step_walks_no_modules_and_calls_no_state_dict(monkeypatch):
    """From the second update on, no code walks the module tree and no torch operation runs."""
    teacher, student = torchvision.models.resnet18().requires_grad_(False), torchvision.models.resnet18()
    eman_update_(teacher, student, 0.9)

    def forbidden(*args, **kwargs):
        raise AssertionError("a step walked the module tree")

    for name in ("named_modules", "state_dict", "named_parameters", "named_buffers", "parameters", "buffers"):
        monkeypatch.setattr(nn.Module, name, forbidden)
    with profiled(torch.profiler.ProfilerActivity.CPU) as profile:
        eman_update_(teacher, student, 0.9)
    if (
        eman_kernels.available_backends()["cpu"] is None and guards._extension_reads_torch
    ):  # torch 2.6 and 2.7 are queried from Python
        assert [event.key for event in profile.key_averages() if event.key.startswith("aten::")] == []


@pytest.mark.filterwarnings("default")  # torch.compile triggers warnings internally
def test_inside_compiled_code():
    teacher, student = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)
    keeper = eman_kernels.EMANTeacher(student, momentum=0.0)

    @torch.compile(backend="eager")
    def step(x):
        y = student(x).sum() * 2
        eman_update_(teacher, student, 0.0)
        keeper.update(student)
        return y + 1

    for k in range(3):
        with torch.no_grad():
            student.weight.fill_(float(k))
        step(torch.ones(2, 4))
        assert (teacher.weight == k).all()
        assert (keeper.module.weight == k).all()
    assert keeper.step == 3


def test_bad_options():
    teacher, student = torch.zeros(3), torch.ones(3)
    meta = torch.zeros((), device="meta", dtype=torch.int64)
    for options, error, words in (
        ({"rounding": "stochastic"}, ValueError, "needs step=, the number of this update"),
        (
            {"rounding": "stochastic", "step": torch.tensor(1.0)},
            TypeError,
            r"step .* 0-d and int64, but it is torch.float32",
        ),
        ({"nonfinite": "skip", "skipped": torch.zeros(2)}, TypeError, r"skipped .* torch.float32 of shape \(2,\)"),
        (
            {"nonfinite": "skip", "skipped": meta},
            ValueError,
            "the counter is on meta and the teacher on cpu",
        ),
        ({"found_inf": meta.float()}, ValueError, "the found_inf is on meta and the teacher on cpu; move it there"),
        ({"rounding": "stochastic", "step": meta}, ValueError, "the step is on meta and the teacher on cpu"),
    ):
        with pytest.raises(error, match=words):
            ema_update_([teacher], [student], 0.5, **options)
        assert not teacher.any()
    with pytest.raises(ValueError, match=r"the momentum is on meta .* or give the momentum as a number"):
        ema_update_([teacher], [student], torch.zeros((), device="meta"))


def test_found_inf_is_converted_for_the_kernels():
    """Converted to 0-d float32; GradScaler's tensor is used unchanged."""
    tiny = torch.tensor(1e-300, dtype=torch.float64)  # becomes 0 in float32
    for given in (torch.tensor(True), torch.tensor([2]), torch.tensor(1.0, dtype=torch.float64), tiny):
        found_inf = make_arguments([0.5], given).found_inf
        assert (found_inf.dtype, found_inf.dim(), bool(found_inf)) == (torch.float32, 0, True)
    with FakeTensorMode():
        without_memory = torch.zeros(())
    for name in ("found_inf", "momentum"):
        with pytest.raises(TypeError, match=rf"the {name} must be a plain torch.Tensor, .* not a .*FakeTensor"):
            ema_update_([torch.zeros(2)], [torch.ones(2)], **{"momentum": 0.5, name: without_memory})
    own = torch.tensor(0.0)
    assert make_arguments([0.5], own).found_inf.data_ptr() == own.data_ptr()


# ---------------------------------------------------------------- tensors without memory


def functionalized(call):
    return torch.func.functionalize(lambda p: (call(p), p + 1)[1])(torch.full((1,), 0.5))


def vmapped(call):
    return torch.vmap(lambda p: (call(p), p + 1)[1])(torch.full((1, 1), 0.5))


def differentiated(call):
    return torch.func.grad(lambda p: (call(p), p.sum())[1])(torch.full((1,), 0.5))


def freed(call):
    tensor = torch.ones(1)
    tensor.untyped_storage().resize_(0)
    call(tensor)


@pytest.mark.parametrize("backend", [None, "foreach", "reference"])
@pytest.mark.parametrize("without_memory", [functionalized, vmapped, differentiated, freed])
def test_tensors_without_memory_are_refused(without_memory, backend):
    """They are of type Tensor, and strided; a kernel would read or write at address 0."""
    other = torch.full((1,), 7.0)
    for call, error, what in (
        (lambda p: ema_update_([other], [p], 0.5, backend=backend), ValueError, "the student has no memory"),
        (lambda p: ema_update_([p], [other], 0.5, backend=backend), ValueError, "the teacher has no memory"),
        (lambda p: ema_update_([p, p + 0], [p + 0, p], 0.5, backend=backend), ValueError, "has no memory"),
        (lambda p: ema_update_([other], [other + 0], p.sum(), backend=backend), TypeError, "the momentum must be"),
        (
            lambda p: ema_update_([other], [other + 0], 0.5, found_inf=p, backend=backend),
            TypeError,
            "the found_inf must be",
        ),
    ):
        if without_memory is freed and ("momentum" in what or what == "has no memory"):
            continue  # p.sum() and p + 0 would read it
        with pytest.raises(error, match=what):
            without_memory(call)
        assert other == 7


@pytest.mark.parametrize("replaced", ["student", "teacher", "both"])
def test_networks_whose_tensors_a_transform_has_replaced(replaced):
    student = nn.BatchNorm1d(1, affine=False)
    teacher = EMANTeacher(student, 0.5)
    teacher.update(student)  # there is a plan
    networks = {"student": (student,), "teacher": (teacher.module,), "both": (student, teacher.module)}[replaced]

    def inside(p):
        for net in networks:
            net.running_mean = p + 0
        teacher.update(student)

    with pytest.raises(ValueError, match="has no memory"):
        functionalized(inside)
    assert teacher.step == 1
    for net in networks:
        net.running_mean = torch.ones(1)
    teacher.update(student)
    assert teacher.step == 2


def test_low_precision_copies_of_a_transform_are_replaced():
    student = nn.Linear(1, 1)
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16)
    expected = teacher(torch.ones(1, 1))
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16)
    functionalized(lambda p: teacher(p[None]))
    teacher.update(student)
    assert torch.equal(teacher(torch.ones(1, 1)), expected)


def test_a_zero_tensor_has_no_memory_and_is_a_student():
    teacher = torch.ones(3)
    ema_update_([teacher], [torch._efficientzerotensor(3)], 0.25)
    assert teacher.tolist() == [0.25] * 3


def test_named_parameters_with_the_signature_of_old_torch():
    class Old(nn.Linear):
        def named_parameters(self, prefix="", recurse=True):
            return super().named_parameters(prefix, recurse)

        def named_buffers(self, prefix="", recurse=True):
            return super().named_buffers(prefix, recurse)

    teacher, student = Old(2, 2), nn.Sequential(Old(2, 2))
    eman_update_(teacher, student[0], 0.0)
    assert torch.equal(teacher.weight, student[0].weight)
    averaged = EMANTeacher(student, 0.0)
    with torch.no_grad():
        student[0].weight.fill_(3)
    averaged.update(student)
    assert (averaged.module[0].weight == 3).all()

    class Broken(nn.Linear):
        def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
            raise TypeError("of its own")

    with pytest.raises(TypeError, match="of its own"):
        eman_update_(Broken(2, 2), Broken(2, 2), 0.0)
