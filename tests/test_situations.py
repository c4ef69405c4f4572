"""Situations reported by users of EMA teachers: the result is right, or an error says what to do."""

import copy
import functools
import itertools
import operator
import re
import threading
import types
import warnings
import weakref

import pytest
import torch
from conftest import TORCH, assert_same_bits
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, update_bn

import eman_kernels
from eman_kernels import EMANTeacher, EMANTeachers, ema_update_, eman_update_, plan_for, schedules


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def trained(module):
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return module


# ---------------------------------------------------------------- all or nothing


class Stubborn(torch.Tensor):
    """A subclass that can be copied but not averaged, like some quantized weights."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ in cls.REFUSED:
            raise NotImplementedError(f"aten.{func.__name__}")
        return super().__torch_function__(func, types, args, kwargs)

    REFUSED = ("lerp", "where")


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"rounding": "stochastic", "step": 0}])
@pytest.mark.parametrize("first", [True, False])
def test_a_subclass_that_torch_cannot_average(options, first):
    teachers = [torch.zeros(4) for _ in range(3)]
    students = [torch.ones(4) for _ in range(3)]
    teachers.insert(0 if first else 3, torch.zeros(4).as_subclass(Stubborn))
    students.insert(0 if first else 3, torch.ones(4).as_subclass(Stubborn))
    with pytest.raises(
        ValueError,
        match=r"(?s)nothing was written.*teacher_tensors\[\d\]: the teacher is a Stubborn.*aten\.(lerp|where)",
    ):
        ema_update_(teachers, students, 0.5, **options)
    assert all((tensor.as_subclass(torch.Tensor) == 0).all() for tensor in teachers)


def test_the_remedies_in_the_error_work():
    teacher, student = net(), net()
    teacher[0].weight = nn.Parameter(teacher[0].weight.detach().as_subclass(Stubborn), requires_grad=False)
    student[0].weight = nn.Parameter(student[0].weight.detach().as_subclass(Stubborn), requires_grad=False)
    before = teacher[2].weight.clone()
    with pytest.raises(ValueError, match=r"0\.weight: the teacher is a Stubborn"):
        eman_update_(teacher, student, 0.5)
    assert torch.equal(teacher[2].weight, before)
    eman_update_(teacher, student, 0.5, rules={"0.weight": "copy"})
    plain = [each[0].weight.detach().as_subclass(torch.Tensor) for each in (teacher, student)]
    assert torch.equal(*plain)
    eman_update_(teacher, student, 0.5, rules={"0.weight": "skip"})
    assert torch.equal(teacher[0].bias, torch.lerp(teacher[0].bias, student[0].bias, 0.5)) is False


class Closed(torch.Tensor):
    """A subclass that cannot be written."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func.__name__ == "copy_":
            raise TypeError("mixed torch.Tensor and Closed")
        return super().__torch_function__(func, types, args, kwargs)


def test_a_subclass_that_cannot_be_swapped():
    student = trained(net())
    teacher = EMANTeacher(student)
    for module in (student, teacher.module):
        module[0].bias = nn.Parameter(module[0].bias.detach().as_subclass(Closed), requires_grad=False)
    trained(student[2])
    before = teacher.module[2].weight.clone()
    with pytest.raises(ValueError, match=r"0\.bias: the teacher is a Closed.*cannot exchange.*mixed"):
        teacher.swap(student)
    assert torch.equal(teacher.module[2].weight, before)
    with pytest.raises(ValueError, match=r"0\.bias: the teacher is a Closed.*cannot average.*mixed"):
        teacher.update(student)
    assert torch.equal(teacher.module[2].weight, before)
    assert teacher.step == 0


class Tagged(torch.Tensor):
    pass


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"rounding": "stochastic", "step": 0}])
def test_a_subclass_that_can_be_averaged(options):
    teacher, student = torch.rand(5).as_subclass(Tagged), torch.rand(5).as_subclass(Tagged)
    expected = torch.lerp(teacher.as_subclass(torch.Tensor), student.as_subclass(torch.Tensor), 0.25)
    ema_update_([teacher], [student], 0.75, **options)
    assert torch.equal(teacher.as_subclass(torch.Tensor), expected)


# ---------------------------------------------------------------- updates without effect are reported


def test_parameters_partitioned_by_zero_3():
    student = net()
    teacher = EMANTeacher(student)
    for module in (teacher.module, student):
        for parameter in module.parameters():
            parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"(?s)0\.weight is empty \(6 of 6.*ZeRO-3.*GatheredParameters"):
        teacher.update(student)
    assert teacher.step == 0
    with pytest.raises(ValueError, match="GatheredParameters"):
        teacher.swap(student)


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_some_parameters_partitioned_by_zero_3(who):
    """ZeRO-3 does not partition small parameters."""
    student = net()
    teacher = EMANTeacher(student)
    weights = [module[0].weight for module in (teacher.module, student)]
    for weight in weights if who == "teacher" else weights[1:]:
        weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    with pytest.raises(ValueError, match=rf"the {who}'s 0\.weight is empty \(1 of 6"):
        teacher.update(student)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_an_intentionally_empty_parameter():
    student = nn.ModuleList([nn.Linear(3, 3), nn.Linear(0, 3)])
    teacher = EMANTeacher(student, 0.0)
    trained(student)
    teacher.update(student)
    assert torch.equal(teacher.module[1].bias, student[1].bias)


