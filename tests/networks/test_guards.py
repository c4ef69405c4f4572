"""Guards and the plan cache: every way in which a plan's assumptions can change, and what a plan keeps alive."""

import ctypes
import gc
import os
import signal
import weakref
from array import array

import pytest
import torch
from conftest import assert_same_bits, lerp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from eman_kernels import (
    EMANTeacher,
    available_backends,
    ema_update_,
    eman_update_,
    plan_for,
    swapped,
)
from eman_kernels.networks import guards
from eman_kernels.networks.names import named_tensors
from eman_kernels.plan import cache
from eman_kernels.update import eager, swapping

pytestmark = pytest.mark.filterwarnings("ignore:.*take the slow path")


@pytest.fixture(params=["compiled", "python"])
def _looking(request, monkeypatch):
    """The guards in C++ and those in Python, which must detect the same changes."""
    if request.param == "python":
        monkeypatch.setattr(guards, "_extension_reads_torch", False)
    elif not guards._extension_reads_torch:
        pytest.skip("the extension is not built, or this torch lacks the interface that its guards read")


@pytest.fixture(scope="module", autouse=True)
def _fast_collections():
    """Collections skip the thousands of objects that existed before, which would take a second each."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


both_walks = pytest.mark.usefixtures("_looking")


@pytest.fixture
def plans(monkeypatch):
    """Records each plan that is made."""
    made, real = [], eager.Plan
    for room in (eager, swapping):
        monkeypatch.setattr(room, "Plan", lambda *args, **options: made.append(real(*args, **options)) or made[-1])
    return made


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        self.none = None
        self.register_buffer("scale", torch.randn(6, 6))
        self.register_buffer("mask", torch.rand(5) < 0.5, persistent=False)


@torch.no_grad()
def randomise(tensor):
    tensor.copy_(torch.randn(tensor.shape) * 100)


def assert_follows(teacher, student):
    """Check one update in the networks' current tensors, then another one with the plan that it made."""
    for _ in range(2):
        both = [named_tensors(module) for module in (teacher, student)]
        for tensors in both:
            for tensor in tensors.values():
                randomise(tensor)
        want = {}
        for name, t in both[0].items():
            s = both[1][name].detach()
            want[name] = lerp(t.detach(), s, 0.7) if t.is_floating_point() else s.clone()
        eman_update_(teacher, student, 0.7)
        for name, tensor in named_tensors(teacher).items():
            assert_same_bits(tensor, want[name], name)


# ---------------------------------------------------------------- changes of one network or of both


def replace_layer(net):
    net.inner[1] = nn.Linear(6, 6)


def delete_and_make_a_layer(net):
    """The new tensors may get the addresses of the old ones."""
    del net.conv
    net.conv = nn.Conv2d(4, 4, 3)


def reset_layer(net):
    net.inner[0].__init__(6, 6)


def update_dict(net):
    net.inner[0].__dict__.update(nn.Linear(6, 6).__dict__)


def replace_modules_dict(net):
    net._modules = dict(net._modules) | {"conv": nn.Conv2d(4, 4, 3)}


def replace_parameters_dict(net):
    net.inner[0]._parameters = {name: nn.Parameter(p + 1) for name, p in net.inner[0]._parameters.items()}


def exchange_names(net):
    one, other = net.inner[0], net.inner[1]
    net.inner._modules.clear()
    net.inner._modules.update({"0": other, "1": one})


def exchange_parameters(net):
    """Exchange two parameters under their names, keeping the order of the dict."""
    one, other = net.inner[0], net.inner[1]
    one.weight, other.weight = other.weight, one.weight


def exchange_square_parameters(net):
    weight, scale = net.inner[0]._parameters.pop("weight"), net._buffers.pop("scale")
    net.inner[0].register_parameter("weight", nn.Parameter(scale))
    net.register_buffer("scale", weight.detach())


def load_assign(net):
    net.load_state_dict({name: tensor.clone() for name, tensor in net.state_dict().items()}, assign=True)


def set_data(net):
    net.conv.weight.data = net.conv.weight.data + 1


def set_data_twice(net):
    for _ in range(2):
        net.conv.weight.data = torch.randn(4, 4, 3, 3)


