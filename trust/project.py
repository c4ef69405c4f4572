"""A copy of the project, to build and break: nothing here touches the tree itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[1]
# pytest's arguments for a process a core, each with whole files.
AT_ONCE = ("-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder")


def copy_project(to: Path) -> None:
    """All that git knows of or would add, and the extension that is there."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for path in [*map(ROOT.joinpath, listed.splitlines()), *ROOT.glob("eman_kernels/_C*.so")]:
        if path.exists():
            copy = to / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)


def build(project: Path, flags: str = "") -> None:
    """Build the extension anew, without CUDA. flags: the compiler's. Raises CalledProcessError."""
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
    """In which Python imports the copy, and finds the tools that were installed beside it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1", "PATH": path} | more


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
