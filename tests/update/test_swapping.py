"""Swapping teacher and student: whatever happens during a swap, each network has its own values afterwards."""

import copy
import io
import os
import pickle
import subprocess
import sys
import threading

import pytest
import safetensors.torch as safetensors_torch
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode

from eman_kernels import (
    EMANTeacher,
    EMANTeachers,
    available_backends,
    eman_update_,
    load_ema_checkpoint,
    swapped,
)
from eman_kernels.update import swapping


class Student(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def randomise(module):
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
            else:
                tensor.random_(1, 100)
    return module


def values(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def assert_values(module, expected):
    now = module.state_dict()
    assert now.keys() == expected.keys()
    for name, tensor in now.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def student():
    return randomise(Student()).eval()


@pytest.fixture
def teacher(student):
    teacher = EMANTeacher(student, 0.5)
    randomise(teacher.module)
    return teacher


# ---------------------------------------------------------------- changes to the networks during a swap


def test_half_of_the_student(student, teacher):
    own, theirs = values(teacher.module), values(student)
    with teacher.swapped(student):
        student.half()
        assert_values(student, {name: v.half() if v.is_floating_point() else v for name, v in own.items()})
    assert_values(teacher.module, own)
    assert_values(student, {name: v.half() if v.is_floating_point() else v for name, v in theirs.items()})
    teacher.update(student)
    assert teacher.step == 1


def replace_buffer(module):
    module[1].running_mean = torch.zeros(4)


def replace_parameter(module):
    module[3].weight = nn.Parameter(torch.zeros(2, 16))


def replace_layer(module):
    module[3] = nn.Linear(16, 2)


def through_data(module):
    for parameter in module.parameters():
        parameter.data = torch.zeros_like(parameter)


def assigned(module):
    module.load_state_dict({k: torch.zeros_like(v) for k, v in module.state_dict().items()}, assign=True)


REPLACING = [replace_buffer, replace_parameter, replace_layer, through_data, assigned]


@pytest.mark.parametrize("change", REPLACING)
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("backend", [None, "foreach"])
def test_replaced_tensors_get_the_value_of_their_network(student, change, whose, backend):
    teacher = EMANTeacher(student, 0.5, backend=backend)
    randomise(teacher.module)
    own, theirs = values(teacher.module), values(student)
    with teacher.swapped(student):
        change(student if whose == "student" else teacher.module)
    assert_values(teacher.module, own)
    assert_values(student, theirs)
    teacher.update(student)
    expected = torch.lerp(own["0.weight"], theirs["0.weight"], 0.5)
    assert torch.equal(teacher.module[0].weight, expected)


def test_replaced_tensors_get_their_values_where_modules_are_sharded_as_well(student, monkeypatch):
    """Sharding the networks again may bring back the exchanged tensors, or not."""
    monkeypatch.setattr(swapping, "reshard", lambda networks: True)
    teacher = EMANTeacher(student, 0.5)
    own = values(teacher.module)
    with teacher.swapped(student):
        replace_parameter(teacher.module)
    assert_values(teacher.module, own)


def widen_within_a_context(teacher, student):
    with teacher.swapped(student):
        teacher.module[3] = nn.Linear(16, 5)


def widen_between_hooks(teacher, student):
    teacher.swap(student)
    teacher.module[3] = nn.Linear(16, 5)
    teacher.swap_back()


@pytest.mark.parametrize("widen", [widen_within_a_context, widen_between_hooks])
def test_tensors_that_cannot_be_swapped_back_are_named(student, teacher, widen):
    own, theirs = values(teacher.module), values(student)
    with pytest.raises(
        RuntimeError, match=r"(?s)the teacher's 3\.weight: its shape was \(2, 16\) and is now \(5, 16\)"
    ):
        widen(teacher, student)
    assert_values(student, theirs)
    assert torch.equal(teacher.module[0].weight, own["0.weight"])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?s)3\.weight.*load_state_dict\(\) restores the teacher"):
            teacher.update(student)
    assert teacher.step == 0
    teacher.module[3] = nn.Linear(16, 2).requires_grad_(False)
    state = {f"module.{name}": value for name, value in own.items()}
    with pytest.raises(RuntimeError, match="load_state_dict"):
        teacher.update(student)
    teacher.load_state_dict(state | {"_extra_state": torch.tensor(3)})
    teacher.update(student)
    assert teacher.step == 4
    assert torch.equal(teacher.module[0].weight, torch.lerp(own["0.weight"], theirs["0.weight"], 0.5))


def test_a_clean_swap_also_restores_the_teacher(student, teacher):
    with pytest.raises(RuntimeError, match=r"3\.bias"), teacher.swapped(student):
        teacher.module[3].bias = nn.Parameter(torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"3\.bias"):
        teacher.update(student)
    teacher.module[3].bias = nn.Parameter(torch.zeros(2), requires_grad=False)
    with teacher.swapped(student):
        pass
    teacher.update(student)
    assert teacher.step == 1


def fail_within(teacher, student, change):
    with teacher.swapped(student):
        change()
        1 / 0  # noqa: B018


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_tensor_that_is_removed_during_a_swap(student, teacher, whose):
    """There is nothing to give its value back to; every other tensor gets its own."""
    own, theirs = values(teacher.module), values(student)
    with teacher.swapped(student):
        del (teacher.module if whose == "teacher" else student)[0]._parameters["bias"]
    (own if whose == "teacher" else theirs).pop("0.bias")
    assert_values(teacher.module, own)
    assert_values(student, theirs)


class Holding(nn.Module):
    """A buffer is another view of the weight's memory."""

    def __init__(self, view):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.register_buffer("held", view(self.weight.data))


@pytest.mark.parametrize("view", [lambda weight: weight, lambda weight: weight.view(-1), lambda weight: weight[0]])
def test_a_student_that_holds_one_memory_twice(view):
    student = Holding(view)
    teacher = EMANTeacher(student, 0.5)
    before = values(student)
    with pytest.raises(
        ValueError, match=r"^the student's \w+ and the student's \w+ share memory; one of them"
    ) as error:
        teacher.swap(student)
    assert "teacher" not in str(error.value)
    assert_values(student, before)
    student.held = student.held.clone()  # the remedy in the message
    teacher.swap(student)
    teacher.swap_back()
    assert_values(student, before)


def test_the_users_exception_is_not_replaced(student, teacher):
    own = values(teacher.module)
    with pytest.raises(ZeroDivisionError):
        fail_within(teacher, student, student.half)
    assert_values(teacher.module, own)
    student.float()
    with (
        pytest.warns(UserWarning, match=r"the student's 3\.weight: its shape was"),
        pytest.raises(ZeroDivisionError),
    ):
        fail_within(teacher, student, lambda: student.add_module("3", nn.Linear(16, 7)))
    with pytest.raises(RuntimeError, match=r"3\.weight"):
        teacher.update(student)


def test_memory_that_was_freed(student, teacher):
    with pytest.raises(RuntimeError, match="freed or resized"), teacher.swapped(student):
        student[3].weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="freed or resized"):
        teacher.update(student)


