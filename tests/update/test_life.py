"""The life of a teacher: random networks and random events, with each update compared to a simple model.

After each event an update is either right, or raises an error that names the cause and writes nothing. Nothing outside
the teacher is ever written. EMAN_KERNELS_FUZZ=N runs N random steps, different ones each time, instead of fixed ones.
"""

import copy
import gc
import inspect
import io
import os
import pickle
from fnmatch import fnmatchcase

import pytest
import torch
import torch.distributed as dist
from conftest import assert_same_bits, lerp
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from life_events import BLOCKS, EVENTS, STRUCTURAL, WRITING, Net, is_expanded, named, randomise
from torch import nn

from eman_kernels import EMANTeacher, EMANTeachers, eman_update_
from eman_kernels.backends import cpu

pytestmark = pytest.mark.filterwarnings("ignore:.*take the slow path")

FUZZ = os.environ.get("EMAN_KERNELS_FUZZ")
STEPS = [int(FUZZ)] if FUZZ else [2_000, pytest.param(10_000, marks=pytest.mark.slow)]
STEPS_OF_A_LIFE = 50
REFUSALS = (ValueError, RuntimeError, TypeError)
BACKENDS = [None, "foreach", "reference"] + ["cpu"] * (cpu.unavailable("cpu") is None)

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "momentum": st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0, lambda step: 0.5 + 0.001 * step, torch.tensor(0.7)]),
        "rules": st.sampled_from([{}, {"*bias": "copy"}, {"*weight*": "skip"}, {"*running*": "copy", "*": "ema"}]),
        "buffers": st.sampled_from(["ema", "copy", "skip"]),
        "backend": st.sampled_from(BACKENDS),
        "rounding": st.sampled_from(["nearest", "stochastic"]),
        "nonfinite": st.sampled_from(["propagate", "skip"]),
        "dtype": st.sampled_from([None, torch.float32, torch.bfloat16]),
        "cast": st.sampled_from([None, torch.bfloat16, torch.float16]),
        "capturable": st.booleans(),
    },
)
WHO = st.sampled_from(["student", "teacher", "all"])
# Without init_sync, DDP broadcasts the tensors, and gloo does not support every dtype. torch 2.6 lacks the option.
DDP_IS_LOCAL = "init_sync" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
PICK = st.integers(0, 1000)


def tensors_of(net):
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in named(net).items()}


def by_name(net):
    names = tensors_of(net)
    while names and all(name.startswith("module.") for name in names):
        names = {name.removeprefix("module."): tensor for name, tensor in names.items()}
    return names


