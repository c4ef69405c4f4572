"""python -m eman_kernels synthesize."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

from eman_kernels import EMANTeachers, Snapshots, synthesize
from eman_kernels.__main__ import run
from eman_kernels.schedules import PowerFunction


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    teachers = EMANTeachers(student, [PowerFunction(0.05), PowerFunction(0.10)])
    with Snapshots(teachers, folder / "snapshots", every=10) as snapshots:
        for _ in range(160):
            student(torch.randn(4, 3))
            teachers.update(student)
            snapshots.store_if_due()
    for step in (10, 20):
        (folder / "students").mkdir(exist_ok=True)
        torch.save(student.state_dict(), folder / "students" / f"model-{step}.pt")
    return folder


@pytest.mark.parametrize(
    ("option", "lengths"), [("sigma_rel", ["0.05", "0.1", "0.15"]), ("gamma", ["9"]), ("half_life", ["20"])]
)
def test_writes_what_the_function_returns(option, lengths, folder, tmp_path, capsys):
    arguments = ["synthesize", str(folder / "snapshots"), f"--{option.replace('_', '-')}", *lengths]
    assert run([*arguments, "--step", "100", "--out", str(tmp_path / "out")]) == 0
    expected = synthesize(folder / "snapshots", **{option: [float(length) for length in lengths]}, step=100)
    printed = capsys.readouterr().out
    for length, average in zip(lengths, expected, strict=True):
        path = tmp_path / "out" / f"{option}-{length}-step-100.safetensors"
        assert f"{path}: sigma_rel 0." in printed
        with safe_open(path, "pt") as file:
            assert file.metadata()["synthesized_step"] == "100"
            assert set(file.keys()) == set(average)
            assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in average.items())
    assert len(list((tmp_path / "out").iterdir())) == len(lengths)


def test_describe(folder, capsys):
    assert run(["synthesize", str(folder / "snapshots"), "--describe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("32 files, ")
    assert lines[1:4] == ["16 steps, from 10 to 160", "sigma_rel 0.05", "sigma_rel 0.1"]
    assert "averages at step 160. Within 5%: sigma_rel 0.028 to 0.2" in lines[5]
    errors = {float(line.split()[0]): line.split()[1] for line in lines[7:]}
    assert (errors[0.05], errors[0.1]) == ("0.00%", "0.00%")
    assert 10 < float(errors[0.02].rstrip("%")) < 13  # 0.1196 by numpy.linalg.lstsq


def test_describe_names_a_missing_file_and_checkpoints(folder, tmp_path, capsys):
    for path in (folder / "snapshots").iterdir():
        if "0.1-step-000000080" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert run(["synthesize", str(tmp_path), "--describe"]) == 0
    assert "the snapshot with sigma_rel 0.1 of step 80 is missing" in capsys.readouterr().out
    assert run(["synthesize", str(folder / "students"), "--describe"]) == 0
    assert "checkpoints of the student" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["snapshots"], "pass --sigma-rel, --gamma, --half-life or --describe"),
        (["snapshots", "--gamma", "9"], "pass --out FOLDER"),
        (["snapshots", "--gamma", "9", "--out", "FOLDER"], "--out must be another folder"),
        (["none", "--describe"], "is not a folder"),
        (["snapshots", "--sigma-rel", "0.3", "--out", "out"], "sigma_rel must be in"),
        (["snapshots", "--sigma-rel", "0.003", "--out", "out"], "do not represent the average with sigma_rel 0.003"),
        (["snapshots", "--sigma-rel", "0.1", "--step", "5", "--out", "out"], "step is 5, but what is stored"),
    ],
)
def test_errors_are_printed_without_a_traceback(arguments, message, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [str(folder / "snapshots") if each == "FOLDER" else each for each in arguments[1:]]
    with pytest.raises(SystemExit) as ended:
        run(["synthesize", str(folder / arguments[0]), *options])
    assert message in str(ended.value)
    assert list(tmp_path.iterdir()) == []


def test_python_m(folder):
    command = [sys.executable, "-m", "eman_kernels", "synthesize", str(folder / "snapshots"), "--describe"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "averages at step 160" in done.stdout