# ---------------------------------------------------------------- copies and checkpoints during a swap


def saved_and_loaded(teacher):
    file = io.BytesIO()
    torch.save(teacher, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, saved_and_loaded, lambda teacher: pickle.loads(pickle.dumps(teacher))]
)
def test_a_copy_made_during_a_swap_has_the_teachers_values(student, teacher, clone):
    own, theirs = values(teacher.module), values(student)
    with teacher.swapped(student):
        twin = clone(teacher)
        assert_values(twin.module, own)
        assert_values(teacher.module, theirs)
        twin.update(copy.deepcopy(student))  # which has the teacher's values
    assert_values(teacher.module, own)
    twin.update(student)
    assert twin.step == 2


@pytest.mark.parametrize("held_by", [None, "parent"])
def test_state_dict_during_a_swap_is_the_teachers(student, teacher, held_by):
    own, theirs = values(teacher.module), values(student)
    holder, prefix = teacher, "module."
    if held_by:
        holder, prefix = nn.ModuleDict({"teacher": teacher}), "teacher.module."
    with teacher.swapped(student):
        state = holder.state_dict()
        assert torch.equal(student.state_dict()["0.weight"], own["0.weight"])
        assert torch.equal(teacher.module.state_dict()["0.weight"], theirs["0.weight"])
        with pytest.raises(RuntimeError, match="load after the swap has ended"):
            holder.load_state_dict(state)
    for name, value in own.items():
        assert torch.equal(state[prefix + name], value), name  # also after the swap