def set_storage(net):
    with torch.no_grad():
        net.conv.weight.set_(torch.randn(4, 4, 3, 3, dtype=net.conv.weight.dtype))


def resize_storage(net):
    """The tensors and their storages stay the same objects, and the memory moves."""
    for tensor in (net.conv.weight, net.scale):
        storage, before = tensor.untyped_storage(), tensor.data_ptr()
        storage.resize_(2 * storage.nbytes())
        assert tensor.data_ptr() != before


def transpose_data(net):
    net.inner[0].weight.data = net.inner[0].weight.data.t()


def transpose_buffer(net):
    net.scale.t_()


def transpose_in_place(net):
    with torch.no_grad():
        net.inner[0].weight.t_()


def negate_lazily(net):
    """The same memory under a view with the opposite sign, which only the dispatch keys show."""
    net.inner[0].weight.data = torch._neg_view(net.inner[0].weight.data)
    net.norm.running_mean.data = torch._neg_view(net.norm.running_mean.data)


def another_dtype(net):
    net.inner[0].bias.data = net.inner[0].bias.data.to(torch.bfloat16)


def to_double(net):
    net.double()


def to_half_and_back(net):
    net.half().float()


def to_channels_last(net):
    net.to(memory_format=torch.channels_last)


def replace_buffer(net):
    net.norm.running_mean = torch.randn(4)


def replace_counter_by_an_equal_one(net):
    net.norm.num_batches_tracked = net.norm.num_batches_tracked.clone()


def tie(net):
    net.inner[1].weight = net.inner[0].weight
    net.inner[1].bias = net.inner[0].bias


def swap_tensors(net):
    torch.utils.swap_tensors(net.conv.weight, nn.Parameter(torch.randn(4, 4, 3, 3)))


def swap_in_the_module(net):
    torch.utils.swap_tensors(net.inner[0].weight, net.inner[1].weight)


def move_by_swapping(net):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        net.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def requires_grad(net):
    net.conv.requires_grad_(not net.conv.weight.requires_grad)


def wrap(net):
    net.conv = torch.compile(net.conv)


def another_class(net):
    class Sub(type(net)):
        pass

    net.__class__ = Sub


CHANGES = [
    replace_layer, delete_and_make_a_layer, reset_layer, update_dict, replace_modules_dict, replace_parameters_dict,
    exchange_names, exchange_parameters, exchange_square_parameters, load_assign, set_data, set_data_twice, set_storage,
    resize_storage, transpose_data, transpose_buffer, transpose_in_place, negate_lazily, another_dtype, to_double,
    to_half_and_back, to_channels_last, replace_buffer, replace_counter_by_an_equal_one, tie, swap_tensors,
    swap_in_the_module, move_by_swapping, requires_grad, wrap, another_class,
]  # fmt: skip


@both_walks
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("who", ["teacher", "student", "both"])
def test_a_network_changes(change, who):
    teacher, student = Net(), Net()
    assert_follows(teacher, student)
    if who != "student":
        change(teacher)
    if who != "teacher":
        change(student)
    if change is tie and who == "teacher":
        with pytest.raises(ValueError, match="would follow different"):
            eman_update_(teacher, student, 0.5)
        return
    assert_follows(teacher, student)


def cut(net):
    net.inner[0].weight.data = net.inner[0].weight.data[:2]


def resize(net):
    with torch.no_grad():
        net.scale.resize_(3, 6)


def reshape_at_the_address(net):
    net.scale.data = net.scale.data.view(4, 9)


def drop_a_buffer(net):
    del net.mask


def register(net):
    net.norm.register_parameter("late", nn.Parameter(torch.randn(3)))


def become_none(net):
    net.norm.running_var = None


