"""Teachers on Apple's mps, simulated by second_device.cpp in a separate process: there is no float64, and the address
of a storage is that of a handle. What the device computes is what the CPU computes."""

import copy
import os
import re
import subprocess
import sys

import pytest
import second_device
import torch
from conftest import assert_same_bits
from torch import nn
from torch.optim.swa_utils import AveragedModel

from eman_kernels import EMANTeacher, EMANTeachers, ema_update_, eman_update_, plan_for, schedules
from eman_kernels.backends import interface
from eman_kernels.integrations.torch import get_eman_multi_avg_fn
from eman_kernels.networks import tensors

SIMULATED = "SECOND_DEVICE_LIKE_MPS" in os.environ
if SIMULATED:
    second_device.load(os.environ["EMAN_KERNELS_SECOND_DEVICE"])
    interface.WITHOUT_FLOAT64.add(second_device.NAME)
    tensors.WITH_HANDLES.add(second_device.NAME)
pytestmark = pytest.mark.filterwarnings("ignore:at momentum")


IN_THE_PROCESS = pytest.mark.skipif(not SIMULATED, reason="runs in the process of test_on_a_simulated_device")


@pytest.fixture(params=[pytest.param(second_device.NAME, marks=IN_THE_PROCESS)])
def device(request):
    return torch.device(request.param, 0)


@pytest.mark.build
@pytest.mark.skipif(SIMULATED, reason="already in the process with the simulated device")
def test_on_a_simulated_device(tmp_path):
    """Run the tests below in a process that has the device."""
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=3", "-p", "no:cacheprovider", __file__]
    library = str(second_device.compiled(tmp_path))
    done = subprocess.run(
        [*command, "-k", second_device.NAME],
        capture_output=True,
        text=True,
        env=os.environ | {"EMAN_KERNELS_SECOND_DEVICE": library, "SECOND_DEVICE_LIKE_MPS": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert re.search(r"^\d+ passed, \d+ deselected", done.stdout, re.M), done.stdout[-500:]


def network(dtype=torch.float32):
    return nn.Sequential(nn.Conv2d(3, 70, 3), nn.BatchNorm2d(70), nn.Flatten(), nn.Linear(70 * 36, 11)).to(dtype)


def on_device(on_cpu, device):
    """A network with the same values on the device."""
    return copy.deepcopy(on_cpu).to(device)


def assert_equal_networks(actual, expected):
    expected = expected.state_dict()
    for name, tensor in actual.state_dict().items():
        assert_same_bits(tensor.cpu(), expected[name], name)


def test_the_simulation(device):
    with pytest.raises(TypeError, match="does not support float64"):
        torch.zeros(3, device=device).double()
    one, other = torch.zeros(1000, device=device), torch.zeros(1000, device=device)
    assert 0 < abs(one.data_ptr() - other.data_ptr()) < one.nbytes
    assert (one + 1).sum() == 1000


OPTIONS = {
    "plain": ({}, torch.float32),
    "mixed": ({"dtype": torch.float32}, torch.bfloat16),
    "stochastic": ({"rounding": "stochastic", "seed": 3}, torch.bfloat16),
    "stochastic half": ({"rounding": "stochastic", "seed": 3}, torch.float16),
    "skip": ({"nonfinite": "skip"}, torch.float32),
    "cast": ({"cast": torch.bfloat16}, torch.float32),
    "reference": ({"backend": "reference"}, torch.float32),
    "schedule": ({"momentum": schedules.WarmUp(0.99)}, torch.float32),
    "capturable": ({"momentum": schedules.WarmUp(0.99), "capturable": True}, torch.float32),
    "capturable stochastic": ({"rounding": "stochastic", "seed": 3, "capturable": True}, torch.bfloat16),
}


@pytest.mark.parametrize("found_inf", [False, True])
@pytest.mark.parametrize(("options", "dtype"), OPTIONS.values(), ids=OPTIONS)
def test_same_bits_as_on_the_cpu(device, options, dtype, found_inf):
    options = {"momentum": 0.9} | options
    on_cpu = network(dtype)
    student = on_device(on_cpu, device)
    want = EMANTeacher(on_cpu, **options | {"backend": "reference"})
    teacher = EMANTeacher(student, **options)
    for skipped in (False, found_inf, False):
        for tensor in on_cpu.parameters():
            nn.init.normal_(tensor)
        student.load_state_dict(on_cpu.state_dict())
        flags = [torch.full((), float(skipped), device=where) if found_inf else None for where in ("cpu", device)]
        want.update(on_cpu, found_inf=flags[0])
        teacher.update(student, found_inf=flags[1])
        assert_equal_networks(teacher.module, want.module)
    assert teacher.step == want.step == 3 - found_inf
    assert not plan_for(teacher.module, student).ineligible


@pytest.mark.parametrize("n_teachers", [1, 2])
def test_a_momentum_on_the_device(device, n_teachers):
    on_cpu = network()
    student = on_device(on_cpu, device)
    momenta = [0.75, 0.5][:n_teachers]
    want, teachers = EMANTeachers(on_cpu, momenta), EMANTeachers(student, momenta)
    for tensor in on_cpu.parameters():
        nn.init.normal_(tensor)
    student.load_state_dict(on_cpu.state_dict())
    want.update(on_cpu)
    teachers[0].momentum = torch.full((), momenta[0], device=device)
    teachers.update(student)
    for teacher, expected in zip(teachers, want, strict=True):
        assert_equal_networks(teacher.module, expected.module)


def test_averaged_model_counts_on_the_device(device):
    on_cpu = network()
    student = on_device(on_cpu, device)
    function = get_eman_multi_avg_fn(schedules.WarmUp(0.99))
    averaged = AveragedModel(student, device=device, multi_avg_fn=function, use_buffers=True)
    want = AveragedModel(on_cpu, multi_avg_fn=function, use_buffers=True)
    for _ in range(3):
        for tensor in on_cpu.parameters():
            nn.init.normal_(tensor)
        student.load_state_dict(on_cpu.state_dict())
        averaged.update_parameters(student)
        want.update_parameters(on_cpu)
        assert_equal_networks(averaged.module, want.module)


def test_a_swap(device):
    student = network().to(device)
    teacher = EMANTeacher(network().to(device), 0.5)
    before = {name: tensor.cpu() for name, tensor in student.state_dict().items()}
    with teacher.swapped(student):
        for name, tensor in teacher.module.state_dict().items():
            assert_same_bits(tensor.cpu(), before[name], name)
    for name, tensor in student.state_dict().items():
        assert_same_bits(tensor.cpu(), before[name], name)


def test_tensors_that_overlap_are_refused_and_others_are_not(device):
    memory, student = torch.zeros(300, device=device), torch.ones(100, device=device)
    halves = [memory[:100], memory[200:]]
    ema_update_(halves, [student, student], 0.5)
    assert memory.cpu().tolist() == [0.5] * 100 + [0.0] * 100 + [0.5] * 100
    with pytest.raises(ValueError, match="share memory"):
        ema_update_([memory[:100], memory[99:199]], [student, student], 0.5)
    teacher = network().to(device)
    with pytest.raises(ValueError, match="share memory"):
        eman_update_(teacher.requires_grad_(False), nn.Sequential(*teacher), 0.5)
