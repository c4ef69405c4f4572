"""A second torch device, `torch.second`, for a separate process. Its kernels are in second_device.cpp."""

import contextlib
import shutil
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

NAME = "second"
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))
SOURCE = Path(__file__).with_suffix(".cpp")


def compiled(folder: Path) -> Path:
    """Build the library that implements the device, and return its path. Skips the test if it cannot be built."""
    if VERSION < (2, 11):
        pytest.skip(f"torch {torch.__version__}: the device is written for torch 2.11 and newer")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ on PATH")
    torch_folder = Path(torch.__file__).parent
    include, lib, library = torch_folder / "include", torch_folder / "lib", folder / "second_device.so"
    command = [compiler, "-std=c++20", "-O0", "-w", "-shared", "-fPIC", f"-I{include}", SOURCE, "-o", library]
    built = subprocess.run(
        [*command, f"-I{include}/torch/csrc/api/include", f"-L{lib}", "-ltorch_cpu", "-lc10"],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    return library


def load(library: str) -> None:
    """Register the device until the end of the process."""
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(f"torch.{NAME}")
    module.Stream, module.stream = torch.Stream, stream
    module.current_stream = torch.accelerator.current_stream
    module.is_available, module.device_count, module.current_device = lambda: True, lambda: 1, lambda: 0
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda seed: None
    torch._register_device_module(NAME, module)
    torch.utils.generate_methods_for_privateuse1_backend()


@contextlib.contextmanager
def stream(stream: torch.Stream) -> Iterator[None]:
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield
    finally:
        torch.accelerator.set_stream(before)


def copies_to_host() -> tuple[int, int]:
    """The number of copies so far, and how many of them went to pageable memory."""
    return torch.ops.second_device.copies_to_host()