@both_walks
@pytest.mark.parametrize("change", [cut, resize, reshape_at_the_address, drop_a_buffer, register, become_none])
@pytest.mark.parametrize("first", ["teacher", "student"])
def test_a_network_changes_its_shape(change, first):
    """Changing one network is an error that names the tensor, before any write; changing both is accepted."""
    teacher, student = Net(), Net()
    one, other = (teacher, student) if first == "teacher" else (student, teacher)
    assert_follows(teacher, student)
    change(one)
    before = {name: tensor.clone() for name, tensor in named_tensors(teacher).items()}
    with pytest.raises(ValueError, match=r"(inner\.0\.weight|scale|mask|norm\.late|norm\.running_var): the "):
        eman_update_(teacher, student, 0.5)
    for name, tensor in named_tensors(teacher).items():
        assert torch.equal(tensor, before[name]), name
    change(other)
    assert_follows(teacher, student)


@both_walks
def test_a_teacher_shrunk_in_place_is_not_written_beyond_its_end():
    teacher, student, big = nn.Linear(4, 4), nn.Linear(4, 4), torch.zeros(16, 4)
    teacher.weight.data, student.weight.data = big, torch.ones(16, 4)
    eman_update_(teacher, student, 0.5)
    for net in (teacher, student):
        net.weight.data = net.weight.data[:6]
    eman_update_(teacher, student, 0.0)
    assert (big[:6] == 1).all()
    assert (big[6:] == 0.5).all()


@both_walks
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_module():
    """Its tensors are stored in C++, and its apparent dicts are not dicts."""
    teacher, student = (torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))) for _ in range(2))
    assert_follows(teacher, student)
    student[0].weight = nn.Parameter(torch.randn(4, 4))
    assert_follows(teacher, student)
    teacher[1].running_mean.set_(torch.randn(4))
    assert_follows(teacher, student)


@both_walks
def test_one_of_two_ties_is_removed():
    teacher, student = Net(), Net()
    tie(teacher), tie(student)
    assert_follows(teacher, student)
    for net in (teacher, student):
        net.inner[1].weight = nn.Parameter(torch.randn(6, 6))
    assert_follows(teacher, student)


# ---------------------------------------------------------------- lists


def fresh_views(tensors):
    return [tensor.detach() for tensor in tensors]


def cut_first(tensors):
    tensors[0].data = tensors[0].data[:2]
    return tensors


def transpose_first(tensors):
    assert tensors[0].shape[0] == tensors[0].shape[1]
    tensors[0].t_()
    return tensors


def resize_first(tensors):
    return [tensors[0].resize_(2, 8), *tensors[1:]]


def replace_second(tensors):
    return [tensors[0], torch.randn(3), *tensors[2:]]


def set_second(tensors):
    tensors[1].set_(torch.randn(3, dtype=tensors[1].dtype))
    return tensors


def exchange(tensors):
    return [tensors[0], tensors[2], tensors[1]]


def double_second(tensors):
    tensors[1].data = tensors[1].data.double()
    return tensors


def one_less(tensors):
    return tensors[:2]


def swap_second(tensors):
    torch.utils.swap_tensors(tensors[1], torch.randn(3))
    return tensors


BOTH_SIDES = (cut_first, resize_first, one_less)
LIST_CHANGES = [fresh_views, transpose_first, replace_second, set_second, exchange, double_second, swap_second,
                *BOTH_SIDES]  # fmt: skip


def assert_lists_follow(teachers, students):
    for _ in range(2):
        for tensor in (*teachers, *students):
            randomise(tensor)
        want = [lerp(t, s, 0.7) for t, s in zip(teachers, students, strict=True)]
        ema_update_(teachers, students, 0.7)
        for tensor, value in zip(teachers, want, strict=True):
            assert_same_bits(tensor, value)


@both_walks
@pytest.mark.parametrize("change", LIST_CHANGES)
@pytest.mark.parametrize("who", ["teacher", "student", "both"])
def test_a_list_changes(change, who):
    teachers, students = ([torch.randn(4, 4), torch.randn(3), torch.randn(3)] for _ in range(2))
    assert_lists_follow(teachers, students)
    changed = [change(teachers) if who != "student" else teachers, change(students) if who != "teacher" else students]
    if change in BOTH_SIDES and who != "both":
        before = [tensor.clone() for tensor in changed[0]]
        with pytest.raises(ValueError, match=r"teacher_tensors\[0\]|must have the same"):
            ema_update_(*changed, 0.5)
        assert all(map(torch.equal, changed[0], before))
        return
    assert_lists_follow(*changed)


