"""The source of both kernels, CUDA's and the CPU's, compiled as host C++ and run under AddressSanitizer and UBSan."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import COPY_DTYPES, EMA_PAIRS, SIZES, assert_same_bits, lerp, values

from eman_kernels.plan import COPY_CODES, PAIR_CODES

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
# The library's own fmaf is exact, so no -mfma is needed. The kernel passes memory through words of another type.
FLAGS = ["-std=c++17", "-O1", "-g", "-fno-strict-aliasing", "-ffp-contract=off", "-fopenmp", "-DEMAN_NO_CLONES"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.fixture(scope="module")
def host_kernel(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no g++ or clang++ on PATH")
    program = tmp_path_factory.mktemp("host_kernel") / "host_kernel"
    sources = [HERE / "host_kernel.cpp", CSRC / "eman_update_cpu.cpp"]
    command = [compiler, *FLAGS, *WARNINGS, *SANITIZERS, f"-I{CSRC}", *sources, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip(f"{compiler} has no sanitizer libraries: {built.stderr.strip().splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    return program


def run(program, kernel, cases, momentum):
    """cases: (pair code, teacher, student, offsets in bytes). The updated teachers."""
    data = struct.pack("dI", momentum, len(cases))
    for code, teacher, student, offsets in cases:
        data += struct.pack(
            "6I", code, teacher.numel(), teacher.element_size(), student.element_size(), offsets[0], offsets[1]
        )
    for _, teacher, student, _ in cases:
        data += b"".join(bytes(t.view(torch.uint8).numpy()) if t.numel() else b"" for t in (teacher, student))
    done = subprocess.run([program, kernel], input=data, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    results, at = [], 0
    for _, teacher, _, _ in cases:
        nbytes = teacher.numel() * teacher.element_size()
        raw = torch.tensor(list(done.stdout[at : at + nbytes]), dtype=torch.uint8)
        results.append(raw.view(teacher.dtype) if nbytes else teacher)
        at += nbytes
    assert at == len(done.stdout)
    return results


@pytest.mark.parametrize(
    ("kernel", "momentum"),
    [
        *((kernel, momentum) for kernel in ("cuda", "cpu") for momentum in (0.0, 0.3, 0.5, 0.999, 1.0)),
        ("cuda-double", 0.999),
        ("cuda-float", torch.tensor(0.999).item()),
    ],
)
def test_every_pair_size_and_alignment(host_kernel, kernel, momentum):
    cases, expected = [], []
    for size in SIZES:
        for dtypes in EMA_PAIRS:
            # malloc gives multiples of 16: a whole number of elements past it, for one tensor, the other, both.
            for offsets in ((0, 0), (1, 0), (0, 1), (3, 3)):
                teacher, student = values(size, dtypes[0]), values(size, dtypes[1])
                in_bytes = [o * d.itemsize for o, d in zip(offsets, dtypes, strict=True)]
                cases.append((PAIR_CODES[("ema", *dtypes)], teacher, student, in_bytes))
                expected.append(lerp(teacher, student, momentum))
        for dtype in COPY_DTYPES:
            teacher, student = values(size, dtype), values(size, dtype)
            cases.append((COPY_CODES[dtype.itemsize], teacher, student, (0, dtype.itemsize)))
            expected.append(student)
            cases.append((COPY_CODES[dtype.itemsize], teacher, student, (0, 0)))
            expected.append(student)
    for case, got, want in zip(cases, run(host_kernel, kernel, cases, momentum), expected, strict=True):
        assert_same_bits(got, want, f"{kernel}, pair {case[0]}, {len(want)} elements, offsets {case[3]}")


@pytest.mark.parametrize("kernel", ["cuda", "cpu"])
def test_the_sanitizers_see_an_access_outside_of_a_tensor(host_kernel, kernel):
    """That they do see: a case that claims one element more than the student has."""
    teacher, student = torch.zeros(1000), torch.ones(1000)
    data = struct.pack("dI", 0.5, 1) + struct.pack(
        "6I", PAIR_CODES["ema", torch.float32, torch.float32], 1000, 4, 2, 0, 0
    )
    data += bytes(teacher.numpy()) + bytes(student.numpy())
    done = subprocess.run([host_kernel, kernel], input=data, capture_output=True)
    assert b"heap-buffer-overflow" in done.stderr
