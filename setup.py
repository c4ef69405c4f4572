"""Runs CMake on csrc/ in place of a compiler. CMake decides what is built, and prints why anything is left out. On
systems other than Linux there is no extension."""

import os
import platform
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
    def run(self) -> None:
        # build_ext.run resets `inplace` while it builds, and copies the results to the package afterwards.
        self.to_package = bool(self.inplace) or self.editable_mode
        super().run()

    def build_extension(self, ext: Extension) -> None:
        build = Path(self.build_temp).resolve()
        library = ROOT / "eman_kernels"
        if not self.to_package:
            library = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        for old in library.glob("_C.*"):  # of an earlier build: must not stay if this one builds nothing
            old.unlink()
        if (system := platform.system()) != "Linux":
            reason = f"it is for Linux only, and this is {system}"
            if os.environ.get("EMAN_KERNELS_CUDA") == "on":
                sys.exit(f"EMAN_KERNELS_CUDA=on, but no extension can be built: {reason}")
            print(f"eman_kernels: no compiled extension: {reason}. The pure-Python backends will be used.")
            return
        command = Path(cmake.CMAKE_BIN_DIR) / "cmake"
        definitions = {
            "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR) / "ninja",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "EMAN_CUDA": os.environ.get("EMAN_KERNELS_CUDA", "auto"),
            "EMAN_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
            "EMAN_PACKAGES": sysconfig.get_path("purelib"),
        }
        # --fresh: the cache may hold an outdated answer to whether there is an nvcc.
        subprocess.run(
            [command, "--fresh", "-G", "Ninja", "-S", ROOT / "csrc", "-B", build]
            + [f"-D{name}={value}" for name, value in definitions.items()],
            check=True,
        )
        subprocess.run([command, "--build", build], check=True)
        subprocess.run([command, "--install", build, "--prefix", library, "--strip"], check=True)

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: CMake has installed the library in the package, if it built one."""


setup(
    # No sources, because CMake knows them. Without a compiler, or on another system than Linux, no library is built,
    # which is not an error.
    ext_modules=[Extension("eman_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