@both_walks
def test_another_dtype_at_the_address():
    teacher, student = torch.zeros(9, dtype=torch.bfloat16), torch.ones(9, dtype=torch.bfloat16)
    ema_update_([teacher], [student], 0.5)
    teacher.data, student.data = teacher.data.view(torch.float16), student.data.view(torch.float16)
    assert_lists_follow([teacher], [student])


@both_walks
def test_dimensions_that_a_tensor_stores_outside_of_itself():
    """From the sixth on. None of the tensor's own words changes, and neither does its contiguity."""
    teacher, student = (torch.randn(2, 2, 2, 2, 2, 2).transpose_(0, 5) for _ in range(2))
    assert_lists_follow([teacher], [student])
    student.transpose_(0, 5).transpose_(1, 4)
    assert_lists_follow([teacher], [student])


@both_walks
def test_a_lazy_clone_of_a_teacher_keeps_its_values():
    """It shares the teacher's memory until one of them is written."""
    if not hasattr(torch, "_lazy_clone"):
        pytest.skip("this torch has no lazy clones")
    teacher, student = (nn.Linear(3, 3).requires_grad_(False) for _ in range(2))
    eman_update_(teacher, student, 0.5)
    before = teacher.weight.clone()
    clone = torch._lazy_clone(teacher.weight)
    eman_update_(teacher, student, 0.5)
    assert_same_bits(clone, before)
    assert_same_bits(teacher.weight, lerp(before, student.weight, 0.5))


@both_walks
def test_fresh_views_of_a_list_keep_its_plan(plans):
    teachers, students = [torch.zeros(300), torch.zeros(4)], [torch.ones(300), torch.ones(4)]
    for k in range(1, 4):
        ema_update_(fresh_views(teachers), [tensor.data for tensor in students], 0.5)
        assert (teachers[0] == 1 - 0.5**k).all()
    assert len(plans) == 1


def test_tensors_can_be_swapped_after_an_update():
    teacher, student = torch.zeros(3), torch.ones(3)
    ema_update_([teacher], [student], 0.5)
    torch.utils.swap_tensors(teacher, torch.full((3,), 5.0))
    ema_update_([teacher], [student], 0.5)
    assert teacher.tolist() == [3.0] * 3


class Tagged(torch.Tensor):
    """A subclass of Tensor, whose elements may be stored anywhere."""


@both_walks
def test_subclasses_are_updated_and_not_kept_alive():
    def make(value):
        return [torch.full((4,), value).as_subclass(Tagged) for _ in range(3)]

    teachers = make(0.0)
    for _ in range(3):
        students = make(1.0)
        ema_update_(teachers, students, 0.0)
        assert all((tensor == 1).all() for tensor in teachers)
        for tensor in teachers:
            tensor.zero_()
    kept = [weakref.ref(tensor) for tensor in (*teachers, *students)]
    del teachers, students, tensor
    gc.collect()
    assert not any(reference() is not None for reference in kept)


@both_walks
def test_two_of_a_subclass_become_one():
    teachers = [torch.zeros(4).as_subclass(Tagged) for _ in range(2)]
    students = [torch.ones(4).as_subclass(Tagged) for _ in range(2)]
    ema_update_(teachers, students, 0.5)
    ema_update_([teachers[0]] * 2, [students[0]] * 2, 0.5)
    assert (teachers[0] == 0.75).all()


# ---------------------------------------------------------------- how often a plan is made


def test_alternating_options_and_swaps_make_one_plan_each(plans):
    student = Net()
    teacher = EMANTeacher(student, 0.5)
    for _ in range(3):
        eman_update_(teacher.module, student, 0.5)
        eman_update_(teacher.module, student, 0.5, backend="foreach")
        eman_update_(teacher.module, student, 0.5, rules={"conv.*": "skip", "*": "copy"})
        eman_update_(teacher.module, student, 0.5, rules={"*": "copy", "conv.*": "skip"})
        with teacher.swapped(student):
            pass
    assert len(plans) == 5
    eman_update_(teacher.module, student, 0.5, backend="foreach")
    assert plan_for(teacher.module, student) is plans[1]