# ---------------------------------------------------------------- rules, buffers, hooks, caches


@pytest.mark.parametrize(("rules", "buffers"), [({"1.running_*": "skip"}, "ema"), (None, "skip")])
def test_tensors_that_the_update_skips_are_not_swapped(student, rules, buffers):
    teacher = EMANTeacher(student, 0.5, rules=rules, buffers=buffers)
    randomise(teacher.module)
    del teacher.module[1]._buffers["running_mean"]
    teacher.module[1].register_buffer("running_mean", None)
    student.register_buffer("queue", torch.zeros(3), persistent=False)
    if rules:
        teacher.rules = {**teacher.rules, "queue": "skip"}
    variance, weight = student[1].running_var.clone(), teacher.module[0].weight.clone()
    with teacher.swapped(student):
        assert torch.equal(student[1].running_var, variance)
        assert torch.equal(student[0].weight, weight)
    teacher.update(student)


def test_swap_and_swap_back(student, teacher):
    own, theirs = values(teacher.module), values(student)
    with pytest.raises(RuntimeError, match="not swapped"):
        teacher.swap_back()
    for _ in range(2):
        teacher.swap(student)
        assert_values(student, own)
        with pytest.raises(RuntimeError, match="swapped already"):
            teacher.swap(student)
        assert_values(student, own)
        with pytest.raises(RuntimeError, match="update it after the swap"):
            teacher.update(student)
        teacher.swap_back()
        assert_values(student, theirs)
        assert_values(teacher.module, own)


def test_a_context_that_is_garbage_collected_is_left(student, teacher):
    own = values(teacher.module)
    context = teacher.swapped(student)
    context.__enter__()
    assert_values(student, own)
    del context
    assert_values(teacher.module, own)
    teacher.update(student)


@pytest.mark.parametrize("name", ["levit_128s", "tiny_vit_5m_224", "efficientformer_l1"])
def test_attention_biases_that_timm_caches(name):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    student = timm.create_model(name, num_classes=4).eval()
    x = torch.randn(1, 3, 224, 224)
    teacher = EMANTeacher(student, 0.5)
    with torch.no_grad():
        student(x), teacher(x)
        biases = [p for n, p in student.named_parameters() if "attention_biases" in n]
        assert biases
        for p in biases:
            p.add_(torch.randn_like(p))
        student.train().eval()
        teacher.update(student)
        assert torch.equal(teacher(x), copy.deepcopy(teacher.module).train().eval()(x))
        own = student(x)
        theirs = teacher(x)
        assert not torch.equal(own, theirs)
        with teacher.swapped(student):
            assert torch.equal(student(x), theirs)
        assert torch.equal(student(x), own)
        assert torch.equal(teacher(x), theirs)


class Caching(nn.Linear):
    """Keeps a copy of its weight in eval mode."""

    def train(self, mode=True):
        super().train(mode)
        self.kept = None if mode else self.weight.detach().clone()
        return self

    def forward(self, x):
        return x @ (self.weight if self.kept is None else self.kept).t() + self.bias


class CachingUntilTraining(Caching):
    """Makes the copy in the first forward in eval mode and drops it only in training mode, as timm 1.0.29 does."""

    kept = None

    def train(self, mode=True):
        nn.Linear.train(self, mode)
        if mode:
            self.kept = None
        return self

    def forward(self, x):
        if self.kept is None and not self.training:
            self.kept = self.weight.detach().clone()
        return super().forward(x)