@pytest.mark.parametrize("rules", [{"*": "skip"}, {"[0-9].*": "skip"}])
def test_rules_that_skip_everything(rules):
    student = net()
    teacher = EMANTeacher(student, rules=rules)
    with pytest.warns(UserWarning, match="the rules skip every tensor") as seen:
        teacher.update(student)
    assert seen[0].filename == __file__
    teacher.update(student)  # no second warning
    assert teacher.step == 2


@pytest.mark.parametrize("momentum", [0.5, schedules.Cosine(0.9, 10)])
@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"capturable": True}])
def test_a_network_without_tensors(momentum, options):
    student = nn.Sequential(nn.ReLU(), nn.Flatten())
    teacher = EMANTeacher(student, momentum, **options)
    teacher.update(student)
    assert teacher.step == 1
    with teacher.swapped(student):
        pass


# ---------------------------------------------------------------- buffers whose average is not meaningful


def spectral_hook(layer):
    return nn.utils.spectral_norm(layer)


def spectral_parametrization(layer):
    return parametrizations.spectral_norm(layer)


@pytest.mark.parametrize("normed", [spectral_hook, spectral_parametrization])
def test_spectral_norm(normed):
    layer = normed(nn.Linear(16, 16))
    student = nn.Sequential(layer, nn.BatchNorm1d(16))
    teacher = EMANTeacher(nn.Sequential(normed(nn.Linear(16, 16)), nn.BatchNorm1d(16)), 0.9)
    for _ in range(5):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        student(torch.randn(8, 16))
        mean = teacher.module[1].running_mean.clone()
        teacher.update(student)
        assert torch.equal(teacher.module[1].running_mean, torch.lerp(mean, student[1].running_mean, 1 - 0.9))
        mine, theirs = dict(teacher.module.named_buffers()), dict(student.named_buffers())
        vectors = [name for name in mine if name.endswith(("_u", "_v"))]
        assert len(vectors) == 2
        assert all(torch.equal(mine[name], theirs[name]) for name in vectors)
    described = plan_for(teacher.module, student).describe()
    assert all(f"{name}: copied, because " in described for name in vectors)
    assert "running_mean" not in described


def test_masks_of_prune():
    student = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in student:
        prune.random_unstructured(layer, "weight", amount=0.5)
        prune.random_structured(layer, "weight", amount=0.25, dim=0)  # a PruningContainer with two methods
    second = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    for layer in second:
        prune.identity(layer, "weight")
    teacher = EMANTeacher(student, 0.9, module=second, keep_values=True)
    before = second[0].weight_orig.clone()
    teacher.update(student)
    for mine, theirs in zip(second, student, strict=True):
        assert torch.equal(mine.weight_mask, theirs.weight_mask)
        assert set(mine.weight_mask.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(second[0].weight_orig, torch.lerp(before, student[0].weight_orig, 1 - 0.9))


def test_quantization_observers():
    from torch.ao import quantization

    class Observed(nn.Sequential):
        pass

    student = Observed(nn.Linear(4, 4), quantization.MinMaxObserver(), quantization.FakeQuantize())
    teacher = EMANTeacher(student, 0.5)  # its observers start at +-inf
    student(torch.randn(8, 4))
    teacher.update(student)
    for name, buffer in student.named_buffers():
        assert torch.equal(dict(teacher.module.named_buffers())[name], buffer), name
    assert teacher.module[1].min_val.isfinite()


def test_a_users_rule_takes_precedence():
    student = nn.Sequential(spectral_parametrization(nn.Linear(4, 4)))
    teacher = EMANTeacher(student, 0.5, rules={"*._u": "ema", "*._v": "skip"})
    mine, theirs = dict(teacher.module.named_buffers()), dict(student.named_buffers())
    (u,), (v,) = ([name for name in mine if name.endswith(end)] for end in ("_u", "_v"))
    for name in (u, v):
        theirs[name].copy_(mine[name] + 1)
    before = {name: mine[name].clone() for name in (u, v)}
    teacher.update(student)
    assert torch.equal(mine[u], torch.lerp(before[u], theirs[u], 0.5))
    assert torch.equal(mine[v], before[v])
    teacher.buffer_rule, teacher.rules = "skip", {}
    teacher.update(student)
    assert torch.equal(mine[v], before[v])


# ---------------------------------------------------------------- arguments


def test_arguments_in_the_wrong_order():
    student = net()
    teacher = copy.deepcopy(student).requires_grad_(False)
    before = student[0].weight.clone()
    with pytest.raises(ValueError, match=r"swapped. The order is eman_update_\(teacher, student"):
        eman_update_(student, teacher, 0.99)
    with pytest.raises(ValueError, match=r"The order is ema_update_\(teacher_tensors, student_tensors"):
        ema_update_(student.parameters(), teacher.parameters(), 0.99)
    assert torch.equal(student[0].weight, before)
    # The order is right, but the teacher requires gradients, as deepcopy leaves it.
    eman_update_(copy.deepcopy(student), student, 0.99)
    averaged = copy.deepcopy(student)
    ema_update_(averaged.parameters(), [p.detach() for p in student.parameters()], 0.0)
    assert torch.equal(averaged[0].weight, student[0].weight)
    # The order is right, and the student is partly frozen.
    nn.init.ones_(student[0].weight.requires_grad_(False))
    eman_update_(averaged, student, 0.0)
    assert (averaged[0].weight == 1).all()


class KeepsAnActivation(nn.Linear):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class HoldsALock(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.lock = threading.Lock()


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.5)


UNCOPIABLE = {
    "an activation": (lambda: nn.Sequential(KeepsAnActivation(4, 4)), r"its 0\.last is the result of a computation"),
    "weight_norm": (lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4))), r"its 0\.weight is the result"),
    "prune": (lambda: nn.Sequential(pruned(nn.Linear(4, 4))), r"its 0\.weight is the result"),
    "a lock": (lambda: nn.Sequential(HoldsALock(4, 4)), r"its 0\.lock is a lock"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(("make", "cause"), UNCOPIABLE.values(), ids=UNCOPIABLE)
def test_a_student_that_cannot_be_copied(make, cause):
    student = trained(make())
    student(torch.randn(2, 4))
    with pytest.raises(TypeError, match=rf"(?s){cause}.*EMANTeacher\(student, module="):
        EMANTeacher(student)
    instance = make()
    teacher = EMANTeacher(student, 0.5, module=instance)
    assert teacher.module is instance
    for name, parameter in student.named_parameters():
        mine = dict(instance.named_parameters())[name]
        assert torch.equal(mine, parameter)
        assert not mine.requires_grad
    before = next(instance.parameters()).clone()
    trained(student)
    teacher.update(student)
    assert torch.equal(next(instance.parameters()), torch.lerp(before, next(student.parameters()), 0.5))


def test_an_activation_does_not_stop_cast():
    student = nn.Sequential(KeepsAnActivation(4, 4), nn.BatchNorm1d(4))
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16)
    x = torch.randn(3, 4)
    for _ in range(3):
        student(x).sum().backward()
        teacher.update(student)
        assert teacher(x).dtype == torch.bfloat16
        teacher.module(x.requires_grad_())
    assert teacher.step == 3