def test_the_order_of_rules_matters():
    teacher, student = Net(), Net()
    before = teacher.conv.weight.clone()
    eman_update_(teacher, student, 0.5, rules={"conv.*": "skip", "*": "copy"})
    assert torch.equal(teacher.conv.weight, before)
    eman_update_(teacher, student, 0.5, rules={"*": "copy", "conv.*": "skip"})
    assert torch.equal(teacher.conv.weight, student.conv.weight)


def test_a_buffer_that_alternates_makes_two_plans(plans):
    teacher, student = Net(), Net()
    buffers = [torch.randn(6, 6), torch.randn(6, 6)]
    for k in range(6):
        student.scale = buffers[k % 2]
        eman_update_(teacher, student, 0.0)
        assert torch.equal(teacher.scale, buffers[k % 2])
    assert len(plans) == 2


@both_walks
def test_tensors_that_exchange_their_names_in_place():
    """The order of the dict stays and only the names change."""
    teacher, student = nn.Linear(6, 6).requires_grad_(False), nn.Linear(6, 6)
    student.bias = nn.Parameter(torch.randn(6, 6))
    teacher.bias = nn.Parameter(torch.randn(6, 6), requires_grad=False)
    eman_update_(teacher, student, 0.0)
    weight, bias = student.weight, student.bias
    student._parameters.clear()
    student._parameters.update(bias=weight, weight=bias)
    eman_update_(teacher, student, 0.0)
    assert torch.equal(teacher.weight, bias)
    assert torch.equal(teacher.bias, weight)


@both_walks
def test_attributes_in_another_order_need_no_new_plan(plans):
    teacher, student = Net(), Net()
    eman_update_(teacher, student, 0.5)
    for module in (teacher, student.conv):
        attributes = list(vars(module).items())
        vars(module).clear()
        vars(module).update(reversed(attributes))
    eman_update_(teacher, student, 0.0)
    assert torch.equal(teacher.conv.weight, student.conv.weight)
    assert len(plans) == 1


def test_plans_of_a_pair_are_bounded_and_the_last_used_are_kept(plans):
    teacher, student = Net(), Net()
    eman_update_(teacher, student, 0.5)
    for k in range(3 * cache._MAX_PLANS):
        eman_update_(teacher, student, 0.5, rules={f"{'*' * (k + 1)}": "copy"})
        eman_update_(teacher, student, 0.5)
    assert len(plans) == 1 + 3 * cache._MAX_PLANS
    assert len(cache._networks[id(teacher), id(student)].plans) == cache._MAX_PLANS


def test_cached_lists_are_bounded_and_dead_ones_are_removed():
    cache._lists.clear()
    for size in range(1, 20):
        ema_update_([torch.zeros(size)], [torch.ones(size)], 0.5)
    assert len(cache._lists) == 1
    kept = [torch.zeros(1) for _ in range(cache._MAX_LISTS + 5)]
    for tensor in kept:
        ema_update_([tensor], [torch.ones(1)], 0.5)
    assert len(cache._lists) <= cache._MAX_LISTS


# ---------------------------------------------------------------- what a plan keeps alive


def storages(*modules):
    return [
        StorageWeakRef(t.untyped_storage()) for module in modules for t in (*module.parameters(), *module.buffers())
    ]


def delete_student(teacher, students):
    students.clear()


def teacher_to_meta(teacher, students):
    teacher.to("meta")


def teacher_to_bfloat16(teacher, students):
    teacher.to(torch.bfloat16)


def teacher_replaced(teacher, students):
    teacher.module = nn.Linear(2, 2)


def teacher_loaded(teacher, students):
    teacher.load_state_dict({name: t.clone() for name, t in teacher.state_dict().items()}, assign=True)


@both_walks
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "event", [delete_student, teacher_to_meta, teacher_to_bfloat16, teacher_replaced, teacher_loaded]
)
def test_no_memory_is_kept_alive(event, cast):
    students = [nn.Linear(300, 300)]
    teacher = EMANTeacher(students[0], 0.5, cast=cast)
    teacher(torch.randn(1, 300))
    teacher.update(students[0])
    with teacher.swapped():
        pass
    of = storages(students[0]) if event is delete_student else storages(teacher.module)
    assert not any(reference.expired() for reference in of)
    event(teacher, students)
    gc.collect()
    assert all(reference.expired() for reference in of)


