"""The same table by one Triton kernel: one launch, the same bits, and no compiler to install.

The first call on a kind of device compiles the kernel, in about a second on one CPU core; Triton keeps the result in
its cache on disk (~/.triton/cache), and later processes load it from there.
"""

import os
from ctypes import c_float
from functools import cache, partial
from types import ModuleType

import torch

from ..interrupts import at_once

NAME = "triton"
TAKES_TABLE = True

# No autotuning: it would run an in-place update many times. In the vector loop a thread takes 16 bytes of the wider
# tensor at a time, in the scalar loop one element: with twice as much, registers grow from 39 to 64 and over, and an SM
# holds fewer programs. With 8 warps instead of 4 a tensor of few elements costs more, and no other less (H200). fma
# stands where the kernel says so and nowhere else.
NUM_WARPS = 4
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
# NVIDIA's assembler would stop at 32 registers and spill two. With leave to take 40 it spills none; the general update,
# which is more than one teacher rounded to nearest, takes 40 to 64.
NVIDIA_OPTIONS = OPTIONS | {"maxnreg": 40}
NVIDIA_GENERAL_OPTIONS = OPTIONS | {"maxnreg": 64}


@cache
def missing() -> str | None:
    """Why there is no Triton here that compiles the kernels; None if there is."""
    try:
        import triton
    except ImportError as error:
        return f"triton does not import ({error}); `pip install triton`, or take another backend with backend='auto'"
    # 3.2 to 3.5 do not compile the kernel; 3.6, 3.7 and 3.9 do.
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"it needs triton 3.6 or newer, and this is {triton.__version__}; use backend='auto'"
    return None


@cache
def kernels() -> ModuleType:
    from . import triton_kernels

    return triton_kernels


@cache
def unavailable(device_type: str) -> str | None:
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return missing()
        return "it updates GPU tensors only, not cpu (but for TRITON_INTERPRET=1); use backend='auto'"
    if device_type not in ("cuda", "xpu"):
        return f"it has no code for {device_type} tensors; use backend='auto'"
    if not torch.get_device_module(device_type).is_available():
        return f"no GPU is visible to torch (torch.{device_type}.is_available() is False)"
    return missing()


def run(work, call, tensors) -> None:
    on_device = isinstance(call.momenta, torch.Tensor)
    general = None
    if work.general:
        general = (work.n_teachers, work.stochastic, work.skip_nonfinite, work.casts)
    launch(
        kernels().eman_update,
        work,
        call.momenta if on_device else None,
        None if on_device else tuple(parts(1.0 - momentum) for momentum in call.momenta),
        call.found_inf,
        call.seed if work.stochastic else None,
        call.step if work.stochastic else None,
        call.skipped if work.skip_nonfinite else None,
        GENERAL=general,
    )
    at_once(*call.counts)


def swaps(work, tensors):
    yield (partial(launch, kernels().eman_swap, work),)


def launch(kernel, work, *arguments, **constants) -> None:
    """One program a piece of the student."""
    grid = (work.n_pieces,)
    if work.device.type == "cpu":
        kernel[grid](work.table, *arguments, **constants, THREADS=32 * NUM_WARPS, **OPTIONS)
        return
    # Triton launches on the current device's current stream. Where that is another, which is rare, once more.
    if torch.accelerator.current_device_index() != work.device.index:
        with torch.get_device_module(work.device).device(work.device):
            return launch(kernel, work, *arguments, **constants)
    target = current_target(work.device)
    options = OPTIONS
    if target.backend == "cuda":
        options = NVIDIA_OPTIONS if constants.get("GENERAL", True) is None else NVIDIA_GENERAL_OPTIONS
    kernel[grid](work.table, *arguments, **constants, THREADS=target.warp_size * NUM_WARPS, **options)
    work.keep_table(work.current_stream())


@cache
def current_target(device: torch.device):
    """What Triton compiles for on the current device, which this is. A warp has 32 threads, or 64 on some of AMD's."""
    import triton

    return triton.runtime.driver.active.get_current_target()


def parts(weight: float) -> tuple[float, float, float]:
    """Three float32 numbers whose sum, taken in double, is the weight; the first is the weight rounded to float32.

    Triton takes a Python float as float32. Three of them hold it exactly, because 1 - momentum is a multiple of 2^-53.
    """
    high, rest = _float32(weight)
    middle, rest = _float32(rest)
    return high, middle, rest


def _float32(number: float) -> tuple[float, float]:
    rounded = c_float(number).value
    return rounded, number - rounded