def test_an_existing_network_as_the_teacher():
    student, own = trained(net()), net()
    before = own[0].weight.clone()
    assert torch.equal(EMANTeacher(student, module=own, keep_values=True).module[0].weight, before)
    teacher = EMANTeacher(student, module=nn.DataParallel(own).cpu(), rules={"2.*": "skip"}, buffers="skip")
    assert teacher.module is own
    for name, value in student.state_dict().items():
        assert torch.equal(own.state_dict()[name], value), name  # including tensors that updates skip
    with pytest.raises(ValueError, match="the same module"):
        EMANTeacher(student, module=student)
    with pytest.raises(ValueError, match=r"2\.weight: the teacher's shape"):
        EMANTeacher(student, module=nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))


def test_a_frozen_base_that_both_share():
    student = net()
    second = net()
    second[0] = student[0].requires_grad_(False)
    teacher = EMANTeacher(student, 0.5, module=second, rules={"0.*": "skip"})
    assert teacher.module[0].weight.data_ptr() == student[0].weight.data_ptr()
    teacher.update(student)


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated")
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("compile", [torch.jit.script, lambda net: torch.jit.trace(net.eval(), torch.ones(3, 4))])
def test_a_student_with_scripted_modules(whole, compile):
    student = compile(net()) if whole else nn.Sequential(compile(net()), nn.Linear(2, 2))
    teacher = EMANTeacher(student, 0.25)
    before = [parameter.clone() for parameter in teacher.module.parameters()]
    trained(student)
    teacher.update(student)
    averages = [parameter.clone() for parameter in teacher.module.parameters()]
    for was, now, theirs in zip(before, averages, student.parameters(), strict=True):
        assert_same_bits(now, torch.lerp(was, theirs, 0.75))
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    x = torch.randn(3, 4)
    expected = teacher(x)
    with teacher.swapped(student):
        assert torch.equal(student.eval()(x), expected)
    copied = copy.deepcopy(teacher)
    assert torch.equal(copied(x), expected)
    with pytest.raises(ValueError, match=r"0\.weight: a ScriptModule holds it\n"):
        EMANTeacher(student, rules={"*": "share"})


@pytest.mark.parametrize("lazy", [nn.LazyLinear, nn.LazyConv1d])
@pytest.mark.parametrize("copiable", [True, False])
def test_lazy_modules_need_one_forward(lazy, copiable):
    def make():
        layer = lazy(4) if lazy is nn.LazyLinear else lazy(4, 1)
        return nn.Sequential(nn.Linear(4, 4) if copiable else KeepsAnActivation(4, 4), layer, nn.LazyBatchNorm1d())

    student, x = make(), torch.randn(4, 4, 4) if lazy is nn.LazyConv1d else torch.randn(4, 4)
    for options in ({}, {"module": make()}):
        with pytest.raises(ValueError, match=r"^1\.weight is lazy.*run one forward pass"):
            EMANTeacher(student, **options)
    student(x)
    own = make()
    own(x)
    teacher = EMANTeacher(student, 0.5, **({} if copiable else {"module": own}))
    teacher.update(student)
    assert torch.equal(teacher.module[1].weight, student[1].weight)