@both_walks
def test_no_memory_of_lists_is_kept_alive():
    teachers, students = [torch.zeros(1000)], [torch.ones(1000)]
    ema_update_(teachers, students, 0.5)
    of = [StorageWeakRef(tensor.untyped_storage()) for tensor in (*teachers, *students)]
    students.clear()
    assert [reference.expired() for reference in of] == [False, True]
    teachers.clear()
    assert of[0].expired()


def hook_that_holds_the_root(net):
    net.conv.register_forward_hook(net.forward)


def parent_in_a_list(net):
    net.conv.parent = [net]


def class_that_holds_the_root(net):
    class Local(nn.Linear):
        root = net

    net.inner[0] = Local(6, 6)


@both_walks
@pytest.mark.parametrize("refer_back", [hook_that_holds_the_root, parent_in_a_list, class_that_holds_the_root])
def test_a_network_whose_child_refers_back_is_freed(refer_back):
    teacher, student = Net(), Net()
    refer_back(teacher), refer_back(student)
    eman_update_(teacher, student, 0.5)
    with swapped(teacher, student):
        pass
    entries = len(cache._networks)
    dead = [weakref.ref(net) for net in (teacher, student)]
    plan = weakref.ref(plan_for(teacher, student))
    del teacher, student
    gc.collect()
    assert [reference() for reference in dead] == [None, None]
    assert plan() is None
    assert len(cache._networks) == entries - 1


class Equal(nn.Linear):
    """All instances are equal. torch can only traverse modules that are hashable."""

    def __eq__(self, other):
        return isinstance(other, Equal)

    def __hash__(self):
        return 1


def test_networks_that_compare_equal_are_distinct():
    teacher, *students = (Equal(3, 3) for _ in range(3))
    for student in students:
        eman_update_(teacher, student, 0.0)
        assert torch.equal(teacher.weight, student.weight)
    keeper = EMANTeacher(students[0], 0.0)
    for student in students:
        keeper.update(student)
        assert torch.equal(keeper.module.weight, student.weight)


# ---------------------------------------------------------------- low-precision copies are checked before planning


@both_walks
@pytest.mark.parametrize("other", [lambda: nn.Linear(64, 64), lambda: nn.Linear(300, 64), Net])
def test_another_module_of_a_teacher_with_a_copy(other):
    student = nn.Linear(64, 64)
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16)
    teacher(torch.randn(1, 64))
    teacher.update(student)
    of_the_old, before = (
        teacher.state.low_precision.copies,
        [tensor.clone() for tensor in teacher.state.low_precision.copies],
    )
    teacher.module = other().requires_grad_(False)
    student = other()
    teacher.update(student, momentum=0.0)
    for tensor, value in zip(of_the_old, before, strict=True):
        assert torch.equal(tensor, value)
    for name, low in teacher.state.low_precision.tensors.items():
        assert torch.equal(low, named_tensors(student)[name].to(torch.bfloat16)), name


@both_walks
def test_a_copy_changed_after_planning_is_not_written():
    student = nn.Linear(64, 64)
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16)
    teacher(torch.randn(1, 64))
    teacher.update(student)
    low = teacher.state.low_precision.copies[0]
    memory = low.data
    before = memory.clone()
    low.data = low.data[:2]
    with pytest.raises(
        ValueError, match=r"weight: the teacher is .*shape \(64, 64\).* its low-precision copy .*\(2, 64\)"
    ):
        teacher.update(student)
    assert torch.equal(memory, before)


@both_walks
def test_a_copy_with_another_layout_gets_the_right_values():
    student = nn.Linear(64, 64)
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16)
    teacher(torch.randn(1, 64))
    teacher.update(student)
    low = teacher.state.low_precision.copies[0]
    low.data = low.data.t().contiguous().t()
    nn.init.normal_(student.weight)
    teacher.update(student)
    assert low.stride() == (1, 64)
    assert torch.equal(low, teacher.module.weight.to(torch.bfloat16))