@pytest.mark.parametrize("caching", [Caching, CachingUntilTraining])
@pytest.mark.parametrize("training", [True, False])
def test_modules_that_cache_in_eval_mode(training, caching):
    student = nn.Sequential(caching(3, 3), nn.Dropout(0.5), nn.Linear(3, 3)).train(training)
    student[1].eval()
    teachers = EMANTeachers(student, [0.25, 0.75])
    x = torch.randn(2, 3)
    with torch.no_grad():
        for network in (student, *teachers):
            network(x)
        student[0].weight.add_(1)
        student.train(training)
        student[1].eval()
        before = teachers[0].module[0].weight.clone()
        teachers.update(student)
        assert torch.equal(teachers[0].module[0].weight, torch.lerp(before, student[0].weight, 0.75))
        for teacher in teachers:
            own = teacher.module[0]
            assert torch.equal(own(x), x @ own.weight.t() + own.bias)
            assert torch.equal(own.kept, own.weight)
            assert not own.training
        with teachers.swapped(1, student):
            assert torch.equal(student[0](x), x @ student[0].weight.t() + student[0].bias)
            assert [m.training for m in student] == [training, False, training]
        assert torch.equal(student[0](x), x @ student[0].weight.t() + student[0].bias)
        assert [m.training for m in student] == [training, False, training]


def test_the_modes_inside_a_caching_module():
    student = Caching(3, 3)
    student.add_module("dropout", nn.Dropout())
    student.add_module("norm", nn.BatchNorm1d(3))
    teacher = EMANTeacher(student)
    student.train()
    student.norm.eval()
    with teacher.swapped(student):
        assert [m.training for m in student.modules()] == [True, True, False]
    assert [m.training for m in student.modules()] == [True, True, False]


def test_the_cache_of_a_layer_added_later():
    student = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    teacher = EMANTeacher(student, 0.5)
    teacher.update(student)
    student[1] = Caching(3, 3)
    teacher.module[1] = Caching(3, 3).requires_grad_(False).eval()
    teacher.update(student)
    assert torch.equal(teacher.module[1].kept, teacher.module[1].weight)


def test_inside_one_autocast_context(student, teacher):
    x = torch.randn(2, 3, 4, 4)
    student.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16):
        own = student(x)
        expected = copy.deepcopy(teacher.module).requires_grad_(True)(x)
        assert not torch.equal(own, expected)
        with swapped(teacher.module, student):
            assert torch.equal(student(x), expected)
        assert torch.equal(student(x), own)


# ---------------------------------------------------------------- threads, errors, interpreter exit