def place(tensor):
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def whole(tensor):
    """All bytes of its storage, as int64 if possible, which is faster to compare."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8 if storage.nbytes() % 8 else torch.int64).set_(storage)


def is_number(tensor):
    return tensor.is_floating_point() or tensor.is_complex()


def at_least_float32(tensor):
    return tensor if tensor.itemsize >= 4 else tensor.float()


def expected(t, s, how, momentum, skips):
    """The expected value; with stochastic rounding, the average before rounding."""
    if how == "skip":
        return t.clone()
    if how == "copy":
        new = s.to(t.dtype)
    elif t.is_complex():
        wide = torch.promote_types(t.dtype, s.dtype)
        new = torch.lerp(t.to(wide), s.to(wide), 1 - momentum).to(t.dtype)
        new = torch.where(t == s, t, new)
    else:
        start = t
        if skips:
            start = torch.where(t.isfinite(), t.to(torch.promote_types(t.dtype, s.dtype)), s)
        new = lerp(start, s, momentum).to(t.dtype) if momentum < 1 else t.clone()
    return torch.where(s.isfinite(), new, t) if skips else new


def within_an_ulp(got, nearest):
    bits = [tensor.contiguous().view(torch.int16).long() for tensor in (got, nearest)]
    same = (got == nearest) | (got.isnan() & nearest.isnan())
    return bool((same | ((bits[0] - bits[1]).abs() <= 1) | ((got.abs() + nearest.abs()) < 1e-7)).all())


class Life(RuleBasedStateMachine):
    """One student and its teachers."""

    steps = 0  # over all examples
    updates = 0
    refusals = 0

    @initialize(blocks=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=3), seed=st.integers(0, 99))
    def begin(self, blocks, seed):
        torch.manual_seed(seed)
        self.student = Net()
        for i, block in enumerate(blocks):
            block(self.student, f"b{i}")
        self.keepers = [EMANTeacher(self.student, 0.5)]
        self.past = []  # memory that no network uses any more, and its contents

    # ------------------------------------------------------------ shared by the rules

    def core(self):
        net = self.student
        while not isinstance(net, Net):
            net = net.module if hasattr(net, "module") else net._orig_mod
        return net

    def members(self):
        return [member for keeper in self.keepers for member in self.members_of(keeper)]

    def members_of(self, keeper):
        return list(keeper) if isinstance(keeper, EMANTeachers) else [keeper]

    def nets(self, who, pick):
        members = self.members()
        if who == "all":
            return [self.core(), *(member.module for member in members)]
        if who == "student" or not members:
            return [self.core()]
        return [members[pick % len(members)].module]

    def everything(self):
        nets = [self.core(), *(member.module for member in self.members())]
        return [tensor for net in nets for tensor in named(net).values()]

    def remember(self, nets):
        return [whole(tensor) for net in nets for tensor in named(net).values()]

    def bury(self, memory):
        """From now on, check that memory of these that no network uses any more is not written."""
        living = {tensor.untyped_storage().data_ptr() for tensor in self.everything()}
        dead = {m.data_ptr(): m for m in memory if m.numel() and m.data_ptr() not in living}
        self.past = [(m, was) for m, was in self.past if m.data_ptr() not in living]
        self.past += [(m, m.clone()) for m in dead.values()]
        del self.past[:-20]

    def how(self, member, name, net, states):
        for pattern, rule_of_pattern in member.rules.items():
            if fnmatchcase(name, pattern):
                return rule_of_pattern
        tensor, is_buffer = states[name]
        if is_buffer and member.buffer_rule != "ema":
            return member.buffer_rule
        if not is_number(tensor) or name.endswith(("._u", "._v")):
            return "copy"
        return "ema"

    def plan(self, members):
        """What an update should do: the pairs per member, the reasons why it must be refused, and whether it may be."""
        students = by_name(self.student)
        buffers = {id(b) for b in self.core().buffers()}
        pairs, must, may = [], [], False
        written, read = {}, {place(tensor)[0] for tensor in students.values() if tensor.numel()}
        for k, member in enumerate(members):
            teachers = by_name(member.module)
            is_buffer = buffers | {id(b) for b in member.module.buffers()}
            both = students | teachers
            kinds = {n: (t, id(t) in is_buffer or id(students.get(n)) in is_buffer) for n, t in both.items()}
            its = []
            for name in both:
                how = self.how(member, name, member.module, kinds)
                if how == "skip":
                    continue
                if name not in teachers or name not in students:
                    must.append(name)
                    continue
                t, s = teachers[name].detach(), students[name].detach()
                its.append((name, t, s, how))
                kind = [(is_number(x), x.is_complex()) for x in (t, s)]
                if t.shape != s.shape or kind[0] != kind[1] or (how == "ema" and not is_number(t)):
                    must.append(name)
                if not t.numel():
                    continue
                if is_expanded(t):
                    must.append(name)
                if t.data_ptr() in read:
                    must.append(name)
                tied = written.setdefault(t.data_ptr(), (k, place(t), place(s), how, name))
                if tied[:4] != (k, place(t), place(s), how):
                    may = True  # ties that the student lacks, or ties between different shapes
            pairs.append(its)
            grads = [[p.requires_grad for p in net.parameters()] for net in (member.module, self.core())]
            if all(grads[0]) and not any(grads[1]):
                may = True  # arguments in the wrong order are detected at planning
        return pairs, must, may

    def check_update(self, keeper, momentum=None, found_inf=None, by_function=False):
        members = self.members_of(keeper)
        if by_function:
            members = members[:1]
        with torch.no_grad():
            randomise(by_name(self.student).values())
        pairs, must, may = self.plan(members)
        first = members[0]
        step = first.step
        momenta = [self.momentum_of(member) if momentum is None else float(momentum) for member in members]
        skips, at_random = first.nonfinite == "skip", first.rounding == "stochastic"
        off = found_inf is not None and bool(found_inf)
        wants = []
        for its, m in zip(pairs, momenta, strict=True):
            if must or may:
                break
            wants += [(name, t, t.clone() if off else expected(t, s, how, m, skips), how) for name, t, s, how in its]
        mine = {id(member) for member in members}
        others = [t for member in self.members() if id(member) not in mine for t in named(member.module).values()]
        outside = {m.data_ptr(): m for m in map(whole, [*others, *named(self.student).values()]) if m.numel()}
        own = {m.data_ptr(): m for member in members for m in map(whole, named(member.module).values()) if m.numel()}
        before = [(m, m.clone()) for m in outside.values()]
        held = [(m, m.clone()) for m in own.values()]
        if must or may:
            try:
                self.run(keeper, members, momentum, found_inf, by_function)
            except REFUSALS as error:
                assert not must or any(name in str(error) for name in must), (must, str(error))  # noqa: PT017
                assert [member.step for member in members] == [step] * len(members) or len(members) > 1
                assert all(torch.equal(m, was) for m, was in held), "a refused update has written"
                Life.refusals += 1
            else:
                assert not must, f"not refused: {must}"
            with torch.inference_mode(False):
                for member in members:
                    member.module = copy.deepcopy(self.core()).requires_grad_(False)
        else:
            self.run(keeper, members, momentum, found_inf, by_function)
            for name, t, want, how in wants:
                if t.is_complex():
                    torch.testing.assert_close(t, want, equal_nan=True, msg=name)
                elif at_random and how == "ema" and t.itemsize == 2:
                    assert within_an_ulp(t, want), (name, t, want)
                else:
                    assert_same_bits(t, want, name)
            counted = 0 if off or by_function else 1
            assert first.step == step + counted
        assert all(torch.equal(m, was) for m, was in before), "memory outside its teacher was written"
        assert all(torch.equal(m, was) for m, was in self.past), "memory of the past was written"
        Life.updates += 1

    def momentum_of(self, member):
        momentum = member.momentum(member.step) if callable(member.momentum) else member.momentum
        return float(momentum)

    def run(self, keeper, members, momentum, found_inf, by_function):
        first = members[0]
        if by_function:
            given = self.momentum_of(first) if momentum is None else momentum
            options = {"rules": first.rules, "buffers": first.buffer_rule, "backend": first.backend}
            options |= {"rounding": first.rounding, "step": first.step, "nonfinite": first.nonfinite}
            eman_update_(first.module, self.student, given, found_inf=found_inf, **options)
        elif isinstance(keeper, EMANTeachers):
            keeper.update(self.student, found_inf=found_inf)
        else:
            keeper.update(self.student, momentum=momentum, found_inf=found_inf)

    def follow(self, pick):
        """Update one keeper and check the result."""
        Life.steps += 1
        if self.keepers:
            self.check_update(self.keepers[pick % len(self.keepers)], by_function=pick % 3 == 0)

    # ------------------------------------------------------------ the rules

    @rule(options=OPTIONS, momenta=st.sampled_from([None, None, [0.3, 0.9]]), pick=PICK)
    def a_teacher(self, options, momenta, pick):
        if len(self.keepers) == 3:
            old = self.keepers.pop(0)
            memory = self.remember([m.module for m in self.members_of(old)]) if pick % 2 else []
            del old
            self.bury(memory)
        try:
            if momenta is None:
                keeper = EMANTeacher(self.student, **options)
            else:
                keeper = EMANTeachers(self.student, momenta, **{k: v for k, v in options.items() if k != "momentum"})
        except ValueError as error:
            assert "is not narrower" in str(error)  # noqa: PT017
            keeper = EMANTeacher(self.student)
        self.keepers.append(keeper)
        self.follow(len(self.keepers) - 1)

    @rule(event=st.sampled_from(EVENTS), who=WHO, pick=PICK)
    def something_happens(self, event, who, pick):
        if event in STRUCTURAL and pick % 4:
            who = "all"
        nets = self.nets(who, pick)
        memory = self.remember(nets) if pick % 2 else []  # otherwise the memory may be reused
        for net in nets:
            torch.manual_seed(pick)
            event(net, pick)
        self.bury(memory)
        self.follow(pick)

    @precondition(lambda self: self.keepers)
    @rule(
        momentum=st.sampled_from([None, 0.0, 0.25, 0.5, 0.9, 1.0, torch.tensor(0.6, dtype=torch.float64)]),
        off=st.sampled_from([None, None, 0.0, 1.0]),
        mode=st.sampled_from([torch.no_grad, torch.enable_grad, torch.inference_mode]),
        pick=PICK,
    )
    def an_update(self, momentum, off, mode, pick):
        Life.steps += 1
        keeper = self.keepers[pick % len(self.keepers)]
        several = isinstance(keeper, EMANTeachers)
        with mode():
            found_inf = None if off is None else torch.tensor(off)
        number = None if several or momentum is None else momentum
        if isinstance(number, torch.Tensor):
            number = number.clone()
        with mode():
            self.check_update(keeper, number, found_inf)

    @precondition(lambda self: self.keepers)
    @rule(pick=PICK, other=OPTIONS)
    def other_options(self, pick, other):
        for member in self.members_of(self.keepers[pick % len(self.keepers)]):
            member.rules = other.get("rules", {})
            member.buffer_rule = other.get("buffers", "ema")
            member.backend = other.get("backend")
            member.rounding = other.get("rounding", "nearest")
            member.nonfinite = other.get("nonfinite", "propagate")
        self.follow(pick)

    @precondition(lambda self: self.keepers)
    @rule(pick=PICK, of_the_student=st.booleans())
    def another_module(self, pick, of_the_student):
        """Replace the teacher's module, with `cast=` too. The old one is not written."""
        members = self.members()
        member = members[pick % len(members)]
        memory = self.remember([member.module])
        if of_the_student:
            member.module = copy.deepcopy(self.core()).requires_grad_(False)
        else:
            member.module = pickle_or_copy(member.module)
        self.bury(memory)
        self.follow(pick)

    @rule(how=st.sampled_from([copy.deepcopy, lambda net: pickle_or_copy(net)]), pick=PICK)
    def another_student(self, how, pick):
        """Replace the student. The old one is freed, so the new one or its tensors may get the same addresses."""
        memory = self.remember([self.core()]) if pick % 2 else []
        self.student = how(self.core())
        if pick % 8 == 0:
            gc.collect()
        self.bury(memory)
        self.follow(pick)

    @rule(wrapper=st.sampled_from(["ddp", "dp", "compile", "none"]), pick=PICK)
    def wrapped(self, wrapper, pick):
        core = self.core()
        self.student = core
        if (
            wrapper == "ddp"
            and DDP_IS_LOCAL
            and all(p.is_contiguous() for p in core.parameters())
            and not core.has_odd()
        ):
            if any(p.requires_grad for p in core.parameters()):
                self.student = nn.parallel.DistributedDataParallel(core, init_sync=False)
        elif wrapper == "dp":
            self.student = nn.DataParallel(core).cpu()
        elif wrapper == "compile":
            self.student = torch.compile(core)
        self.follow(pick)

    @precondition(lambda self: self.keepers)
    @rule(pick=PICK, how=st.sampled_from(["deepcopy", "pickle", "checkpoint"]))
    def a_copy_of_a_teacher(self, pick, how):
        at = pick % len(self.keepers)
        keeper = self.keepers[at]
        steps = [member.step for member in self.members_of(keeper)]
        before = [{n: t.clone() for n, t in named(m.module).items()} for m in self.members_of(keeper)]
        persistent = [set(m.module.state_dict()) for m in self.members_of(keeper)]
        if how == "pickle" and not any(callable(m.momentum) for m in self.members_of(keeper)):
            other = pickle_or_copy(keeper)
        else:
            other = copy.deepcopy(keeper)
        if how == "checkpoint":
            file = io.BytesIO()
            torch.save(keeper.state_dict(), file)
            file.seek(0)
            with torch.no_grad():
                randomise(t for m in self.members_of(other) for t in named(m.module).values() if not is_expanded(t))
            other.load_state_dict(torch.load(file))
        assert [member.step for member in self.members_of(other)] == steps
        for member, was, names in zip(self.members_of(other), before, persistent, strict=True):
            for name, tensor in named(member.module).items():
                if how != "checkpoint" or name in names:
                    assert_same_bits(tensor, was[name], name)
        self.keepers[at] = other
        self.follow(at)

    @precondition(lambda self: self.keepers)
    @rule(pick=PICK, event=st.sampled_from([None, *EVENTS]), raises=st.booleans())
    def exchanged(self, pick, event, raises):
        Life.steps += 1
        members = self.members()
        member = members[pick % len(members)]
        nets = member.module, self.core()
        own = [{name: t.detach().clone() for name, t in named(net).items()} for net in nets]
        keep = event is None or event in (*STRUCTURAL, *WRITING)
        context = member.swapped(self.student)
        try:
            context.__enter__()
        except REFUSALS:
            pass
        else:
            lost = False
            if not keep:
                event(nets[1], pick)
            try:
                kind = KeyError if raises else None
                context.__exit__(kind, kind and kind(), None)
            except RuntimeError as error:
                assert "cannot take back" in str(error) or "was freed or resized" in str(error)  # noqa: PT017
                lost = True
            if member.state.lock.unrestored or lost:
                member.state.lock.unrestored = ""
                return
        for net, was in zip(nets, own, strict=True):
            if not keep and net is nets[1]:
                continue  # the event may have written to it
            for name, tensor in named(net).items():
                assert_same_bits(tensor, was[name], name)
        assert member.state.lock.exchange is None
        self.follow(pick)

    @precondition(lambda self: any(member.cast is not None for member in self.members()))
    @rule(pick=PICK)
    def a_forward(self, pick):
        """A forward reads the teacher's current values, in the dtype in which it runs."""
        Life.steps += 1
        members = [member for member in self.members() if member.cast is not None]
        member = members[pick % len(members)]
        seen = member()
        for name, tensor in named(member.module).items():
            want = tensor
            if tensor.is_floating_point() and tensor.itemsize >= 2:
                want = tensor.to(seen[name].dtype)
                assert "norm" in name or seen[name].dtype in (
                    member.cast,
                    *({tensor.dtype} if tensor.itemsize == 2 else ()),
                )
            assert_same_bits(seen[name], want, name)

    @precondition(lambda self: self.keepers)
    @rule(pick=PICK)
    def on_the_meta_device_and_back(self, pick):
        Life.steps += 1
        members = self.members()
        member = members[pick % len(members)]
        memory = self.remember([member.module])
        member.module.to("meta")
        with pytest.raises(ValueError, match="meta device"):
            eman_update_(member.module, self.student, 0.5, rules={})
        member.module = copy.deepcopy(self.core()).requires_grad_(False)
        self.bury(memory)
        self.follow(pick)


def pickle_or_copy(thing):
    """torch cannot pickle parametrized modules."""
    if any(nn.utils.parametrize.is_parametrized(module) for module in thing.modules()):
        return copy.deepcopy(thing)
    return pickle.loads(pickle.dumps(thing))


@pytest.fixture
def _one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gc.collect()
    gc.freeze()  # skip the existing objects: collections then take no time
    yield
    gc.unfreeze()
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.filterwarnings("ignore:the rule .* matches no tensor", "ignore:the rules skip every tensor")
@pytest.mark.filterwarnings(
    "ignore:while teacher and student were swapped", "ignore:at momentum", "ignore:Casting complex"
)
@pytest.mark.parametrize("steps", STEPS)
def test_any_life(steps):
    Life.steps = Life.updates = Life.refusals = 0
    how = settings(
        max_examples=-(-steps // STEPS_OF_A_LIFE) + 1,
        stateful_step_count=STEPS_OF_A_LIFE,
        deadline=None,
        derandomize=not FUZZ,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    run_state_machine_as_test(Life, settings=how)
    print(f"{Life.steps} steps, {Life.updates} updates, {Life.refusals} of them refused")
    assert Life.steps >= 0.9 * steps
    assert 0 < Life.refusals < Life.updates / 2