def test_a_copy_that_shares_memory_is_refused():
    from conftest import planned

    from eman_kernels.networks.pairing import Pair

    memory = torch.zeros(100)
    with pytest.raises(ValueError, match="the teacher's low-precision copy's w share memory"):
        planned([Pair("w", memory, torch.ones(100), "ema", cast=memory.view(torch.bfloat16)[:100])])


# ---------------------------------------------------------------- where torch's threads are unavailable


@pytest.mark.parametrize("backend", ["cpu", "foreach"])
def test_a_new_plan_in_a_forked_child(backend):
    """OpenMP threads do not survive a fork, and waiting for them would hang."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    if reason := available_backends()[backend]:
        pytest.skip(reason)
    size = 1 << 20 if backend == "cpu" else 100  # larger torch loops would wait for threads too
    big, ones = torch.zeros(size), torch.ones(size)
    big.lerp_(ones, 0.5)
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            student = Net()
            teacher = EMANTeacher(student, 0.5, backend=backend)
            teacher.update(student)
            ema_update_([big], [ones], 0.0, backend=teacher.backend)
            os._exit(0 if big[-1] == 1 and teacher.step == 1 else 1)
        finally:
            os._exit(2)
    # A child that hangs is ended by SIGALRM, after far more time than a busy machine can need.
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the child waited for threads that it does not have"


# ---------------------------------------------------------------- random sequences of changes


# A tie prevents later changes of one side only, and a compiled network is not compiled again.
REPEATABLE = [change for change in CHANGES if change not in (tie, wrap)]


@both_walks
@given(st.lists(st.tuples(st.sampled_from(REPEATABLE), st.sampled_from(["teacher", "student", "both"])), max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_changes(changes):
    teacher, student = Net(), Net()
    for change, who in changes:
        if who != "student":
            change(teacher)
        if who != "teacher":
            change(student)
        assert_follows(teacher, student)


@both_walks
@given(st.lists(st.tuples(st.sampled_from(LIST_CHANGES), st.sampled_from(["teacher", "student", "both"])), max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_changes_of_lists(changes):
    lists = {who: [torch.randn(4, 4), torch.randn(3), torch.randn(3)] for who in ("teacher", "student")}
    for change, who in changes:
        small = lists["teacher"][0].shape != (4, 4)
        if (small and change in (cut_first, resize_first, transpose_first)) or (
            len(lists["teacher"]) < 3 and change in (one_less, replace_second, exchange)
        ):
            continue
        for name in lists:
            if who in (name, "both") or change in BOTH_SIDES:
                lists[name] = change(lists[name])
        assert_lists_follow(*lists.values())


needs_torch = pytest.mark.skipif(
    not guards._extension_reads_torch,
    reason="the extension is not built, or this torch lacks the interface that its guards read",
)


@needs_torch
def test_the_fields_of_a_tensor_are_found():
    tensor = torch.empty(48, dtype=torch.int32)[8:].view(1, 2, 4, 5)
    storage, first, last, data = guards._find_fields(guards._find_keys_offset([tensor]))

    def words(address, offset, n):
        return array("Q", ctypes.string_at(address + offset, 8 * n)).tolist()

    dim, sizes, strides, offset = first, first + 8, first + 8 + 5 * 8, first + 8 + 10 * 8
    assert words(tensor._cdata, dim, 1) == [4]
    assert words(tensor._cdata, sizes, 4) == [1, 2, 4, 5]
    assert words(tensor._cdata, strides, 4) == [40, 20, 5, 1]
    assert words(tensor._cdata, offset, 1) == [8]
    assert words(tensor._cdata, last, 1) == [torch._C._dispatch_keys(tensor).raw_repr()]
    assert words(tensor._cdata, storage, 1) == [tensor.untyped_storage()._cdata]
    assert words(tensor.untyped_storage()._cdata, data, 1) == [tensor.data_ptr() - 8 * 4]


@pytest.mark.parametrize("keys_offset", [0, 40, 96])
def test_fields_that_are_not_found_or_in_another_order_are_not_read(keys_offset):
    assert guards._find_fields(keys_offset) == [0] * 4


def test_dtypes_that_the_fields_do_not_distinguish(monkeypatch):
    monkeypatch.setattr(guards, "_DTYPES", (torch.float32, torch.float32))
    assert guards._find_fields(guards._find_keys_offset([torch.empty(1)])) == [0] * 4


@needs_torch
@pytest.mark.parametrize("change", CHANGES)
def test_a_network_changes_and_the_fields_are_unknown(change, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(guards, "_find_fields", lambda keys_offset: [0] * 4)
        assert guards._connect_extension()
    try:
        test_a_network_changes(change, "both")
    finally:
        guards._connect_extension()


def test_the_search_for_a_field_reads_nothing_behind_it(monkeypatch):
    objects = [(ctypes.c_uint64 * 3)(1, 2, 7), (ctypes.c_uint64 * 3)(7, 9, 8)]  # words, of which the last is sought
    words = {ctypes.addressof(each): each[2] for each in objects}
    ends = [address + ctypes.sizeof(each) for address, each in zip(words, objects, strict=True)]
    read, string_at = [], ctypes.string_at

    def record(address, size):
        read.append(address + size)
        return string_at(address, size)

    monkeypatch.setattr(ctypes, "string_at", record)
    assert guards._find_offset(words, size=64) == 16
    assert all(any(end - 24 < at <= end for end in ends) for at in read)
    assert guards._find_offset(words | {ctypes.addressof(objects[0]): 1}, size=16) is None


# ---------------------------------------------------------------- another torch


def lacks_the_library(monkeypatch):
    def no_library(*args, **kwargs):
        raise OSError("libtorch_cpu.so: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", no_library)


def lacks_a_function(monkeypatch):
    monkeypatch.setattr(guards, "_FUNCTIONS", (*guards._FUNCTIONS[:-1], "no_such_function"))


def lacks_the_offset(monkeypatch):
    monkeypatch.setattr(guards, "_find_offset", lambda words, size: None)


@pytest.mark.parametrize("lacks", [lacks_the_library, lacks_a_function, lacks_the_offset])
def test_without_torchs_c_interface_python_compares(lacks, monkeypatch):
    lacks(monkeypatch)
    monkeypatch.setattr(guards, "_extension_reads_torch", guards._connect_extension())
    assert not guards._extension_reads_torch
    teacher, student = Net(), Net()
    assert_follows(teacher, student)
    replace_layer(student)
    assert_follows(teacher, student)


def test_without_torchs_bump_version_autograd_is_told_too(monkeypatch):
    if not guards._extension_reads_torch:
        pytest.skip("the extension is not built, or this torch lacks the interface that its guards read")
    monkeypatch.setattr(guards, "_BUMP_VERSION", "no_such_function")
    try:
        assert guards._connect_extension()
        teacher = torch.zeros(3)
        ema_update_([teacher], [torch.ones(3)], 0.5)
        assert teacher._version == 1
    finally:
        monkeypatch.undo()
        guards._connect_extension()


@needs_torch
@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_off_during_a_walk_only(enabled):
    class Bare(nn.Module):
        """Its __dict__ is made when it is asked for, which can start a collection in Python 3.11."""

        def __init__(self):
            for name in ("_parameters", "_buffers", "_modules"):
                object.__setattr__(self, name, {})

    student, collections, before = nn.Module(), [], gc.get_threshold()
    student._modules = {str(i): Bare() for i in range(100)}
    gc.callbacks.append(lambda phase, info: collections.append(phase))
    (gc.enable if enabled else gc.disable)()
    try:
        gc.set_threshold(1)
        compiled = guards.extension.C.Guards([student])
        gc.set_threshold(*before)
        assert len(collections) < 20
        for roots in ([student], [nn.ReLU()]):
            compiled.check(roots)
            assert gc.isenabled() is enabled
        with pytest.raises(ValueError, match="unsupported"):
            guards.extension.C.Guards([["no tensor"]])
        assert gc.isenabled() is enabled
    finally:
        gc.set_threshold(*before)
        gc.callbacks.pop()
        gc.enable()