def test_threads_take_turns():
    # Large enough that one thread can start while the kernel of another runs.
    student = nn.Linear(3000, 3000, bias=False)
    teacher = EMANTeacher(student, 0.99)
    teacher.module.weight.fill_(1)
    with torch.no_grad():
        student.weight.fill_(0)
    stop, refused, wrong = threading.Event(), [0], []

    def often(action, says):
        while not stop.is_set():
            try:
                action()
            except RuntimeError as error:
                refused[0] += 1
                if says not in str(error):
                    wrong.append(error)
                stop.wait(0.001)  # lets the others run
            except BaseException as error:
                wrong.append(error)
                stop.set()
            if refused[0] >= 20 and teacher.step >= 10:
                stop.set()

    def swap():
        with teacher.swapped(student):
            pass

    tasks = [
        (swap, "swapped already"),
        (swap, "swapped already"),
        (lambda: teacher.update(student), "with its student"),
    ]
    threads = [threading.Thread(target=often, args=task, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)  # only a deadlock takes that long
    assert not wrong
    assert stop.is_set(), f"{refused[0]} refusals, {teacher.step} updates"
    value = torch.ones(1)
    for _ in range(teacher.step):
        value.lerp_(torch.zeros(1), 1 - 0.99)
    assert (teacher.module.weight == value).all()
    assert (student.weight == 0).all()


def test_updates_from_several_threads():
    """Each thread updates its own teacher, one that all share, and new teachers that are planned concurrently."""
    each, student = 200, nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    shared, updated = EMANTeacher(student, 0.9), {}
    with torch.no_grad():
        for teacher in (shared, *(EMANTeacher(student, 0.9) for _ in range(4))):
            for parameter in teacher.module.parameters():
                parameter.fill_(1)
            updated[teacher] = 0
        for parameter in student.parameters():
            parameter.fill_(0)
    _, *own = updated

    def work(teacher):
        for number in range(each):
            teacher.update(student)
            shared.update(student)
            if number % 4 == 0:
                EMANTeacher(student, 0.5).update(student)
        updated[teacher] = each

    threads = [threading.Thread(target=work, args=(teacher,)) for teacher in own]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    updated[shared] = 4 * each
    for teacher, number in updated.items():
        assert teacher.step == number
        value = torch.ones(1)
        for _ in range(number):
            value.lerp_(torch.zeros(1), 1 - 0.9)
        assert all((parameter == value).all() for parameter in teacher.module.parameters())


class Meanwhile(TorchDispatchMode):
    """Run the action once in another thread, just before the first torch write in this one."""

    def __init__(self, action):
        super().__init__()
        self.other = threading.Thread(target=action)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if self.other.ident is None and operation is torch.ops.aten.copy_.default:
            self.other.start()
            self.other.join(0.2)  # enough time for it, unless it waits for this thread
        return operation(*args, **(kwargs or {}))


def test_two_threads_that_swap_back_at_the_same_time(student):
    """Only one thread swaps each piece back; if both did, it would be swapped once more."""
    teacher = EMANTeacher(student, 0.5, backend="foreach")  # which uses torch operations, seen by Meanwhile
    randomise(teacher.module)
    own, theirs = values(teacher.module), values(student)
    teacher.swap(student)
    with Meanwhile(teacher.swap_back) as meanwhile:
        teacher.swap_back()
    meanwhile.other.join()
    assert_values(teacher.module, own)
    assert_values(student, theirs)
    teacher.update(student)
    assert teacher.step == 1


def test_an_update_that_raises_does_not_count(student, teacher):
    with pytest.raises(ValueError, match=r"momentum must be in"):
        teacher.update(student, momentum=2.0)
    student[3] = nn.Linear(16, 3)
    with pytest.raises(ValueError, match=r"3\.weight"):
        teacher.update(student)
    assert teacher.step == 0


@pytest.mark.parametrize("backend", ["cpu", "foreach"])
def test_still_open_when_python_ends(backend):
    """Swapped by a context, by hooks and by the function: Python ends normally."""
    if reason := available_backends()[backend]:
        pytest.skip(reason)
    code = f"""
import torch
from torch import nn
from eman_kernels import EMANTeacher, swapped
students = [nn.Sequential(nn.Linear(200, 200), nn.BatchNorm1d(200)) for _ in range(3)]
teachers = [EMANTeacher(student, backend={backend!r}) for student in students]
contexts = [teachers[0].swapped(students[0]), swapped(teachers[1].module, students[1], backend={backend!r})]
for context in contexts:
    context.__enter__()
teachers[2].swap(students[2])
print("open")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert (done.returncode, done.stdout) == (0, "open\n"), done.stderr
    assert not done.stderr


def test_the_function_takes_buffers_too(student):
    teacher = randomise(copy.deepcopy(student))
    mean, weight = student[1].running_mean.clone(), teacher[0].weight.clone()
    with swapped(teacher, student, buffers="skip"):
        assert torch.equal(student[1].running_mean, mean)
        assert torch.equal(student[0].weight, weight)
    eman_update_(teacher, student, 0.5)


def test_models_that_only_forward_the_mode_are_not_caching():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from eman_kernels.update.caching import find_caching_modules

    config = transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = transformers.BertModel(config)
    assert not find_caching_modules(model)
    model.encoder.add_module("caching", Caching(2, 2))
    assert [reference() for reference in find_caching_modules(model)] == [model.encoder.caching]


# ---------------------------------------------------------------- train() that changes weights


class Merging(nn.Linear):
    """loralib's layer: in eval mode its low-rank part is in the weight."""

    merged = False

    def __init__(self):
        super().__init__(1, 1, bias=False)
        self.low = nn.Parameter(torch.zeros(1, 1))  # as loralib starts: merging it changes no value
        nn.init.ones_(self.weight)

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.written(-self.low if self.merged else self.low)
            self.merged = not mode
        return self


def subtract(layer, delta):
    layer.weight.data -= -delta


def add_without_gradients(layer, delta):
    with torch.no_grad():
        layer.weight.add_(delta)


def add_to_the_out_argument(layer, delta):
    with torch.no_grad():
        torch.add(layer.weight, delta, out=layer.weight)


def add_to_a_list(layer, delta):
    torch._foreach_add_([layer.weight.detach()], [delta.detach()])


def set_the_data(layer, delta):
    layer.weight.data = layer.weight.data + delta


def replace_the_parameter(layer, delta):
    layer.weight = nn.Parameter(layer.weight + delta)


WRITES = [subtract, add_without_gradients, add_to_the_out_argument, add_to_a_list, set_the_data, replace_the_parameter]


def merging(written, layer=None):
    return nn.Sequential(
        type("Merging", (Merging,), {"written": written})() if layer is None else layer, nn.Dropout(0.5)
    )


def snapshot(network):
    tensors = [(id(tensor), tensor.data_ptr(), tensor.item(), tensor._version) for tensor in network.parameters()]
    return tensors, [module.training for module in network.modules()], vars(network[0]).get("merged")


@pytest.mark.parametrize("written", WRITES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("low", [0.0, 2.0])
def test_train_that_writes_parameters_is_refused(written, training, low):
    student = merging(written)
    student[0].low.data.fill_(low)
    student.train(training)
    teacher = copy.deepcopy(student).requires_grad_(False)
    before = snapshot(student), snapshot(teacher)
    for act in (
        lambda: EMANTeacher(student),
        lambda: EMANTeacher(student, rules={"*.weight": "share"}),
        lambda: EMANTeacher(student, module=teacher, keep_values=True),
        lambda: eman_update_(teacher, student, 0.0),
        lambda: swapped(teacher, student).__enter__(),
    ):
        with pytest.raises(ValueError, match=r"train\(\) of 0 \(Merging\) changes parameters.*merge_weights=False"):
            act()
        assert (snapshot(student), snapshot(teacher)) == before


def test_a_layer_that_merges_and_was_added_later():
    student = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Dropout(0.5))
    teacher = EMANTeacher(student, 0.5)
    teacher.update(student)
    student[0], teacher.module[0] = merging(subtract)[0], merging(subtract)[0].requires_grad_(False)
    before = values(teacher.module)
    with pytest.raises(ValueError, match="changes parameters"):
        teacher.update(student)
    assert_values(teacher.module, before)


# ---------------------------------------------------------------- state_dict while swapped, and caches after a load


def renamed(module):
    """Saved and loaded under other names, and through copies of the tensors."""

    def rename(_, state, prefix, metadata):
        for name in list(state):
            if name.startswith(prefix):
                state[f"{prefix}renamed_{name.removeprefix(prefix)}"] = state.pop(name).clone()

    def restore(_, state, prefix, *args):
        for name in list(state):
            if name.startswith(prefix + "renamed_"):
                state[prefix + name.removeprefix(prefix + "renamed_")] = state.pop(name)

    module._register_state_dict_hook(rename)
    module.register_load_state_dict_pre_hook(restore)
    return module


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, renamed])
@pytest.mark.parametrize("load", ["load_state_dict", "load_ema_checkpoint"])
def test_hooks_that_rename_what_is_saved(wrap, load):
    student = nn.Sequential(*map(wrap, Student()))
    teacher = EMANTeacher(student, 0.5)
    randomise(teacher.module)
    own, theirs = values(teacher.module), values(student)
    outside = teacher.state_dict()
    with teacher.swapped(student):
        state = teacher.state_dict()
        assert_values(teacher.module, theirs)
    assert_values(teacher.module, own)
    assert state.keys() == outside.keys()
    for name, value in outside.items():
        assert torch.equal(state[name], value), name
    fresh = EMANTeacher(student)
    fresh.load_state_dict(state) if load == "load_state_dict" else load_ema_checkpoint(fresh, state)
    assert_values(fresh.module, own)
    with pytest.raises(RuntimeError, match="nothing was loaded"):
        fresh.load_state_dict({"other": torch.ones(1)}, strict=False)