def test_a_student_that_grows():
    """The remedy in the error, as it is written there."""
    student = nn.Sequential(nn.Linear(4, 4))
    teacher = EMANTeacher(student, 0.5)
    teacher.update(student)
    student.head = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    before = copy.deepcopy(teacher.module.state_dict())
    with pytest.raises(ValueError, match=r"(?s)head\.0\.weight: the teacher has none.*was changed after") as error:
        teacher.update(student)
    assert before.keys() == teacher.module.state_dict().keys()
    remedy = re.search(r"teacher\.module\.head = .*?\(False\)", str(error.value))[0]
    exec(remedy, {"copy": copy, "teacher": teacher, "student": student})
    was = teacher.module.head[0].weight.clone()
    trained(student)
    teacher.update(student)
    assert_same_bits(teacher.module.head[0].weight, torch.lerp(was, student.head[0].weight, 0.5))
    assert not teacher(torch.ones(2, 4)).requires_grad
    assert not teacher.module.head[1].training


def patched(module, wrap):
    module.forward = wrap(module.forward)
    return module


def by_closure(forward):
    return lambda x: 2 * forward(x)


class Doubled:
    def __init__(self, forward):
        self.forward = forward

    def __call__(self, x):
        return 2 * self.forward(x)


@pytest.mark.parametrize("where", ["network", "layer"])
def test_a_forward_that_was_patched_by_a_closure(where):
    student = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    patched(student if where == "network" else student[1], by_closure)
    with pytest.warns(UserWarning, match=r"the teacher would run the student"):
        EMANTeacher(student)


class Tied(nn.Module):
    """What it does with its layer is set per instance."""

    def __init__(self, how):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        how(self)

    def forward(self, x):
        return x


def by_attribute(net):
    net.tied = lambda x: x @ net.layer.weight


def by_a_list_of_functions(net):
    net.steps = [torch.relu, {"last": lambda x: net.layer(x)}]


def by_a_replaced_method(net):
    net.layer.extra_repr = functools.partial(lambda: str(net.layer.weight))


def by_a_hook(net):
    net.register_forward_hook(lambda module, args, out: net.layer(out))


def by_a_pre_hook(net):
    net.layer.register_forward_pre_hook(lambda module, args: (args[0] @ net.layer.weight,))


def by_a_dict(net):
    held = {"layers": [net.layer]}
    net.tied = lambda x: held["layers"][0](x)


def by_a_namespace(net):
    held = types.SimpleNamespace(net=net)
    net.tied = lambda x: held.net.layer(x)


def by_another_network(net):
    held = nn.Sequential(net.layer)
    net.tied = lambda x: held(x)


def by_a_tensor(net):
    weight = net.layer.weight
    net.tied = lambda x: x @ weight


def by_a_view(net):
    weight = net.layer.weight.data.t()
    net.tied = lambda x, weight=weight: x @ weight


def by_a_builtin_method(net):
    net.tied = net.layer.weight.matmul


def by_a_cached_function(net):
    net.tied = functools.lru_cache(lambda: net.layer.weight.norm())


def by_a_weak_reference(net):
    net.tied = weakref.ref(net.layer)


def by_a_global(net):
    global global_network
    global_network = net
    net.tied = lambda x: global_network.layer(x)


HOLDERS = [value for name, value in vars().copy().items() if name.startswith("by_") and name != "by_closure"]


@pytest.mark.parametrize("how", HOLDERS)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_a_function_that_holds_the_student(how, inside, copied):
    student = nn.Sequential(Tied(how)) if inside else Tied(how)
    with pytest.warns(UserWarning, match=r"refers to modules or tensors of the student, so the teacher would run the"):
        EMANTeacher(student, **({"module": copy.deepcopy(student)} if copied else {}))
    EMANTeacher(student, module=nn.Sequential(Tied(how)) if inside else Tied(how))  # the remedy


def test_functions_that_do_not_hold_the_student():
    def setup(net):
        seen = {}
        net.register_forward_hook(lambda module, args, out: seen.__setitem__("out", out.detach()))
        net.layer.register_forward_pre_hook(lambda module, args: None)
        net.activation, net.linear = torch.relu, functools.partial(nn.functional.linear, weight=net.layer.weight)
        net.bound, net.again = net.layer.forward, [net.layer]
        net.recurrent = nn.LSTM(4, 4)  # has weak references to its parameters

    student = Tied(setup)
    student(torch.ones(2, 4))
    teacher = EMANTeacher(student)
    assert teacher.module.linear.keywords["weight"] is teacher.module.layer.weight


def test_a_patched_forward_that_is_copied():
    student = nn.Sequential(nn.Linear(4, 4), patched(nn.Linear(4, 4), Doubled))
    student[0].forward = student[0].forward  # deepcopy rebinds a bound method
    student.forward = lambda x: x  # refers to no module
    teacher = EMANTeacher(student)
    assert teacher.module[0].forward.__self__ is teacher.module[0]
    assert teacher.module[1].forward.forward.__self__ is teacher.module[1]


