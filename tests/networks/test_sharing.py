"""A teacher that shares tensors with its student: a frozen base under trained adapters."""

import copy
import pickle

import pytest
import torch
from conftest import assert_same_bits, lerp
from torch import Tensor, nn
from torch.nn.parallel import DataParallel

from eman_kernels import EMANTeacher, EMANTeachers, eman_update_, plan_for, swapped

RULES = {"*.base.*": "share"}
MOMENTUM = 0.9


class Adapted(nn.Module):
    """LoRA: a frozen linear layer with a trained low-rank branch."""

    def __init__(self, width: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.base.register_buffer("scale", torch.ones(width))
        self.down, self.up = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) * self.base.scale + self.up(self.down(x))


def net(width: int = 64) -> nn.Sequential:
    return nn.Sequential(Adapted(width), nn.BatchNorm1d(width), Adapted(width))


def train(student: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    student(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()


def storages(network: nn.Module) -> dict[int, int]:
    """Address and size in bytes of each storage."""
    tensors = [*network.parameters(), *network.buffers()]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def is_base(name: str) -> bool:
    return ".base." in name


def state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize("how", ["a copy", "module"])
def test_the_teacher_allocates_the_adapters_only(how: str) -> None:
    student = net()
    options = {"module": net()} if how == "module" else {}
    teacher = EMANTeacher(student, MOMENTUM, rules=RULES, **options)
    theirs = storages(student)
    own = sum(size for address, size in storages(teacher.module).items() if address not in theirs)
    adapters = 2 * 2 * (64 * 2) * 4
    batch_norm = 4 * 64 * 4 + 8
    assert own == adapters + batch_norm
    assert sum(theirs.values()) == own + 2 * (64 * 64 + 64 + 64) * 4


@pytest.mark.parametrize("how", ["a copy", "module", "module with values"])
def test_tensors_that_are_not_shared_follow(how: str) -> None:
    student = net()
    options = {"module": net(), "keep_values": "values" in how} if "module" in how else {}
    teacher = EMANTeacher(DataParallel(student).cpu(), MOMENTUM, rules=RULES, **options)
    expected = state(teacher.module)
    for _ in range(3):
        train(student)
        teacher.update(student)
        for name, tensor in student.state_dict().items():
            if not is_base(name):
                floats = tensor.is_floating_point()
                expected[name] = lerp(expected[name], tensor, MOMENTUM) if floats else tensor.clone()
            assert_same_bits(teacher.module.state_dict()[name], expected[name], name)
    plan = plan_for(teacher.module, student)
    assert plan.works[0][1].numel == sum(t.numel() for name, t in expected.items() if not is_base(name))
    assert [p.requires_grad for p in student.parameters()] == [p.requires_grad for p in net().parameters()]
    assert not any(p.requires_grad for p in teacher.module.parameters())


def test_a_shared_tensor_can_still_be_trained() -> None:
    student = net()
    teacher = EMANTeacher(student, rules={"1.*": "share"} | RULES)
    before = student[1].weight.detach().clone()
    train(student)
    teacher.update(student)
    assert student[1].weight.requires_grad
    assert not torch.equal(student[1].weight, before)
    assert teacher.module[1].weight is student[1].weight


def test_shared_buffers() -> None:
    student = net()
    teacher = EMANTeacher(student, buffers="share")
    train(student)
    teacher.update(student)
    for own, its in zip(teacher.module.buffers(), student.buffers(), strict=True):
        assert own is its
    assert teacher.module[1].weight is not student[1].weight


def test_swapped_leaves_shared_tensors() -> None:
    student = net()
    teacher = EMANTeacher(student, MOMENTUM, rules=RULES)
    train(student)
    teacher.update(student)
    averages, weights = state(teacher.module), state(student)
    with teacher.swapped(student):
        for name, tensor in student.state_dict().items():
            assert_same_bits(tensor, averages[name], name)
        for name, tensor in teacher.state_dict().items():
            if name != "_extra_state":
                assert_same_bits(tensor, averages[name.removeprefix("module.")], name)
    for name, tensor in student.state_dict().items():
        assert_same_bits(tensor, weights[name], name)
    with swapped(teacher.module, student, rules=RULES):
        assert_same_bits(student[0].up.weight, averages["0.up.weight"])


def test_several_teachers_share_one_base() -> None:
    student = net()
    teachers = EMANTeachers(student, [0.5, 0.9], rules=RULES)
    train(student)
    teachers.update(student)
    for momentum, teacher in zip([0.5, 0.9], teachers, strict=True):
        assert teacher.module[0].base.weight is student[0].base.weight
        assert teacher.momentum == momentum
    assert not torch.equal(teachers[0].module[0].up.weight, teachers[1].module[0].up.weight)


def test_dtype_applies_to_tensors_that_are_not_shared() -> None:
    student = net().to(torch.bfloat16)
    kept = state(student)
    teacher = EMANTeacher(student, MOMENTUM, rules=RULES, dtype=torch.float32)
    for name, tensor in student.state_dict().items():
        assert_same_bits(tensor, kept[name], name)
    for name, tensor in teacher.module.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.bfloat16 if is_base(name) else torch.float32), name
    teacher.update(student)
    teacher.to(torch.float64)
    assert teacher.module[0].base.weight is student[0].base.weight
    assert student[0].base.weight.dtype == torch.bfloat16
    assert teacher.module[0].up.weight.dtype == torch.float32


def test_cast_runs_a_shared_base_in_the_low_precision() -> None:
    student = net()
    teacher = EMANTeacher(student, MOMENTUM, rules=RULES, cast=torch.bfloat16)
    inputs = torch.randn(4, 64)
    for _ in range(2):
        train(student)
        with torch.no_grad():
            student[0].base.weight += 1  # the copy must follow a shared tensor, frozen or not
        teacher.update(student)
        plain = copy.deepcopy(teacher.module)
        plain = nn.Sequential(plain[0].bfloat16(), plain[1], plain[2].bfloat16())
        torch.testing.assert_close(teacher(inputs), plain(inputs.bfloat16()))
    assert student[0].base.weight.dtype == torch.float32


def test_a_checkpoint_contains_the_base() -> None:
    student = net()
    teacher = EMANTeacher(student, MOMENTUM, rules=RULES)
    train(student)
    teacher.update(student)
    resumed = net()
    other = EMANTeacher(resumed, MOMENTUM, rules=RULES)
    other.load_state_dict(teacher.state_dict())
    assert other.step == 1
    assert_same_bits(resumed[0].base.weight, student[0].base.weight)
    for name, tensor in teacher.module.state_dict().items():
        assert_same_bits(other.module.state_dict()[name], tensor, name)
    other.update(resumed)


def replaced(student: nn.Module, teacher: EMANTeacher) -> EMANTeacher:
    student[0].base = nn.Linear(64, 64).requires_grad_(False)
    student[0].base.register_buffer("scale", torch.ones(64))
    return teacher


@pytest.mark.parametrize(
    "part",
    [
        lambda student, teacher: copy.deepcopy(teacher),
        lambda student, teacher: pickle.loads(pickle.dumps(teacher)),
        replaced,
    ],
    ids=["deepcopy", "pickle", "a new layer"],
)
def test_tensors_no_longer_shared_are_an_error_with_a_remedy(part) -> None:
    student = net()
    teacher = EMANTeacher(student, MOMENTUM, rules=RULES)
    teacher.update(student)
    teacher = part(student, teacher)
    train(student)
    kept = state(teacher.module)
    match = r"0\.base\.weight: it is to be shared, but the teacher holds another tensor(.|\n)*keep_values=True"
    with pytest.raises(ValueError, match=match):
        teacher.update(student)
    for name, tensor in teacher.module.state_dict().items():
        assert_same_bits(tensor, kept[name], name)
    again = EMANTeacher(student, MOMENTUM, module=teacher.module, keep_values=True, rules=RULES)
    again.update(student)
    assert again.module[0].base.weight is student[0].base.weight
    assert_same_bits(again.module[0].up.weight, lerp(kept["0.up.weight"], student[0].up.weight.detach(), MOMENTUM))


def test_networks_that_share_nothing_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"0\.base\.bias: it is to be shared"):
        eman_update_(net(), net(), 0.5, rules=RULES)


def test_tied_names_are_shared_together_or_not_at_all() -> None:
    student = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4, bias=False))
    student[1].weight = student[0].weight
    with pytest.raises(ValueError, match=r"1\.weight: the student ties it to 0\.weight, which is to be shared"):
        EMANTeacher(student, rules={"0.*": "share"})
    teacher = EMANTeacher(student, rules={"*": "share"})
    assert teacher.module[1].weight is teacher.module[0].weight is student[0].weight
    other = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 4, bias=False))
    with pytest.warns(UserWarning, match="skip every tensor"):
        EMANTeacher(student, module=other, rules={"*": "share"})
    assert other[1].weight is other[0].weight is student[0].weight


def test_a_module_that_cannot_share_is_left_unchanged() -> None:
    student, other = net(), net(32)
    with pytest.raises(ValueError, match=r"0\.base\.weight: the teacher's shape is \(32, 32\), the student's"):
        EMANTeacher(student, module=other, rules=RULES)
    theirs = storages(student)
    assert not any(address in theirs for address in storages(other))
    other = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"0\.base\.weight: the teacher has none"):
        EMANTeacher(student, module=other, rules=RULES)
    assert all(p.requires_grad for p in other.parameters())