def test_tied_weights_in_a_file_saved_while_swapped(tmp_path):
    student = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    student[1].weight = student[0].weight
    teacher = EMANTeacher(student, 0.5)
    randomise(teacher.module)
    own = values(teacher.module)
    with teacher.swapped(student):
        state = teacher.state_dict()
        safetensors_torch.save_model(teacher, tmp_path / "teacher.safetensors")
    assert state["module.0.weight"].data_ptr() == state["module.1.weight"].data_ptr()
    fresh = EMANTeacher(student)
    safetensors_torch.load_model(fresh, tmp_path / "teacher.safetensors")
    assert_values(fresh.module, own)


def load_in_place(teacher, state):
    """As distributed checkpoint does."""
    for name, tensor in teacher.state_dict().items():
        if name != "_extra_state":
            tensor.copy_(state[name])


def load_in_a_parent(teacher, state):
    nn.ModuleDict({"t": teacher}).load_state_dict({f"t.{name}": value for name, value in state.items()})


def load_module(teacher, state):
    inner = {name.removeprefix("module."): value for name, value in state.items() if name != "_extra_state"}
    teacher.module.load_state_dict(inner)


LOADING = {
    "load_state_dict": lambda teacher, state: teacher.load_state_dict(state),
    "assign": lambda teacher, state: teacher.load_state_dict(state, assign=True),
    "load_ema_checkpoint": load_ema_checkpoint,
    "in a parent": load_in_a_parent,
    "in place": load_in_place,
    "module.load_state_dict": load_module,
}


