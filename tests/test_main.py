"""``python -m eman_kernels bench``: the measured loops average, and the report names what was measured and where."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import eman_kernels
from eman_kernels import __main__ as command

CPU = torch.device("cpu")
# 1 + 1 float tensors of a layer, 4 of a BatchNorm and its counter.
USERS_MODULE = """
from torch import nn

def make():
    return nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40))

def wrong():
    return [nn.Linear(2, 2)]

class Nets:
    small = staticmethod(make)
"""


@pytest.fixture
def users_module(tmp_path, monkeypatch):
    (tmp_path / "users_networks.py").write_text(USERS_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("users_networks", None)


@pytest.mark.parametrize("make", [command.published_loop, command.foreach_lerp, command.make_own_update])
def test_each_measured_update_averages(make):
    student = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40))
    teacher = copy.deepcopy(student).requires_grad_(False)
    student(torch.randn(8, 40))
    before = {name: tensor.double() for name, tensor in teacher.state_dict().items()}
    with torch.no_grad():
        student[0].weight += 1
        make(teacher, student, 0.75)()
    for name, tensor in teacher.state_dict().items():
        theirs = student.state_dict()[name].double()
        expected = theirs if name.endswith("tracked") else 0.75 * before[name] + 0.25 * theirs
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)


def report_of(capsys, *arguments):
    assert command.run(["bench", *arguments]) == 0
    return capsys.readouterr().out


def test_the_report_names_the_machine_the_network_and_each_update(users_module, capsys):
    lines = report_of(capsys, "--model", "users_networks:make", "--device", "cpu").splitlines()
    assert lines[0].startswith(f"eman_kernels {eman_kernels.__version__}, torch {torch.__version__}, python ")
    assert f"{torch.get_num_threads()} threads" in lines[1]
    assert lines[2].startswith("users_networks:make, momentum 0.999; cpu: ")
    assert "7 tensors, 1801 elements" in lines[2]
    rows = {line.split("  ")[0]: line for line in lines[5:8]}
    assert list(rows) == [command.LOOP, command.FOREACH, command.OURS]
    assert rows[command.LOOP].endswith("1.0 (1.0 ... 1.0)")
    for row in rows.values():
        median, low, high = (float(number) for number in re.findall(r"\d+\.\d{3}", row))
        assert 0 < low <= median <= high
    assert lines[-2].startswith(f"{command.MOST_ROUNDS} rounds")
    differences = [float(number) for number in re.findall(r"(\d\.\de-\d+)[,.]", lines[-1])]
    assert len(differences) == 2
    assert all(difference < 1e-5 for difference in differences)


def test_an_update_that_cannot_take_the_network_is_reported(capsys):
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"no": "tensor"}

        def set_extra_state(self, state):
            pass

    report = command.bench("odd", Odd(4, 4), CPU, seconds=0.0)
    assert f"\n{command.LOOP}: AttributeError: 'dict' object has no attribute 'is_floating_point'" in report
    assert re.search(rf"\n{command.OURS} +\d", report)
    assert f"{command.LEAST_ROUNDS} rounds" in report
    assert "Largest difference" not in report


def test_rounds_are_summarized_by_ratios_within_a_round():
    """Medians of the ratios, not the ratio of the medians."""
    rounds = [{command.LOOP: (8.0, 1.0), command.OURS: (each, 1.0)} for each in (1.0, 2.0, 4.0)]
    rounds[0][command.LOOP] = (1.0, 1.0)
    head, loop, ours = command.tabulate_rounds(rounds, on_device=False)
    assert head.split("  ")[0] == "update"
    expected = "eman_kernels 2.000 (1.000 ... 4.000) 2.0 (1.0 ... 4.0)"
    assert ours.split() == expected.split()
    assert loop.endswith("1.0 (1.0 ... 1.0)")
    on_device = command.tabulate_rounds(rounds, on_device=True)
    assert re.split("  +", on_device[0])[1::2] == ["GPU time in ms", "host time in ms"]
    assert on_device[2].split() == f"{expected} 1.000 (1.000 ... 1.000) 1.0 (1.0 ... 1.0)".split()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("resnet51", "torchvision.models has no resnet51, but resnet50"),
        ("no_such_module:make", "cannot import no_such_module:make: No module named 'no_such_module'"),
        ("users_networks:made", "cannot import users_networks:made: module 'users_networks' has no attribute 'made'"),
        ("users_networks:", "cannot import users_networks:"),
        (":make", "cannot import :make"),
        ("users_networks:wrong", r"users_networks:wrong() returned a list, not a torch.nn.Module"),
    ],
)
def test_a_model_that_is_none(users_module, capsys, name, says):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    with pytest.raises(SystemExit) as exit:
        command.run(["bench", "--model", name])
    assert exit.value.code == 2
    assert says in capsys.readouterr().err


def test_without_torchvision_the_error_names_the_other_way(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(SystemExit):
        command.run(["bench"])
    said = capsys.readouterr().err
    assert "resnet50 is a network of torchvision" in said
    assert "pip install torchvision, or --model module:function" in said


def test_other_devices_are_refused(capsys):
    devices = ["mps"] if torch.cuda.is_available() else ["mps", "cuda"]
    for device in devices:
        with pytest.raises(SystemExit):
            command.run(["bench", "--device", device])
        assert f"--device {device}: " in capsys.readouterr().err


def test_without_a_command_it_is_the_report(monkeypatch):
    monkeypatch.setattr(command, "main", lambda: 3)
    assert command.run([]) == 3


def test_the_command_runs_beside_the_users_module(tmp_path):
    """In another folder than the clone, as after an installation."""
    (tmp_path / "users_networks.py").write_text(USERS_MODULE)
    package = Path(eman_kernels.__file__).parent.parent
    paths = os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))
    arguments = [sys.executable, "-m", "eman_kernels", "bench", "--model", "users_networks:make", "--device", "cpu"]
    done = subprocess.run(
        arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "measuring on cpu" in done.stderr
    assert "speed-up over the loop" in done.stdout
