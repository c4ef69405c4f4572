"""The same table by one Triton kernel: one launch, the same bits, and no compiler to install.

The first call on a kind of device compiles the kernel, in about a second on one CPU core; Triton keeps the result in
its cache on disk (~/.triton/cache), and later processes load it from there.
"""

import os
from ctypes import c_float
from functools import cache

import torch

missing: str | None = None
try:
    import triton
    import triton.language as tl
except ImportError as error:
    missing = f"triton does not import ({error}); `pip install triton`, or take another backend with backend='auto'"
else:
    # 3.2 to 3.5 do not compile the kernel; 3.6, 3.7 and 3.9 do.
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        missing = f"it needs triton 3.6 or newer, and this is {triton.__version__}; use backend='auto'"

NAME = "triton"
TAKES_TABLE = True

# No autotuning: it would run an in-place update many times. In the vector loop a thread takes 16 bytes of the wider
# tensor at a time, in the scalar loop one element: with twice as much, registers grow from 39 to 64 and over, and an SM
# holds fewer programs. fma stands where the kernel says so and nowhere else.
NUM_WARPS = 4
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
# NVIDIA's assembler would stop at 32 registers and spill two. With leave to take 40 it takes 39.
NVIDIA_OPTIONS = OPTIONS | {"maxnreg": 40}


@cache
def unavailable(device_type: str) -> str | None:
    if missing:
        return missing
    if device_type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "it updates GPU tensors only, not cpu (but for TRITON_INTERPRET=1); use backend='auto'"
    if device_type not in ("cuda", "xpu"):
        return f"it has no code for {device_type} tensors; use backend='auto'"
    if not torch.get_device_module(device_type).is_available():
        return f"no GPU is visible to torch (torch.{device_type}.is_available() is False)"
    return None


def run(work, momentum: float | torch.Tensor) -> None:
    on_device = isinstance(momentum, torch.Tensor)
    read = (momentum, 0.0, 0.0, 0.0) if on_device else (None, *parts(1.0 - momentum))
    launch = eman_update[(len(work.table),)]
    if work.device.type == "cpu":
        launch(work.table, *read, THREADS=32 * NUM_WARPS, **OPTIONS)
        return
    # Triton launches on the current device's current stream.
    with torch.get_device_module(work.device).device(work.device):
        target = current_target(work.device)
        options = NVIDIA_OPTIONS if target.backend == "cuda" else OPTIONS
        launch(work.table, *read, THREADS=target.warp_size * NUM_WARPS, **options)
        work.keep_table()


@cache
def current_target(device: torch.device):
    """What Triton compiles for on the current device, which this is. A warp has 32 threads, or 64 on some of AMD's."""
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


if not missing:

    @triton.jit
    def _ema(teacher, student, weight):
        """csrc/ema_math.h says why this form. With a branch Triton would not inline it, nor make wide accesses."""
        near_teacher = weight < 0.5
        coefficient = tl.where(near_teacher, weight, weight - 1.0)
        return tl.fma(coefficient, student - teacher, tl.where(near_teacher, teacher, student))

    @triton.jit
    def _elements(teacher, student, weight, mask, REAL: tl.constexpr, AVERAGED: tl.constexpr):
        """A block of pointers to elements. A mask, whatever is in it, would make the accesses an element wide."""
        followed = tl.load(student, mask=mask)
        if AVERAGED:
            average = _ema(tl.load(teacher, mask=mask).to(REAL), followed.to(REAL), weight)
            tl.store(teacher, average.to(teacher.dtype.element_ty), mask=mask)
        else:
            tl.store(teacher, followed, mask=mask)

    @triton.jit
    def _chunk(teacher, student, numel, vector16, weight, T: tl.constexpr, S: tl.constexpr, REAL: tl.constexpr,
               AVERAGED: tl.constexpr, THREADS: tl.constexpr):  # fmt: skip
        teacher = teacher.to(tl.pointer_type(T))
        student = student.to(tl.pointer_type(S))
        done = numel * 0
        if vector16 != 0:
            # A hint on the address would be lost in the cast to a pointer.
            aligned_teacher = tl.multiple_of(teacher, 16)
            aligned_student = tl.multiple_of(student, 16)
            BLOCK: tl.constexpr = THREADS * 128 // max(T.primitive_bitwidth, S.primitive_bitwidth)
            done = numel // BLOCK * BLOCK
            for first in range(0, done, BLOCK):
                at = first + tl.arange(0, BLOCK)
                _elements(aligned_teacher + at, aligned_student + at, weight, None, REAL, AVERAGED)
        for first in range(done, numel, THREADS):
            at = first + tl.arange(0, THREADS)
            _elements(teacher + at, student + at, weight, at < numel, REAL, AVERAGED)

    @triton.jit
    def eman_update(table, momentum, high, middle, low, THREADS: tl.constexpr):
        """One program a chunk. The record and the codes are those of csrc/chunk.h.

        The weight is the sum of three floats, or 1 minus the momentum that lies on the device, where there is one.
        """
        if momentum is not None:
            double = 1.0 - tl.load(momentum).to(tl.float64)
            single = double.to(tl.float32)
        else:
            double = tl.cast(high, tl.float64) + tl.cast(middle, tl.float64) + tl.cast(low, tl.float64)
            single = high
        record = table + tl.program_id(0).to(tl.int64) * 4
        t = tl.load(record)
        s = tl.load(record + 1)
        packed = tl.load(record + 3)
        n = (packed & 0xFFFFFFFF).to(tl.int32)
        pair = ((packed >> 32) & 0xFFFF).to(tl.int32)
        v16 = ((packed >> 48) & 1).to(tl.int32)
        if pair == 0:
            _chunk(t, s, n, v16, single, tl.float32, tl.float32, tl.float32, True, THREADS)
        elif pair == 1:
            _chunk(t, s, n, v16, single, tl.float32, tl.bfloat16, tl.float32, True, THREADS)
        elif pair == 2:
            _chunk(t, s, n, v16, single, tl.float32, tl.float16, tl.float32, True, THREADS)
        elif pair == 3:
            _chunk(t, s, n, v16, single, tl.bfloat16, tl.bfloat16, tl.float32, True, THREADS)
        elif pair == 4:
            _chunk(t, s, n, v16, single, tl.float16, tl.float16, tl.float32, True, THREADS)
        elif pair == 5:
            _chunk(t, s, n, v16, single, tl.bfloat16, tl.float32, tl.float32, True, THREADS)
        elif pair == 6:
            _chunk(t, s, n, v16, single, tl.float16, tl.float32, tl.float32, True, THREADS)
        elif pair == 7:
            _chunk(t, s, n, v16, double, tl.float64, tl.float64, tl.float64, True, THREADS)
        elif pair == 8:
            _chunk(t, s, n, v16, single, tl.uint8, tl.uint8, tl.uint8, False, THREADS)
        elif pair == 9:
            _chunk(t, s, n, v16, single, tl.uint16, tl.uint16, tl.uint16, False, THREADS)
        elif pair == 10:
            _chunk(t, s, n, v16, single, tl.uint32, tl.uint32, tl.uint32, False, THREADS)
        elif pair == 11:
            _chunk(t, s, n, v16, single, tl.uint64, tl.uint64, tl.uint64, False, THREADS)