@pytest.mark.parametrize("caching", [Caching, CachingUntilTraining])
@pytest.mark.parametrize("load", LOADING.values(), ids=LOADING)
@pytest.mark.parametrize("cast", [None, torch.bfloat16])
def test_caches_after_a_load(caching, load, cast):
    student = nn.Sequential(caching(3, 3), nn.Linear(3, 3))
    teacher, loaded = EMANTeacher(student, cast=cast), EMANTeacher(student)
    with torch.no_grad():
        for parameter in [*loaded.parameters()]:
            parameter.fill_(7)
    x = torch.ones(2, 3)
    before = teacher(x).float()
    load(teacher, {name: value.clone() for name, value in loaded.state_dict().items()})
    expected = 7.0 * (3 * (3 * 7 + 7) + 1)
    assert not torch.equal(before, torch.full((2, 3), expected))
    torch.testing.assert_close(teacher(x).float(), torch.full((2, 3), expected), rtol=0.01, atol=0)
    assert torch.equal(teacher.module(x), torch.full((2, 3), expected))


@pytest.mark.parametrize("make", [lambda: Caching(3, 3), lambda: CachingUntilTraining(3, 3), "levit_128s"])
def test_caches_of_two_precisions(make):
    if isinstance(make, str):
        timm = pytest.importorskip("timm")
        student, x = timm.create_model(make, num_classes=4), torch.randn(1, 3, 224, 224)
    else:
        student, x = nn.Sequential(make()), torch.randn(2, 3)
    teacher = EMANTeacher(student, 0.5, cast=torch.bfloat16)
    for _ in range(2):
        assert teacher(x).dtype == torch.bfloat16
        assert teacher.module(x).dtype == torch.float32
        teacher.update(student)
        assert teacher.module(x).dtype == torch.float32
        assert teacher(x).dtype == torch.bfloat16
        teacher.update(student)
        assert torch.equal(teacher.module(x), copy.deepcopy(teacher.module)(x))


