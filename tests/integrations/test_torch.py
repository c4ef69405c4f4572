"""get_eman_multi_avg_fn in torch's own AveragedModel, beside torch's own functions."""

import copy
import importlib
import pickle
import sys
from pathlib import Path

import pytest
import torch
from conftest import adapters_example, assert_same_bits, examples, lerp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from eman_kernels import plan, schedules
from eman_kernels.integrations import torch as adapter
from eman_kernels.integrations.torch import get_eman_multi_avg_fn


def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 4))


def images():
    return torch.randn(4, 3, 6, 6)


def train_step(student):
    student(images())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)


def test_the_examples_run():
    student = net()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    names = {"student": student, "images": images(), "optimizer": optimizer, "torch": torch}
    (example,) = examples(adapter.__doc__)
    for block in (adapters_example("torch"), example):
        exec(block, names)
    assert names["averaged"].n_averaged == 6


def test_the_averages_are_torchs_to_the_bit_and_the_counters_the_students():
    student = net()
    ours = AveragedModel(student, multi_avg_fn=get_eman_multi_avg_fn(0.9), use_buffers=True)
    theirs = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for step in range(1, 7):
        train_step(student)
        ours.update_parameters(student)
        theirs.update_parameters(student)
        assert ours.module[1].num_batches_tracked == step
    assert theirs.module[1].num_batches_tracked == 1, "torch averages its counter: the reason for this adapter"
    assert ours.module[1].running_var.ne(student[1].running_var).any()
    for (name, our), their in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        if not name.endswith("num_batches_tracked"):
            assert_same_bits(our, their, name)


def test_the_plan_is_kept_over_calls_that_come_with_fresh_tensors(monkeypatch):
    made = []
    init = plan.Plan.__init__
    monkeypatch.setattr(plan.Plan, "__init__", lambda *args, **options: (made.append(1), init(*args, **options))[0])
    student = net()
    averaged = AveragedModel(student, multi_avg_fn=get_eman_multi_avg_fn(), use_buffers=True)
    for _ in range(7):
        averaged.update_parameters(student)
    assert len(made) == 2, "one for float32 and one for int64"


def test_without_use_buffers_the_weights_alone_are_averaged():
    student = net()
    averaged = AveragedModel(student, multi_avg_fn=get_eman_multi_avg_fn(0.9))
    averaged.update_parameters(student)
    before = averaged.module[0].weight.detach().clone()
    train_step(student)
    averaged.update_parameters(student)
    assert_same_bits(averaged.module[0].weight, lerp(before, student[0].weight.detach(), 0.9))
    assert_same_bits(averaged.module[1].running_var, student[1].running_var)


def test_a_schedule_gets_the_number_of_averages():
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


def test_a_schedule_gets_a_double():
    """1 - m of a float32 m is three digits short."""
    seen, student = [], net()

    def schedule(n_averaged):
        seen.append((n_averaged.dtype, int(n_averaged)))
        return 1 - 1 / (n_averaged + 1)

    averaged = AveragedModel(student, multi_avg_fn=get_eman_multi_avg_fn(schedule))
    for _ in range(3):
        averaged.update_parameters(student)
    assert seen == [(torch.float64, 1), (torch.float64, 2)]


def test_a_half_precision_average_rounded_at_random_moves_where_torchs_stands_still():
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
        average.update_parameters(student)  # copies
    nn.init.constant_(student.weight, 1.5)
    for _ in range(100):
        for average in averages:
            average.update_parameters(student)
    ours, again, theirs = (average.module.weight.detach().double() for average in averages)
    assert torch.equal(ours, again)
    assert theirs.eq(1).all()
    expected = 1.5 - 0.5 * 0.9999**100
    assert ours.mean().item() == pytest.approx(expected, abs=5 * ours.std().item() / 200)


def test_an_averaged_model_with_it_can_be_pickled_and_copied():
    student = net()
    averaged = AveragedModel(student, multi_avg_fn=get_eman_multi_avg_fn(schedules.WarmUp(0.99)), use_buffers=True)
    averaged.update_parameters(student)
    twins = [pickle.loads(pickle.dumps(averaged)), copy.deepcopy(averaged)]
    train_step(student)
    for each in (averaged, *twins):
        each.update_parameters(student)
    for twin in twins:
        assert all(map(torch.equal, averaged.state_dict().values(), twin.state_dict().values()))


@pytest.mark.parametrize("wrong", [{"decay": 1.1}, {"seed": -1}, {"rounding": "up"}, {"nonfinite": "keep"}])
def test_bad_arguments_are_refused_at_once(wrong):
    with pytest.raises(ValueError, match=r"must be in|is none of"):
        get_eman_multi_avg_fn(**wrong)


@pytest.mark.parametrize("library", ["timm", "lightly"])
def test_a_library_that_is_not_installed_is_an_import_error_that_names_the_extra(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"eman_kernels.integrations.{library}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'eman_kernels\[{library}\]'"):
        importlib.import_module(f"eman_kernels.integrations.{library}")
    pyproject = Path(adapter.__file__).parents[2] / "pyproject.toml"
    assert f'\n{library} = ["{library}>=' in pyproject.read_text()
