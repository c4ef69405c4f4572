"""The same chunk table in one Triton launch: the same bits, without a C++ or CUDA compiler.

The first launch on a kind of device compiles the kernel, in about a second on one CPU core. Triton caches the result on
disk (~/.triton/cache), and later processes load it from there.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from ctypes import c_float
from functools import cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .interface import Arguments, Work

NAME = "triton"
TAKES_TABLE = True

# No autotuning, because it would run an in-place update many times. A thread takes 16 bytes of the wider tensor at a
# time in the vector loop, and one element in the scalar loop: with twice as much, registers grow from 39 to 64 and
# more, and an SM holds fewer programs. 8 warps instead of 4 make tensors with few elements slower and no other faster
# (H200). Only the fma in the source may be fused: the bits must equal the other backends'.
NUM_WARPS = 4
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
# By default NVIDIA's assembler stops at 32 registers here and spills two. Allowed 40, it spills none. The general
# update (everything but one teacher rounded to nearest) takes 40 to 64.
NVIDIA_OPTIONS = OPTIONS | {"maxnreg": 40}
NVIDIA_GENERAL_OPTIONS = OPTIONS | {"maxnreg": 64}


@cache
def explain_missing() -> str | None:
    """Why there is no Triton that compiles the kernels; None if there is one."""
    try:
        import triton
    except ImportError as error:
        return f"triton does not import ({error}); `pip install triton`, or take another backend with backend='auto'"
    # 3.2 to 3.5 do not compile the kernel; 3.6, 3.7 and 3.9 do.
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"it needs triton 3.6 or newer, and this is {triton.__version__}; use backend='auto'"
    return None


@cache
def load_kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


@cache
def unavailable(device_type: str) -> str | None:
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return explain_missing()
        return "it updates GPU tensors only, not cpu (but for TRITON_INTERPRET=1); use backend='auto'"
    if device_type not in ("cuda", "xpu"):
        return f"it has no code for {device_type} tensors; use backend='auto'"
    if not torch.get_device_module(device_type).is_available():
        return f"no GPU is visible to torch (torch.{device_type}.is_available() is False)"
    return explain_missing()


def run(work: Work, arguments: Arguments, tensors: Sequence[Tensor]) -> None:
    momenta = weights = general = None
    if isinstance(arguments.momenta, Tensor):
        momenta = arguments.momenta
    else:
        weights = tuple(split_into_floats(1.0 - momentum) for momentum in arguments.momenta)
    if work.general:
        general = (work.n_teachers, work.stochastic, work.skip_nonfinite, work.casts)
    launch(
        load_kernels().eman_update,
        work,
        momenta,
        weights,
        arguments.found_inf,
        arguments.seed if work.stochastic else None,
        arguments.step if work.stochastic else None,
        arguments.skipped if work.skip_nonfinite else None,
        GENERAL=general,
    )


def swaps(work: Work, tensors: Sequence[Tensor]) -> Iterator[tuple[Callable[[], object], ...]]:
    yield (partial(launch, load_kernels().eman_swap, work),)


def launch(kernel: Any, work: Work, *arguments: object, **constants: object) -> None:
    """Launch one program per piece of the students."""
    grid = (work.n_pieces,)
    if work.device.type == "cpu":  # Triton's interpreter
        kernel[grid](work.table, *arguments, **constants, THREADS=32 * NUM_WARPS, **OPTIONS)
        return
    # Triton launches on the current device's current stream. If that is another device, which is rare, call again
    # with the right one.
    if torch.accelerator.current_device_index() != work.device.index:
        with torch.get_device_module(work.device).device(work.device):
            return launch(kernel, work, *arguments, **constants)
    target = find_target(work.device)
    options = OPTIONS
    if target.backend == "cuda":
        options = NVIDIA_OPTIONS if constants.get("GENERAL", True) is None else NVIDIA_GENERAL_OPTIONS
    kernel[grid](work.table, *arguments, **constants, THREADS=target.warp_size * NUM_WARPS, **options)
    work.keep_table(work.current_stream())


@cache
def find_target(device: torch.device) -> Any:
    """What Triton compiles for on the current device, which must be this one. A warp has 32 threads; on some AMD GPUs
    64."""
    import triton

    return triton.runtime.driver.active.get_current_target()


def split_into_floats(weight: float) -> tuple[float, float, float]:
    """Three float32 numbers whose sum in double is the weight; the first is the weight rounded to float32.

    Triton passes Python floats as float32. Three of them represent the weight exactly, because 1 - momentum is a
    multiple of 2^-53.
    """
    high, rest = _split_float32(weight)
    middle, rest = _split_float32(rest)
    return high, middle, rest


def _split_float32(number: float) -> tuple[float, float]:
    rounded = c_float(number).value
    return rounded, number - rounded
