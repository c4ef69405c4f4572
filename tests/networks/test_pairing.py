"""Pairing by name: rules, prefixes, and errors that list every difference."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from eman_kernels import EMANTeacher, eman_update_
from eman_kernels.networks.names import named_tensors, unwrap
from eman_kernels.networks.pairing import Pair, pair_modules
from eman_kernels.options import Options


def paired(teacher: nn.Module, student: nn.Module, rules: object = (), buffers: str = "ema") -> list[Pair]:
    return pair_modules(teacher, student, Options(rules, buffers))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)
        self.register_buffer("centre", torch.zeros(2), persistent=False)
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))

    def forward(self, x):
        return self.head(self.body(x))


def rules_of(*args, **kwargs):
    return {pair.name: pair.rule for pair in paired(*args, **kwargs)}


def test_default_rules():
    rules = rules_of(Net(), Net())
    assert {name for name, rule in rules.items() if rule == "copy"} == {"body.1.num_batches_tracked", "mask"}
    assert rules["centre"] == "ema", "non-persistent buffers are included"
    assert len(rules) == 6 + 3 + 2


def test_rules_by_pattern_and_the_first_match_wins():
    rules = rules_of(Net(), Net(), {"head.weight": "copy", "head.*": "skip", "*.running_*": "copy"})
    assert rules["head.weight"] == rules["body.1.running_mean"] == "copy"
    assert "head.bias" not in rules
    assert rules["body.0.weight"] == "ema"


@pytest.mark.parametrize("buffers", ["copy", "skip"])
def test_buffers(buffers):
    rules = rules_of(Net(), Net(), {"centre": "ema"}, buffers)
    assert rules["centre"] == "ema"
    assert rules.get("body.1.running_var", "skip") == rules.get("mask", "skip") == buffers
    assert rules["body.1.weight"] == "ema"


def data_parallel(net):
    return nn.DataParallel(net).cpu()  # DataParallel moves the network to a GPU if there is one


def wrapped_inside(net):
    net.body = torch.compile(net.body)
    return net


@pytest.mark.parametrize(
    "wrap", [data_parallel, torch.compile, lambda n: data_parallel(torch.compile(n)), wrapped_inside]
)
def test_wrapper_prefixes_are_stripped(wrap):
    plain = Net()
    wrapped = wrap(copy.deepcopy(plain))
    assert list(named_tensors(wrapped)) == list(named_tensors(plain))
    assert rules_of(plain, wrapped) == rules_of(wrapped, plain) == rules_of(plain, plain)
    teacher = EMANTeacher(wrapped)
    assert type(teacher.module) is Net
    with torch.no_grad():
        for parameter in wrapped.parameters():
            parameter.fill_(7.0)
    teacher.update(wrapped, momentum=0)
    assert all((p == 7).all() for p in teacher.module.parameters())


def test_a_layer_named_module_is_not_a_wrapper():
    net = nn.Module()
    net.module, net.weight = nn.Linear(2, 3), nn.Parameter(torch.zeros(4))
    assert list(named_tensors(net)) == ["weight", "module.weight", "module.bias"]
    teacher = EMANTeacher(net, momentum=0.0)
    with torch.no_grad():
        net.weight += 1
    teacher.update(net)
    assert torch.equal(teacher.module.weight, net.weight)


def test_the_prefix_of_distributed_data_parallel_is_stripped():
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        plain = Net()
        student = nn.parallel.DistributedDataParallel(plain)
        teacher = EMANTeacher(student, momentum=0.0)
        assert type(teacher.module) is Net
        student(torch.randn(8, 4)).sum().backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= parameter.grad
        teacher.update(student)
        for name, tensor in teacher.module.state_dict().items():
            assert torch.equal(tensor, plain.state_dict()[name]), name
        assert teacher.module.body[1].num_batches_tracked == 1
    finally:
        torch.distributed.destroy_process_group()


def test_a_network_with_a_child_named_module_keeps_its_forward():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

        def forward(self, x):
            return self.module(x) * 10

    outer = Outer()
    assert unwrap(outer) is outer
    teacher = EMANTeacher(outer)
    assert torch.equal(teacher(torch.ones(1, 2)), outer(torch.ones(1, 2)))
    assert list(teacher.module.state_dict()) == list(outer.state_dict())


def test_tied_parameters_are_updated_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

    student = Tied()
    teacher = EMANTeacher(student, momentum=0.5)
    assert teacher.module.a.weight is teacher.module.b.weight
    with torch.no_grad():
        teacher.module.a.weight.fill_(0.0)
        student.a.weight.fill_(1.0)
    teacher.update(student)
    assert (teacher.module.b.weight == 0.5).all()
    student.b.weight = nn.Parameter(torch.full((3, 3), 9.0))
    with pytest.raises(ValueError, match=r"ties a\.weight and b\.weight"):
        teacher.update(student)
    assert (teacher.module.b.weight == 0.5).all()


def test_spectral_norm_vectors_are_copied_by_rule():
    student = parametrizations.spectral_norm(nn.Linear(4, 4))
    teacher = EMANTeacher(student, momentum=0.9, rules={"*._u": "copy", "*._v": "copy"})
    student.train()(torch.randn(8, 4))
    teacher.update(student)
    vectors = dict(student.named_buffers())
    assert {name.rsplit(".", 1)[-1] for name in vectors} == {"_u", "_v"}
    assert all(torch.equal(tensor, vectors[name]) for name, tensor in teacher.module.named_buffers())


def test_one_error_lists_all_differences_and_nothing_is_written():
    teacher, student = Net(), Net()
    student.head = nn.Linear(4, 3)
    student.extra = nn.Linear(1, 1)
    del student.mask
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(ValueError, match="cannot follow") as error, torch.no_grad():
        eman_update_(teacher, student, 0.5)
    text = str(error.value)
    for words in (
        "head.weight: the teacher's shape is (2, 4), the student's (3, 4)",
        "head.bias: the teacher's shape is (2,), the student's (3,)",
        "extra.weight: the teacher has none",
        "extra.bias: the teacher has none",
        "mask: the student has none",
        "architecture",
        "nothing was written",
    ):
        assert words in text
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_skipped_tensors_may_be_missing():
    teacher, student = Net(), Net()
    student.predictor = nn.Linear(2, 2)
    assert rules_of(teacher, student, {"predictor.*": "skip"}) == rules_of(teacher, teacher)


def test_a_pattern_that_matches_nothing_warns():
    with pytest.warns(UserWarning, match=r"'\*\.weigth_u' matches no tensor"):
        paired(Net(), Net(), {"*.weigth_u": "copy"})


@pytest.mark.parametrize("kwargs", [{"rules": {"*": "mean"}}, {"buffers": "mean"}])
def test_unknown_rules(kwargs):
    with pytest.raises(ValueError, match=r"unknown rule 'mean'.*'ema', 'copy', 'skip'"):
        EMANTeacher(Net(), **kwargs)
    with pytest.raises(ValueError, match="unknown rule 'mean'"):
        paired(Net(), Net(), **kwargs)


def with_buffer(tensor):
    module = nn.Module()
    module.register_buffer("b", tensor)
    return module


@pytest.mark.parametrize(
    ("teacher", "student", "rules", "words"),
    [
        (torch.zeros(2), torch.zeros(2, device="meta"), None, "b: the student is on the meta device.*to_empty"),
        (torch.zeros(2), torch.zeros(2).to_sparse(), None, "b: the student is torch.sparse_coo"),
        (torch.zeros(2).to_sparse(), torch.zeros(2), None, "b: the teacher is torch.sparse_coo"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), None, "teacher is torch.float32, the student torch.int"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.complex64), None, "the student torch.complex64"),
        (torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32), {"b": "ema"}, "needs a floating-point"),
    ],
)  # fmt: skip
def test_tensors_that_cannot_follow(teacher, student, rules, words):
    with pytest.raises(ValueError, match=words):
        eman_update_(with_buffer(teacher), with_buffer(student), 0.5, rules=rules)


def test_a_dtype_without_arithmetic_in_torch():
    float4 = getattr(torch, "float4_e2m1fn_x2", None)
    if float4 is None:
        pytest.skip("this torch has no float4_e2m1fn_x2")
    teacher, student = (with_buffer(torch.full((4,), byte, dtype=torch.uint8).view(float4)) for byte in (1, 2))
    with pytest.raises(ValueError, match=r"b: torch cannot compute with torch\.float4"):
        eman_update_(teacher, student, 0.5)
    eman_update_(teacher, student, 0.5, rules={"b": "copy"})
    assert (teacher.b.view(torch.uint8) == 2).all()


@pytest.mark.filterwarnings("ignore")
def test_quantized_and_lazy_tensors_cannot_follow():
    quantized = torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)
    with pytest.raises(ValueError, match="b: the student is quantized"):
        eman_update_(with_buffer(torch.zeros(2)), with_buffer(quantized), 0.5)
    lazy, other = nn.LazyLinear(3), nn.Linear(2, 3).requires_grad_(False)
    with pytest.raises(ValueError, match="weight: the student is lazy"):
        eman_update_(other, lazy, 0.5)


@pytest.mark.parametrize(
    ("differences", "end"), [(20, "19: the teacher has none"), (21, "and 1 more"), (58, "and 38 more")]
)
def test_a_long_list_of_differences_is_truncated(differences, end):
    students = nn.ParameterList(torch.zeros(1) for _ in range(differences))
    with pytest.raises(ValueError, match="follow the student") as raised:
        paired(nn.ParameterList(), students)
    listed = str(raised.value).split("\n  ")[1:]
    assert len(listed) == min(differences, 21)
    assert listed[-1].startswith(end), listed[-1]
