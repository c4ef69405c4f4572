"""The sources of the CUDA and CPU kernels, compiled as host C++: run under AddressSanitizer and UBSan, and compiled for
64-bit ARM and run in an emulator."""

import os
import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import (
    COPY_DTYPES,
    EMA_PAIRS,
    ROOT,
    SIZES,
    assert_same_bits,
    every_number,
    lerp,
    tensors_of,
    values,
    work_of,
)

from eman_kernels.backends import reference
from eman_kernels.backends.interface import Arguments
from eman_kernels.networks.pairing import Pair
from eman_kernels.plan.chunks import COPY_CODES, PAIR_CODES

HERE = Path(__file__).parent
CSRC = ROOT / "csrc"
# No -mfma: the fmaf of the C library is exact. -fno-strict-aliasing: the kernels access memory through other types.
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-strict-aliasing", "-ffp-contract=off", "-fopenmp", "-DEMAN_NO_CLONES"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
MILLION = 1_000_000
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# AddressSanitizer does not work in the emulator. The loops are vectorized, as in the extension.
ON_ARM = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-O3", "-fno-math-errno", "-fno-trapping-math"]
KERNELS = HERE / "host_kernel.cpp", CSRC / "eman_update_cpu.cpp"


def build(folder, *sources, flags=(), compiler=None, sanitizers=SANITIZERS):
    """Compile a program, and return the command that runs it."""
    more = os.environ.get("CXXFLAGS", "").split() if compiler is None else []
    compiler = compiler or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ on PATH")
    program = folder / "program"
    command = [
        compiler,
        *FLAGS,
        *WARNINGS,
        *sanitizers,
        *flags,
        *more,
        f"-I{CSRC}",
        f"-I{HERE}",
        *sources,
        "-o",
        program,
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip(f"{compiler} has no sanitizer libraries: {built.stderr.strip().splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    return [program]


def build_for_arm(folder, *sources):
    """Compile a program for 64-bit ARM, and return the command that runs it in an emulator."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-g++ or no qemu-aarch64 (packages g++-aarch64-linux-gnu and qemu-user)")
    where = subprocess.run([compiler, "-print-file-name=libc.so.6"], capture_output=True, text=True, check=True).stdout
    libraries = Path(where.strip()).resolve().parents[1]
    return [emulator, "-L", libraries, *build(folder, *sources, compiler=compiler, sanitizers=ON_ARM)]


@pytest.fixture(scope="module")
def sanitized_kernel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("host_kernel"), *KERNELS)


@pytest.fixture(scope="module", params=["sanitized", pytest.param("arm", marks=pytest.mark.slow)])
def host_kernel(request, tmp_path_factory):
    if request.param == "arm":
        return build_for_arm(tmp_path_factory.mktemp("host_kernel"), *KERNELS)
    return request.getfixturevalue("sanitized_kernel")


def run(program, kernel, cases, momentum):
    """Returns each case's teachers with their low-precision copies, the students, and the number of skipped elements.

    cases: (pair code, teacher, student, offsets in bytes). The elements of case i are numbered from i million on.
    """
    data = struct.pack("dI", momentum, len(cases))
    for i, (code, teacher, student, offsets) in enumerate(cases):
        sizes = teacher.numel(), teacher.element_size(), student.element_size()
        data += struct.pack("6IQ", code, *sizes, *offsets, i * MILLION)
    for _, teacher, student, _ in cases:
        data += b"".join(bytes(t.view(torch.uint8).numpy()) if t.numel() else b"" for t in (teacher, student))
    done = subprocess.run([*program, kernel], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    out, at = done.stdout, 0

    def next_like(tensor, dtype=None):
        nonlocal at
        dtype = dtype or tensor.dtype
        begin, at = at, at + tensor.numel() * dtype.itemsize
        return torch.frombuffer(bytearray(out[begin:at]), dtype=dtype) if tensor.numel() else tensor.to(dtype)

    teachers = []
    for code, teacher, _, _ in cases:
        several = "several" in kernel
        casts = (several or "general" in kernel) and code <= 2
        teachers.append(
            [
                (next_like(teacher), next_like(teacher, torch.bfloat16) if casts else None)
                for _ in range(3 if several else 1)
            ]
        )
    students = [next_like(student) for _, _, student, _ in cases]
    assert at == len(out) - 8
    return teachers, students, struct.unpack("Q", out[at:])[0]


@cache
def every_case():
    """Every pair, size and alignment, and non-finite values combined with all kinds of values."""
    return list(_every_case())


def _every_case():
    for size in SIZES:
        for dtypes in EMA_PAIRS:
            # malloc returns multiples of 16. The offsets are whole elements: of one tensor, the other, or both.
            for offsets in ((0, 0), (1, 0), (0, 1), (3, 3)):
                in_bytes = [o * d.itemsize for o, d in zip(offsets, dtypes, strict=True)]
                yield PAIR_CODES[("ema", *dtypes)], values(size, dtypes[0]), values(size, dtypes[1]), in_bytes
        for dtype in COPY_DTYPES:
            for offset in (0, dtype.itemsize):
                yield COPY_CODES[dtype.itemsize], values(size, dtype), values(size, dtype), (0, offset)

    for dtypes in EMA_PAIRS:
        for offset in (0, 1):
            yield PAIR_CODES[("ema", *dtypes)], *every_number(*dtypes), [offset * dtype.itemsize for dtype in dtypes]


@pytest.mark.parametrize(
    ("kernel", "momentum"),
    [
        *((kernel, momentum) for kernel in ("cuda", "cpu") for momentum in (0.0, 0.3, 0.5, 0.999, 1.0)),
        ("cuda-double", 0.999),
        ("cuda-float", torch.tensor(0.999).item()),
    ],
)
def test_every_pair_size_and_alignment(host_kernel, kernel, momentum):
    cases = every_case()
    for case, [(got, _)] in zip(cases, run(host_kernel, kernel, cases, momentum)[0], strict=True):
        code, teacher, student, offsets = case
        want = lerp(teacher, student, momentum) if code <= max(PAIR_CODES.values()) else student
        assert_same_bits(got, want, f"{kernel}, pair {code}, {len(want)} elements, offsets {offsets}")


@pytest.mark.slow
@pytest.mark.parametrize(("in_flight", "threads"), [(2, 256), (4, 512)])
def test_more_pairs_in_flight_and_more_threads(tmp_path, in_flight, threads):
    """The variants that benchmarks/variants.py builds."""
    flags = [f"-DEMAN_IN_FLIGHT={in_flight}", f"-DEMAN_THREADS={threads}"]
    program = build(tmp_path, *KERNELS, flags=flags)
    cases = every_case()
    for case, [(got, _)] in zip(cases, run(program, "cuda", cases, 0.3)[0], strict=True):
        code, teacher, student, offsets = case
        want = lerp(teacher, student, 0.3) if code <= max(PAIR_CODES.values()) else student
        assert_same_bits(got, want, f"pair {code}, {len(want)} elements, offsets {offsets}")


def test_a_launch_reports_only_its_own_error(tmp_path):
    """An error is thrown once and then cleared, and the current device is restored."""
    flags = ["-DEMAN_WITH_CUDA", "-x", "c++"]
    done = subprocess.run(build(tmp_path, HERE / "host_launch.cpp", flags=flags), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    begin = "eman_kernels: the launch of eman"
    no_image = "failed on cuda:1: cudaErrorNoKernelImageForDevice: in words; device 0, last error 0"
    invalid = "cudaSetDevice failed on cuda:99: cudaErrorInvalidDevice: in words; device 0, last error 0"
    assert done.stdout.splitlines() == [
        f"no such device: eman_kernels: {invalid}",
        "after it: 3 blocks; device 0, last error 0",
        f"no image: {begin}_swap {no_image}",
        f"no image at all: eman_kernels: loading eman_update {no_image}",
        "another's error: 4 blocks; device 0, last error 1",
        "the kernels by number of teachers: right",
        "nothing to do: 0 blocks; device 0, last error 1",
    ]


@cache
def general_reference(momenta, nearest):
    """The reference's teachers with their low-precision copies for every case, and the number of skipped elements."""
    expected, pairs = [], []
    for i, (code, teacher, student, _) in enumerate(every_case()):
        mine = [(teacher.roll(-k), torch.zeros(teacher.shape, dtype=torch.bfloat16)) for k in range(len(momenta))]
        rule = "ema" if code <= max(PAIR_CODES.values()) else "copy"
        if rule == "copy":
            student = student.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[student.itemsize])
            mine = [(t.view(student.dtype), c) for t, c in mine]
        expected.append(mine)
        for group, (t, cast) in enumerate(mine):
            cast = cast if code <= 2 else None
            pairs.append(Pair("", t, student, rule, group, cast, first=i * MILLION))
    skipped = torch.zeros((), dtype=torch.int64)
    rounding, nonfinite = ("nearest", "propagate") if nearest else ("stochastic", "skip")
    cpu = torch.device("cpu")
    work = work_of(pairs, reference, cpu, len(momenta), rounding=rounding, nonfinite=nonfinite)
    reference.run(work, Arguments(list(momenta), seed=1, step=2, skipped=skipped), tensors_of(pairs))
    return expected, skipped


@pytest.mark.parametrize("nearest", [False, True], ids=["stochastic", "nearest"])
@pytest.mark.parametrize("kernel", ["cuda-general", "cuda-several", "cpu-general", "cpu-several"])
def test_the_general_kernels(host_kernel, kernel, nearest):
    """One or three teachers with low-precision copies give the bits of the reference: rounded stochastically, with NaNs
    skipped, and rounded to nearest, without."""
    momenta = (0.97, 0.25, 1.0) if "several" in kernel else (0.97,)
    teachers, _, n_skipped = run(host_kernel, kernel + "-nearest" * nearest, every_case(), momenta[0])
    expected, skipped = general_reference(momenta, nearest)
    for case, got, want in zip(every_case(), teachers, expected, strict=True):
        for k in range(len(momenta)):
            what = f"{kernel}, teacher {k}, pair {case[0]}, {case[1].numel()} elements, offsets {case[3]}"
            assert_same_bits(got[k][0].view(want[k][0].dtype), want[k][0], what)
            if got[k][1] is not None:
                assert_same_bits(got[k][1], want[k][1], what)
    assert n_skipped == skipped
    assert nearest or skipped > 1000


@pytest.mark.parametrize("kernel", ["cuda-swap", "cpu-swap"])
def test_swap(host_kernel, kernel):
    cases = [case for case in every_case() if case[0] > max(PAIR_CODES.values())]
    teachers, students, _ = run(host_kernel, kernel, cases, 0.0)
    for (_, teacher, student, _), [(got, _)], got_student in zip(cases, teachers, students, strict=True):
        assert_same_bits(got, student)
        assert_same_bits(got_student, teacher)


@pytest.mark.parametrize(
    "kernel", [f"{d}{kind}" for d in ("cuda", "cpu") for kind in ("", "-general", "-several", "-swap")]
)
def test_the_sanitizers_detect_an_access_outside_of_a_tensor(sanitized_kernel, kernel):
    """A case that claims one element more than the student has."""
    teacher, student = torch.zeros(1000), torch.ones(1000)
    code = COPY_CODES[4] if "swap" in kernel else PAIR_CODES["ema", torch.float32, torch.float32]
    data = struct.pack("dI", 0.5, 1) + struct.pack("6IQ", code, 1000, 4, 2, 0, 0, 0)
    data += bytes(teacher.numpy()) + bytes(student.numpy())
    done = subprocess.run([*sanitized_kernel, kernel], input=data, capture_output=True)
    assert b"heap-buffer-overflow" in done.stderr
