"""The package's annotations, as type checkers see them in user code."""

import ast
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import eman_kernels
from eman_kernels import EMANTeacher, schedules
from eman_kernels.options import TeacherOptions

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "typed_user.py"
# Both checkers find the package on Python's path, like an installed one, and so use its annotations only if it has a
# py.typed.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
REMEDY = "pip install '.[test]'"


def run(*command, folder):
    """Run outside the project's folder, where the checkers would treat our files as the user's."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=ENVIRONMENT, cwd=folder
    )
    return done.returncode, done.stdout + done.stderr


def test_user_script_runs(tmp_path):
    status, output = run(SCRIPT, folder=tmp_path)
    assert status == 0, output


@pytest.mark.slow
def test_mypy_strict(tmp_path):
    pytest.importorskip("mypy", reason=f"mypy is not installed: {REMEDY}")
    status, output = run("-m", "mypy", "--strict", "--cache-dir", tmp_path, SCRIPT, folder=tmp_path)
    assert status == 0, output


def test_pyright_strict(tmp_path):
    pytest.importorskip("basedpyright", reason=f"basedpyright is not installed: {REMEDY}")
    config = tmp_path / "pyrightconfig.json"
    config.write_text(json.dumps({"include": [str(SCRIPT)], "typeCheckingMode": "strict"}))
    command = ["-m", "basedpyright", "--project", config, "--pythonpath", sys.executable, "--outputjson"]
    status, output = run(*command, folder=tmp_path)
    assert status == 0, output
    summary = json.loads(output)["summary"]
    assert (summary["filesAnalyzed"], summary["errorCount"], summary["warningCount"]) == (1, 0, 0), output


def test_user_script_uses_every_public_name_and_schedule():
    nodes = list(ast.walk(ast.parse(SCRIPT.read_text())))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert set(eman_kernels.__all__) - used == {"ops"}  # a torch.library operator, without annotations of its own
    classes = [c for c in vars(schedules).values() if inspect.isclass(c) and c.__module__ == schedules.__name__]
    assert {schedule_class.__name__ for schedule_class in classes} <= attributes


def test_eman_teachers_accepts_the_options_of_eman_teacher():
    expected = get_type_hints(EMANTeacher.__init__)
    for name in ("student", "momentum", "module", "keep_values", "return"):
        del expected[name]
    assert get_type_hints(TeacherOptions) == expected
