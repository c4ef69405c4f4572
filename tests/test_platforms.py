"""Systems other than Linux, simulated: no extension, no Triton, no fork, and no functions that only Unix has."""

import subprocess
import sys
from pathlib import Path

import pytest

import eman_kernels
from eman_kernels import __main__ as report

# torch is imported first: it is not what is tested here, and on Linux it needs some of these.
ON_ANOTHER_SYSTEM = """
import os, platform, signal, sys
import torch
platform.system = lambda: {system!r}
sys.modules["eman_kernels._C"] = sys.modules["triton"] = None
if {system!r} == "Windows":
    for module, names in ((os, ["fork", "register_at_fork", "sched_getaffinity", "RTLD_LAZY", "RTLD_NOLOAD"]),
                          (signal, ["SIGALRM", "SIGKILL", "alarm", "setitimer"])):
        for name in names:
            vars(module).pop(name, None)
import eman_kernels.__main__
assert eman_kernels.__main__.main() == 0
student = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
teacher = eman_kernels.EMANTeacher(student, momentum=0.75)
before = teacher.module[0].weight.clone()
with torch.no_grad():
    student[0].weight += 1
for _ in range(2):
    teacher.update(student)
torch.testing.assert_close(teacher.module[0].weight, before + 1 - 0.75**2)
with teacher.swapped(student):
    pass
print(eman_kernels.plan_for(teacher.module, student).works[0][0].NAME, "did the work")
try:
    eman_kernels.ema_update_([before], [before + 1], 0.5, backend="cpu")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_the_package_works_on_another_system(system):
    code = ON_ANOTHER_SYSTEM.format(system=system)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"extension: the compiled extension is for Linux only, and this is {system}" in done.stdout
    assert "self-check: passed" in done.stdout
    assert "foreach did the work" in done.stdout
    assert "backend 'cpu' cannot update tensors on cpu: the compiled extension is for Linux only" in done.stdout


# ---------------------------------------------------------------- a clone that hides the installed package

HERE = Path(eman_kernels.__file__).parents[1]


@pytest.fixture
def installed(tmp_path):
    (tmp_path / "eman_kernels").mkdir()
    (tmp_path / "eman_kernels" / "__init__.py").touch()
    return tmp_path


def test_a_clone_that_hides_the_installed_package_is_named_first_and_once(installed, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(HERE), *sys.path, str(installed)])
    monkeypatch.setattr(report, "available_backends", lambda: {"cpu": "the reason"})
    report.main()
    said = capsys.readouterr().out
    assert said.startswith(f"The folder {HERE} hides the package that is installed in {installed}: start Python in ")
    assert said.count("hides the package") == 1


def test_an_editable_or_an_only_installation_hides_nothing(installed, monkeypatch):
    """pip's editable installs put the clone itself on the path, or a finder that is no folder."""
    others = [entry for entry in sys.path if not Path(entry).joinpath("eman_kernels").exists()]
    monkeypatch.chdir(HERE)
    for path in (["", str(HERE)], [str(HERE)], [f"{HERE}/", "/no/such/folder", "some.zip", str(HERE)]):
        monkeypatch.setattr(sys, "path", [*path, *others])
        assert report.find_hidden() is None
    monkeypatch.setattr(sys, "path", ["", *others, str(installed)])
    assert report.find_hidden() == installed
