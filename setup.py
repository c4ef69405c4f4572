"""Runs CMake on csrc/ where setuptools would run a compiler. CMake decides what is built, and says what is not."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import cmake
import ninja
import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        library = ROOT / "eman_kernels"
        if not self.editable_mode:
            library = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        for old in library.glob("_C.*"):  # not to outlive the compiler that made it
            old.unlink()
        command = Path(cmake.CMAKE_BIN_DIR) / "cmake"
        definitions = {
            "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "EMAN_CUDA": os.environ.get("EMAN_KERNELS_CUDA", "auto"),
            "EMAN_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
            "EMAN_PACKAGES": sysconfig.get_path("purelib"),
        }
        # --fresh: a cached answer to "is there an nvcc" may be an old one.
        subprocess.run(
            [command, "--fresh", "-G", "Ninja", "-S", ROOT / "csrc", "-B", build]
            + [f"-D{name}={value}" for name, value in definitions.items()],
            check=True,
        )
        subprocess.run([command, "--build", build], check=True)
        subprocess.run([command, "--install", build, "--prefix", library, "--strip"], check=True)

    def copy_extensions_to_source(self) -> None:
        """CMake has put it there already, if there is one."""


setup(
    # Sources are CMake's affair. On a machine without a compiler no file is made, and that is no failure.
    ext_modules=[Extension("eman_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
