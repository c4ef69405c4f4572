"""A copy of the project to build and modify, so that the tree itself stays unchanged."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
# Arguments of pytest: one process per core, and a whole file per process.
AT_ONCE = ("-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder")


def copy_project(to: Path) -> None:
    """Copy all tracked and untracked files that git does not ignore, and the built extension."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for path in [*map(ROOT.joinpath, listed.splitlines()), *ROOT.glob("eman_kernels/_C*.so")]:
        if path.exists():
            copy = to / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)


def build(project: Path, flags: str = "") -> None:
    """Rebuild the extension without CUDA, with these compiler flags. Raises CalledProcessError."""
    folder = project / "build"
    definitions = {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "EMAN_CUDA": "off",
        "CMAKE_CXX_FLAGS": flags,
    }
    for command in (
        ["-G", "Ninja", "-S", project / "csrc", "-B", folder, *(f"-D{n}={value}" for n, value in definitions.items())],
        ["--build", folder],
        ["--install", folder, "--prefix", project / "eman_kernels"],
    ):
        subprocess.run(["cmake", *command], check=True, stdout=subprocess.DEVNULL, env=environment(project))


def environment(project: Path, **more: str) -> dict[str, str]:
    """An environment in which Python imports the copy and finds the tools of its virtual environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1", "PATH": path} | more


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
