"""get_eman_multi_avg_fn in torch's AveragedModel, compared with torch's own functions."""

import copy
import pickle

import pytest
import torch
from conftest import adapters_example, assert_same_bits, examples, lerp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from eman_kernels import schedules
from eman_kernels.integrations import torch as adapter
from eman_kernels.integrations.torch import get_eman_multi_avg_fn
from eman_kernels.plan import plan


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 4))


def images():
    return torch.randn(4, 3, 6, 6)


def train_step(student):
    student(images())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def test_examples_run():
    student = net()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    names = {"student": student, "images": images(), "optimizer": optimizer, "torch": torch}
    (example,) = examples(adapter.__doc__)
    exec(example, names)
    assert names["averaged"].n_averaged == 6
    exec(adapters_example("torch"), names := {})
    assert names["averaged"].n_averaged == 1


def test_averages_equal_torchs_bit_for_bit_and_counters_are_copied():
    student = net()
    ours = AveragedModel(student, multi_avg_fn=get_eman_multi_avg_fn(0.9), use_buffers=True)
    theirs = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for step in range(1, 7):
        train_step(student)
        ours.update_parameters(student)
        theirs.update_parameters(student)
        assert ours.module[1].num_batches_tracked == step
    assert theirs.module[1].num_batches_tracked == 1, "torch averages the counter, which is why this adapter exists"
    assert ours.module[1].running_var.ne(student[1].running_var).any()
    for (name, our), their in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if not name.endswith("num_batches_tracked"):
            assert_same_bits(our, their, name)


def test_plan_is_reused_although_each_call_passes_new_tensor_objects(monkeypatch):
    made = []
    init = plan.Plan.__init__
    monkeypatch.setattr(plan.Plan, "__init__", lambda *args, **options: (made.append(1), init(*args, **options))[0])
    student = net()
    averaged = AveragedModel(student, multi_avg_fn=get_eman_multi_avg_fn(), use_buffers=True)
    for _ in range(7):
        averaged.update_parameters(student)
    assert len(made) == 2, "one for float32 and one for int64"


def test_without_use_buffers_only_weights_are_averaged():
    student = net()
    averaged = AveragedModel(student, multi_avg_fn=get_eman_multi_avg_fn(0.9))
    averaged.update_parameters(student)
    before = averaged.module[0].weight.detach().clone()
    train_step(student)
    averaged.update_parameters(student)
    assert_same_bits(averaged.module[0].weight, lerp(before, student[0].weight.detach(), 0.9))
    assert_same_bits(averaged.module[1].running_var, student[1].running_var)


def test_schedule_is_called_with_n_averaged():
    student = net()
    ours = AveragedModel(student, multi_avg_fn=get_eman_multi_avg_fn(schedules.Average()))
    theirs = AveragedModel(student)
    mean = torch.zeros(8, 3, 3, 3, dtype=torch.float64)
    for _ in range(9):
        train_step(student)
        mean += student[0].weight.detach().double() / 9
        ours.update_parameters(student)
        theirs.update_parameters(student)
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(our, their, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.module[0].weight.detach().double(), mean, rtol=1e-6, atol=1e-7)


def test_schedule_is_called_with_a_float64_tensor():
    """1 - m would lose three digits if m were float32."""
    seen, student = [], net()

    def schedule(n_averaged):
        seen.append((n_averaged.dtype, int(n_averaged)))
        return 1 - 1 / (n_averaged + 1)

    averaged = AveragedModel(student, multi_avg_fn=get_eman_multi_avg_fn(schedule))
    for _ in range(3):
        averaged.update_parameters(student)
    assert seen == [(torch.float64, 1), (torch.float64, 2)]


def test_stochastic_rounding_moves_a_bfloat16_average_where_torchs_does_not_move():
    student = nn.Linear(200, 200, bias=False, dtype=torch.bfloat16)
    averages = [
        AveragedModel(student, multi_avg_fn=function)
        for function in (
            get_eman_multi_avg_fn(0.9999, rounding="stochastic", seed=3),
            get_eman_multi_avg_fn(0.9999, rounding="stochastic", seed=3),
            get_ema_multi_avg_fn(0.9999),
        )
    ]
    nn.init.ones_(student.weight)
    for average in averages:
        average.update_parameters(student)  # the first update copies
    nn.init.constant_(student.weight, 1.5)
    for _ in range(100):
        for average in averages:
            average.update_parameters(student)
    ours, repeated, theirs = (average.module.weight.detach().double() for average in averages)
    assert torch.equal(ours, repeated)
    assert theirs.eq(1).all()
    expected = 1.5 - 0.5 * 0.9999**100
    assert ours.mean().item() == pytest.approx(expected, abs=5 * ours.std().item() / 200)


def test_averaged_model_can_be_pickled_and_copied():
    student = net()
    averaged = AveragedModel(student, multi_avg_fn=get_eman_multi_avg_fn(schedules.WarmUp(0.99)), use_buffers=True)
    averaged.update_parameters(student)
    copies = [pickle.loads(pickle.dumps(averaged)), copy.deepcopy(averaged)]
    train_step(student)
    for each in (averaged, *copies):
        each.update_parameters(student)
    for duplicate in copies:
        assert all(map(torch.equal, averaged.state_dict().values(), duplicate.state_dict().values()))


@pytest.mark.parametrize(
    ("options", "named"),
    [({"decay": 1.1}, "momentum"), ({"seed": -1}, "seed"), ({"rounding": "up"}, "rounding"),
     ({"nonfinite": "keep"}, "nonfinite")],
)  # fmt: skip
def test_bad_arguments_raise_before_training(options, named):
    with pytest.raises(ValueError, match=named):
        get_eman_multi_avg_fn(**options)
