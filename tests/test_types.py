"""What users' type checkers see of the package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from eman_kernels import EMANTeacher
from eman_kernels.teachers import Options

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "typed_user.py"
# Both checkers find the package on Python's path, as they find one that is installed, and without its py.typed they
# would not take its annotations.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
REMEDY = "pip install '.[test]'"


def run(*command, folder):
    """Not in the project's own folder, whose files would be looked at as the user's."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=ENVIRONMENT, cwd=folder
    )
    return done.returncode, done.stdout + done.stderr


def test_a_users_script_runs(tmp_path):
    status, said = run(SCRIPT, folder=tmp_path)
    assert status == 0, said


def test_mypy_strict(tmp_path):
    pytest.importorskip("mypy", reason=f"mypy is not installed: {REMEDY}")
    status, said = run("-m", "mypy", "--strict", "--cache-dir", tmp_path, SCRIPT, folder=tmp_path)
    assert status == 0, said


def test_pyright_strict(tmp_path):
    pytest.importorskip("basedpyright", reason=f"basedpyright is not installed: {REMEDY}")
    config = tmp_path / "pyrightconfig.json"
    config.write_text(json.dumps({"include": [str(SCRIPT)], "typeCheckingMode": "strict"}))
    command = ["-m", "basedpyright", "--project", config, "--pythonpath", sys.executable, "--outputjson"]
    status, said = run(*command, folder=tmp_path)
    assert status == 0, said
    summary = json.loads(said)["summary"]
    assert (summary["filesAnalyzed"], summary["errorCount"], summary["warningCount"]) == (1, 0, 0), said


def test_several_teachers_take_the_options_of_one():
    of_one = get_type_hints(EMANTeacher.__init__)
    for name in ("student", "momentum", "module", "keep_values", "return"):
        del of_one[name]
    assert get_type_hints(Options) == of_one