@pytest.mark.parametrize(
    "wrong",
    [lambda s: s.parameters(), lambda s: list(s.parameters()), lambda s: s.state_dict(), lambda s: None.__class__],
)
def test_a_student_that_is_not_a_module(wrong):
    student = net()
    teacher = EMANTeacher(student)
    for call in (
        lambda: teacher.update(wrong(student)),
        lambda: EMANTeachers(student, [0.9]).update(wrong(student)),
        lambda: eman_update_(teacher.module, wrong(student), 0.9),
        lambda: eman_update_(wrong(student), student, 0.9),
        lambda: EMANTeacher(wrong(student)),
        lambda: EMANTeacher(student, module=wrong(student)),
        lambda: teacher.swap(wrong(student)),
    ):
        with pytest.raises(TypeError, match=r"must be networks \(nn\.Module\)"):
            call()
    assert teacher.step == 0


def test_arguments_that_are_not_lists_of_tensors():
    teacher, student = net().requires_grad_(False), net()
    for wrong, says in (
        (teacher, r"use eman_update_\(teacher, student"),
        (teacher.state_dict(), r"a OrderedDict; tensors are paired by position, or by key if both arguments are"),
        (dict(teacher.named_parameters()), r"a dict; tensors are paired by position"),
        (torch.zeros(3, 3), r"a Tensor; put a single tensor into a list"),
        (3, r"a int"),
    ):
        with pytest.raises(TypeError, match=says):
            ema_update_(wrong, list(student.parameters()), 0.9)
        with pytest.raises(TypeError, match=says):
            ema_update_(list(teacher.parameters()), wrong, 0.9)
    with pytest.raises(TypeError, match=r"student_tensors\[1\] must be a tensor, not a numpy\.ndarray.*from_numpy"):
        ema_update_([torch.zeros(2), torch.zeros(2)], [torch.ones(2), torch.ones(2).numpy()], 0.5)
    with pytest.raises(TypeError, match=r"teacher_tensors\[0\] must be a tensor, not a builtins\.float"):
        ema_update_([1.0], [torch.ones(2)], 0.5)


@pytest.mark.skipif(bool(why := eman_kernels.available_backends()["cpu"]), reason=f"{why}")
def test_a_mode_in_which_new_tensors_have_no_memory():
    student = net()
    teacher = EMANTeacher(student)
    before = copy.deepcopy(teacher.module.state_dict())
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(RuntimeError, match=r"the plan's table is a FakeTensor\. Call update\(\) outside"):
            teacher.update(student)
        fake = net()
        estimated = EMANTeacher(fake, module=net())  # such as an estimate of the memory for training
        estimated.update(fake)
    assert (teacher.step, estimated.step) == (0, 1)
    for name, tensor in before.items():
        assert_same_bits(teacher.module.state_dict()[name], tensor, name)


def test_found_inf_that_is_not_a_tensor():
    student = net()
    teacher = EMANTeacher(student)
    for wrong in (True, 0.0, {}, {torch.device("cpu"): torch.zeros(1)}):
        for call in (
            lambda w: teacher.update(student, found_inf=w),
            lambda w: eman_update_(teacher.module, student, 0.9, found_inf=w),
        ):
            with pytest.raises(
                TypeError, match=r"found_inf must be a tensor of one element, or None.*disabled GradScaler"
            ):
                call(wrong)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    student(torch.randn(3, 4)).sum().backward()
    scaler.step(optimizer)
    teacher.update(student, found_inf=getattr(optimizer, "found_inf", None))
    assert teacher.step == 1


@pytest.mark.parametrize("found", [1e-300, -1e-300, float("nan"), True, 1 << 40, 5e-46])
def test_a_found_inf_that_float32_cannot_hold(found):
    student = net()
    teacher = EMANTeacher(student, 0.5)
    trained(student)
    before = teacher.module[0].weight.clone()
    dtype = {bool: torch.bool, int: torch.int64}.get(type(found), torch.float64)
    teacher.update(student, found_inf=torch.tensor([found], dtype=dtype))
    assert teacher.step == 0
    assert torch.equal(teacher.module[0].weight, before)


@pytest.mark.parametrize("backend", [None, "foreach", "reference"])
def test_a_momentum_that_is_lazily_negated(backend):
    teacher, student = torch.zeros(4), torch.ones(4)
    negated = torch._neg_view(torch.tensor(-0.75, dtype=torch.float64))
    assert negated.is_neg()
    ema_update_([teacher], [student], negated, backend=backend)
    assert (teacher == 0.25).all()
    imaginary = torch.tensor(0.5 - 0.75j).conj().imag
    assert imaginary.is_neg()
    ema_update_([teacher], [student], imaginary, backend=backend)
    assert torch.equal(teacher, torch.full((4,), 0.4375))