# ---------------------------------------------------------------- lists and mappings of tensors


def by_position(average, student):
    return [average[name] for name in average], [dict(student.named_parameters())[name] for name in average]


def by_key(average, student):
    return average, dict(reversed(dict(student.named_parameters()).items()))


def by_generator(average, student):
    return iter(average.values()), student.parameters()


@pytest.mark.parametrize("given", [by_position, by_key, by_generator])
@pytest.mark.parametrize("backend", [None, "foreach"])
def test_tensors_are_exchanged_without_a_network(student, given, backend):
    """As torch_ema's and composer's averages, which are lists and dicts."""
    average = {name: torch.rand_like(parameter) for name, parameter in student.named_parameters()}
    own, theirs, buffers = {n: t.clone() for n, t in average.items()}, values(student), dict(student.named_buffers())
    exchange = swapped(*given(average, student), backend=backend)
    for _ in range(2):  # it can be entered again
        with exchange:
            assert_values(student, theirs | own)
            assert all(torch.equal(average[name], theirs[name]) for name in average)
            student(torch.randn(1, 3, 4, 4))
        assert_values(student, theirs)
        assert all(torch.equal(average[name], own[name]) for name in average)
    assert all(buffer is buffers[name] for name, buffer in student.named_buffers())


def test_tensors_are_exchanged_back_after_an_exception_and_a_conversion(student):
    average = [torch.rand_like(parameter) for parameter in student.parameters()]
    own, theirs = [tensor.clone() for tensor in average], values(student)

    def convert_and_fail():
        with swapped(average, student.parameters()):
            student.half()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        convert_and_fail()
    assert all(map(torch.equal, average, own))
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, theirs[name].half())


def test_tensors_that_cannot_be_exchanged(student):
    average = {name: torch.rand_like(parameter) for name, parameter in student.named_parameters()}
    parameters, before = dict(student.named_parameters()), values(student)
    few, half = dict(list(parameters.items())[1:]), parameters | {"3.bias": torch.ones(2).half()}
    for given, kind, says in (
        ((average, few), ValueError, r"0\.weight: the student has none"),
        ((list(average.values()), list(few.values())), ValueError, "got 6 teacher tensors and 5 student tensors"),
        ((average, list(parameters.values())), TypeError, "by key if both arguments are mappings"),
        ((average, student), TypeError, r"must be networks \(nn\.Module\)"),
        ((average, parameters | {"3.bias": 1.0}), TypeError, r"student\['3\.bias'\] must be a tensor"),
        (
            (average, half),
            ValueError,
            r"3\.bias: the teacher is torch\.float32",
        ),
        ((parameters, parameters), ValueError, "share memory"),
    ):
        with pytest.raises(kind, match=says), swapped(*given):
            pass
    assert_values(student, before)


def test_rules_of_a_swap_match_keys(student):
    average = {name: torch.rand_like(parameter) for name, parameter in student.named_parameters()}
    theirs = values(student)
    with swapped(average, dict(student.named_parameters()), rules={"3.*": "skip"}):
        assert torch.equal(student[3].weight, theirs["3.weight"])
        assert not torch.equal(student[0].weight, theirs["0.weight"])
    assert_values(student, theirs)


def test_a_module_under_two_names_loads_from_the_second():
    shared = nn.Linear(1, 1, bias=False)
    teacher = EMANTeacher(nn.ModuleDict({"first": shared, "second": shared}))
    teacher.load_state_dict({"module.second.weight": torch.full((1, 1), 7.0)}, strict=False)
    assert teacher.module["first"].weight.item() == 7.0