def test_update_bn():
    loader = [torch.randn(16, 4) * 3 + 1 for _ in range(4)]
    student = trained(net())
    teacher = EMANTeacher(student, 0.5)
    teacher.update(student)
    expected = copy.deepcopy(teacher.module)
    update_bn(loader, expected)
    update_bn(loader, teacher)
    for name, buffer in expected.named_buffers():
        assert torch.equal(dict(teacher.module.named_buffers())[name], buffer), name
    assert not any(module.training for module in teacher.modules())
    assert not torch.equal(teacher.module[1].running_mean, torch.zeros(8))
    teacher.train()
    assert not any(module.training for module in teacher.modules())


class Wrapper(nn.Module):
    def __init__(self, teacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, x):
        return self.teacher(x)


WRAPPERS = {
    "none": lambda teacher: teacher,
    "DataParallel": nn.DataParallel,
    "Sequential": nn.Sequential,
    "a module": Wrapper,
    "two": lambda teacher: Wrapper(nn.DataParallel(teacher)),
    "compiled": lambda teacher: torch.compile(teacher, backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_update_bn_of_a_wrapper(wrap, dtype, momentum):
    """dtype: of the BatchNorm of a teacher that runs in bfloat16; None: without cast."""
    student = trained(net())
    student[1].momentum = momentum
    loader = [torch.randn(16, 4) * 3 + 1 for _ in range(4)]
    teacher = EMANTeacher(student.to(torch.float64 if dtype == torch.float64 else torch.float32), 0.5)
    teacher.update(student)
    expected = copy.deepcopy(teacher.module).float()
    update_bn(loader, expected)
    if dtype is not None:
        teacher.cast = torch.bfloat16
        teacher.module[1].to(dtype)
    wrapped = wrap(copy.deepcopy(teacher))
    update_bn(loader, wrapped)
    (teacher,) = (module for module in wrapped.modules() if isinstance(module, EMANTeacher))
    norm = teacher.module[1]
    near = {"rtol": 0, "atol": 0} if dtype is None else {"rtol": 0.03, "atol": 0.1}
    for name, buffer in expected[1].named_buffers():
        torch.testing.assert_close(getattr(norm, name), buffer, check_dtype=dtype is None, **near)
    assert (norm.momentum, int(norm.num_batches_tracked)) == (momentum, 4)
    wrapped.train()
    wrapped(loader[0])
    assert norm.num_batches_tracked == 4
    assert not any(module.training for module in teacher.modules())


def test_statistics_are_continued_without_a_reset():
    student = net().train()
    student(torch.randn(16, 4))
    teacher = EMANTeacher(student, 0.5)
    teacher.update(student)
    expected = copy.deepcopy(teacher.module)
    images = torch.randn(16, 4) * 3 + 1
    for network, norm in ((expected, expected[1]), (teacher, teacher.module[1])):
        network.train()
        norm.momentum = None  # a cumulative average from here on
        network(images)
    assert teacher.module[1].num_batches_tracked == 2
    torch.testing.assert_close([*teacher.module.buffers()], [*expected.buffers()], rtol=0, atol=0)


def test_update_bn_of_several_teachers():
    student = trained(net())
    teachers = EMANTeachers(student, [0.5, 0.9])
    teachers.update(student)
    expected = copy.deepcopy(teachers[1].module)
    loader = [torch.randn(16, 4) for _ in range(3)]
    update_bn(loader, expected)
    update_bn(loader, teachers)
    torch.testing.assert_close([*teachers[1].buffers()], [*expected.buffers()], rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_that_were_never_estimated_are_not_taken_for_reset(momentum):
    student = net()
    student[1].momentum = momentum
    teacher = EMANTeacher(student)
    parent = Wrapper(teacher).train()
    parent(torch.randn(8, 4))
    assert not any(module.training for module in teacher.modules())
    assert teacher.module[1].num_batches_tracked == 0


class WithExtraState(nn.Linear):
    """Counts in a dict, which its extra state is, and remembers that it was loaded."""

    def __init__(self):
        super().__init__(2, 2)
        self.counts, self.loaded = {"steps": 1}, False

    def get_extra_state(self):
        return self.counts

    def set_extra_state(self, state):
        self.counts.update(state)

    def _load_from_state_dict(self, *args):
        self.loaded = True
        super()._load_from_state_dict(*args)


@pytest.mark.parametrize("several", [False, True])
def test_a_load_that_fails_restores_extra_states_too(several):
    student = nn.Sequential(WithExtraState(), nn.Linear(2, 2))
    teacher = EMANTeachers(student, [0.5]) if several else EMANTeacher(student, 0.5)
    teacher.update(student)
    state = {name: copy.deepcopy(value) for name, value in teacher.state_dict().items()}
    prefix = "teachers.0.module." if several else "module."
    state[prefix + "0._extra_state"]["steps"] = 5
    state[prefix + "1.weight"] = torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        teacher.load_state_dict(state)
    first = (teacher[0] if several else teacher).module[0]
    assert first.counts == {"steps": 1}
    assert not first.loaded
    assert "_load_state_dict_post_hooks" in vars(first)
    state[prefix + "1.weight"] = torch.ones(2, 2)
    teacher.load_state_dict(state)
    assert first.counts == {"steps": 5}
    assert first.loaded


def test_loading_that_matches_nothing():
    student = trained(net())
    teacher = EMANTeacher(student)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"nothing was loaded.*0\.weight.*module\.0\.weight"):
            teacher.load_state_dict(student.state_dict(), strict=strict)
    teacher.load_state_dict({"module.0.weight": torch.ones(8, 4)}, strict=False)
    assert (teacher.module[0].weight == 1).all()
    # A parent's checkpoint from before it had a teacher is accepted.
    nn.ModuleDict({"student": student, "teacher": teacher}).load_state_dict(
        {f"student.{name}": value for name, value in student.state_dict().items()}, strict=False
    )


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to("cpu", torch.float64)],
)
def test_a_float32_teacher_in_a_parent_that_is_converted(convert):
    student = trained(net())
    teacher = EMANTeacher(student, 0.5, dtype=torch.float32)
    expected = teacher.module[0].weight.clone()
    parent = convert(nn.ModuleDict({"student": student, "teacher": teacher}))
    assert parent["student"][0].weight.dtype != torch.float32
    assert all(t.dtype == torch.float32 for t in teacher.module.state_dict().values() if t.is_floating_point())
    assert torch.equal(teacher.module[0].weight, expected)
    teacher.update(parent["student"])
    assert torch.equal(teacher.module[0].weight, torch.lerp(expected, student[0].weight.float(), 0.5))
    assert EMANTeacher(net()).to(torch.bfloat16).module[0].weight.dtype == torch.bfloat16


def set_option(name, value):
    return lambda teacher: setattr(teacher, name, value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (set_option("rounding", "stochastc"), "unknown rounding='stochastc'"),
        (set_option("nonfinite", "drop"), "unknown nonfinite='drop'"),
        (set_option("seed", -1), "seed must be in"),
        (set_option("seed", 1 << 32), "seed must be in"),
        (set_option("backend", "quick"), "unknown backend='quick'"),
        (set_option("buffer_rule", "average"), "unknown rule 'average'"),
        (set_option("rules", {"0.*": "freeze"}), "unknown rule 'freeze'"),
        (set_option("momentum", 1.5), "momentum must be in"),
        (set_option("cast", torch.int8), "cast must be"),
        (set_option("step", -5), "whole number from 0, but got -5"),
        (set_option("step", 2.5), "whole number from 0, but got 2.5"),
        (lambda t: t.set_extra_state(torch.tensor(-5)), "whole number from 0, but got -5"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_options_set_later_are_checked(change, says, several):
    student = net()
    teacher = EMANTeachers(student, [0.9, 0.99]) if several else EMANTeacher(student)
    trained(student)
    members = list(teacher) if several else [teacher]
    before = members[0].module[0].weight.clone()

    def change_and_update():
        for member in members:
            change(member)
            member(torch.zeros(2, 4))
        teacher.update(student)

    with pytest.raises(ValueError, match=says):
        change_and_update()
    assert torch.equal(members[0].module[0].weight, before)
    assert members[0].step == 0


@pytest.mark.parametrize(
    ("name", "value"), [("rounding", "stochastic"), ("rules", {"0.*": "skip"}), ("buffer_rule", "copy"), ("seed", 5)]
)
def test_one_of_several_with_different_options(name, value):
    student = net()
    teachers = EMANTeachers(student, [0.9, 0.99])
    setattr(teachers[1], name, value)
    with pytest.raises(ValueError, match=rf"equal options, but {name.replace('buffer_rule', 'buffers')} of one is"):
        teachers.update(student)
    assert [teacher.step for teacher in teachers] == [0, 0]
    setattr(teachers[0], name, value)
    teachers.update(student)


def test_two_names_that_become_equal():
    class Wrapped(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self._orig_mod = nn.Linear(2, 2)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Wrapped()

        def forward(self, x):
            return x

    teacher, student = Outer(), Outer()
    teacher.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"inner\.weight and inner\._orig_mod\.weight are two tensors, but both are called"
    ):
        eman_update_(teacher, student, 0.5)
    # A wrapper that registers the same tensor under both names is accepted.
    for each in (teacher, student):
        each.inner._orig_mod.weight, each.inner._orig_mod.bias = each.inner.weight, each.inner.bias
    eman_update_(teacher, student, 0.5)


def columns(matrix):
    return [matrix[:, i] for i in range(matrix.shape[1])]


def blocks(matrix):
    return [matrix[:, :2], matrix[:, 2:3], matrix[:, 3:]]


def parts(matrix):
    return [torch.view_as_complex(matrix.view(-1, 2)).real, torch.view_as_complex(matrix.view(-1, 2)).imag]


def diagonals(matrix):
    return [matrix.diagonal(), matrix.diagonal(1), matrix.diagonal(-1)]


def corners(matrix):
    return [matrix[:3, :3], matrix[3:, 3:], matrix[:3, 3:]]


@pytest.mark.parametrize("views", [columns, blocks, parts, diagonals, corners])
def test_views_that_interleave_are_not_shared_memory(views):
    teacher, student = torch.randn(6, 6), torch.randn(6, 6)
    before = teacher.clone()
    ema_update_(views(teacher), views(student), 0.25)
    for mine, was, theirs in zip(views(teacher), views(before), views(student), strict=True):
        assert torch.equal(mine, torch.lerp(was.contiguous(), theirs.contiguous(), 0.75))


def one_column_twice(matrix):
    return [matrix[:, :2], matrix[:, 1:3]]


def diagonal_and_row(matrix):
    return [matrix.diagonal(), matrix[2]]


def corners_that_meet(matrix):
    return [matrix[:4, :4], matrix[3:, 3:]]


def other_dtype(matrix):
    return [matrix[:, 0], matrix.view(torch.int32)[:, 0]]


@pytest.mark.parametrize("views", [one_column_twice, diagonal_and_row, corners_that_meet, other_dtype])
def test_views_that_share_an_element(views):
    teacher = torch.randn(6, 6)
    before = teacher.clone()
    with pytest.raises(ValueError, match="share memory"):
        ema_update_(views(teacher), views(torch.randn(6, 6)), 0.25)
    assert torch.equal(teacher, before)


def test_a_teachers_view_that_shares_an_element_with_the_student():
    memory = torch.randn(6, 6)
    with pytest.raises(ValueError, match="share memory"):
        ema_update_([memory[:, :2]], [memory[:, 1:3]], 0.25)
    expected = torch.lerp(memory[:, :2], memory[:, 2:4], 0.75)
    ema_update_([memory[:, :2]], [memory[:, 2:4]], 0.25)
    assert torch.equal(memory[:, :2], expected)


def test_overlap_checks_against_counted_bytes():
    """All pairs of strided views of a small memory, with overlaps found by counting bytes."""
    from itertools import product

    from eman_kernels.networks.pairing import Pair
    from eman_kernels.plan.overlaps import check_overlaps

    memory, other = torch.zeros(24), torch.zeros(24)
    shapes = [((n, m), (a, b)) for n, m, a, b in product((1, 2, 3), (1, 2, 3), (1, 2, 3, 4, 5), (1, 2, 3, 6))]
    views = []
    for (shape, stride), start in product(shapes, (0, 1, 2, 5)):
        view = (
            memory.as_strided(shape, stride, start)
            if start + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) < 24
            else None
        )
        if view is None:
            continue
        places = {start + i * stride[0] + j * stride[1] for i in range(shape[0]) for j in range(shape[1])}
        if len(places) == view.numel():
            views.append((view, places))
    checked = 0
    for k in range(0, len(views) * len(views), 37):
        (one, its), (two, theirs) = views[k // len(views)], views[k % len(views)]
        pairs = [Pair("one", one, other[: one.numel()], "ema"), Pair("two", two, other[: two.numel()], "ema")]
        try:
            check_overlaps(pairs)
            fault = ""
        except ValueError as error:
            fault = str(error)
        if "expanded" in fault:  # views with unordered strides are refused even without an overlap
            continue
        assert bool(fault) == bool(its & theirs), (one.shape, one.stride(), two.shape, two.stride())
        checked += 1
    assert checked > 300


def test_every_tensor_that_addresses_an_element_twice_is_refused():
    """All small shapes and strides, with the elements counted."""
    memory, checked = torch.zeros(40), [0, 0]
    for shape in itertools.product((1, 2, 3), repeat=3):
        for strides in itertools.product((0, 1, 2, 3, 6), repeat=3):
            tensor = memory.as_strided(shape, strides)
            places = [sum(map(operator.mul, at, strides)) for at in itertools.product(*map(range, shape))]
            twice = len(set(places)) < len(places)
            checked[twice] += 1
            if twice:
                with pytest.raises(ValueError, match="expanded or overlapping view"):
                    ema_update_([tensor], [torch.ones(shape)], 0.5)
            elif all(size == 1 or stride for size, stride in zip(shape, strides, strict=True)):
                memory.zero_()
                try:
                    ema_update_([tensor], [torch.ones(shape)], 0.5)
                except ValueError:  # strides that do not step over each other, which no view of torch has
                    assert not memory.any()
                else:
                    assert memory.sum() == 0.5 * tensor.numel()
    assert min(checked) > 300


@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_export_before_the_first_call(cast):
    if cast is not None and TORCH < (2, 8):
        pytest.skip("torch 2.6 and 2.7 do not export functional_call of a Sequential")
    student = net()
    teacher = EMANTeacher(student, cast=cast)
    x = torch.randn(3, 4)
    exported = torch.export.export(teacher, (x,))
    assert torch.equal(exported.module()(x), teacher(x))


def test_a_teacher_like_that_of_averaged_model(monkeypatch):
    """A teacher that requires grad, as in torch's AveragedModel, is accepted; autograd still detects the update."""
    student = trained(net())
    averaged = AveragedModel(student)
    assert all(p.requires_grad for p in averaged.parameters())
    before = averaged.module[0].weight.detach().clone()
    loss = averaged.module(torch.randn(3, 4)).pow(2).sum()
    trained(student)
    eman_update_(averaged.module, student, 0.5)
    assert torch.equal(averaged.module[0].weight, torch.lerp(before, student[0].weight, 0.5))
    assert averaged.module[0].weight.grad_fn is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_warning_in_the_usual_case():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student = net()
        teacher = EMANTeacher(student)
        teacher.update(student)
        with teacher.swapped():
            pass
    assert eman_kernels.plan_for(teacher.module, student).describe().count("\n") == 0
