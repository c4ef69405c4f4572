"""Every backend against torch.lerp, bit for bit."""

import ctypes
import ctypes.util
import re

import pytest
import torch
from conftest import (
    CHUNK,
    COPY_DTYPES,
    EMA_PAIRS,
    MOMENTA,
    SIZES,
    Guarded,
    assert_same_bits,
    comparison,
    is_interpreted,
    lerp,
    planned,
    values,
)

import eman_kernels
from eman_kernels import __main__ as report
from eman_kernels import ema_update_
from eman_kernels.backends import reference

pytestmark = pytest.mark.filterwarnings("ignore:.*does not move")  # every dtype at every momentum


@pytest.mark.parametrize("dtypes", EMA_PAIRS, ids=lambda pair: "<-".join(str(dtype)[6:] for dtype in pair))
@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 1), (3, 3)], ids=lambda o: f"{o[0]}-{o[1]}-off")
def test_ema(backend_and_device, dtypes, offsets):
    backend, device = backend_and_device
    same = comparison(backend, device, *dtypes)
    momenta, sizes = MOMENTA, SIZES
    if is_interpreted(backend, device):  # about a millisecond per hundred elements
        momenta, sizes = (0.0, 0.5, 0.996), [0, 1, 17, 1009, CHUNK + 1]
    for momentum in momenta:
        teachers = [Guarded(values(size, dtypes[0]), offsets[0], device) for size in sizes]
        students = [Guarded(values(size, dtypes[1]), offsets[1], device) for size in sizes]
        expected = [lerp(t.tensor, s.tensor, momentum) for t, s in zip(teachers, students, strict=True)]
        before = [s.memory.clone() for s in students]
        ema_update_([t.tensor for t in teachers], [s.tensor for s in students], momentum, backend=backend)
        for t, want, size in zip(teachers, expected, sizes, strict=True):
            same(t.tensor, want, f"{size} elements, momentum {momentum}")
            assert t.intact(), f"written outside of the teacher's {size} elements"
        for s, old in zip(students, before, strict=True):
            assert torch.equal(s.memory, old), "the student was written"


@pytest.mark.parametrize("dtype", COPY_DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("offset", [0, 1])
def test_copy(backend_and_device, dtype, offset):
    backend, device = backend_and_device
    teacher, student = torch.nn.Module(), torch.nn.Module()
    guards = []
    for size in SIZES:
        for module in (teacher, student):
            guards.append(Guarded(values(size, dtype), offset, device))
            module.register_buffer(f"b{size}", guards[-1].tensor)
    eman_kernels.eman_update_(teacher, student, 0.5, buffers="copy", backend=backend)
    for (name, t), s in zip(teacher.named_buffers(), student.buffers(), strict=True):
        assert_same_bits(t, s, name)
    assert all(guard.intact() for guard in guards)


@pytest.mark.parametrize("dtypes", EMA_PAIRS, ids=lambda pair: "<-".join(str(dtype)[6:] for dtype in pair))
@pytest.mark.parametrize(
    "momentum", [torch.tensor(0.996), torch.tensor(1 / 3), torch.tensor(0.9999, dtype=torch.float64)]
)
def test_momentum_on_the_device(backend_and_device, dtypes, momentum):
    """The same bits as a momentum given by value; the tensor is read at each call."""
    backend, device = backend_and_device
    teacher, student = torch.randn(1009).to(device, dtypes[0]), torch.randn(1009).to(device, dtypes[1])
    by_value = teacher.clone()
    momentum = momentum.to(device, copy=True)
    for _ in range(2):
        ema_update_([teacher], [student], momentum, backend=backend)
        ema_update_([by_value], [student], momentum.item(), backend=backend)
        assert_same_bits(teacher, by_value)
        momentum.mul_(0.5)


def test_end_points(backend_and_device):
    """Momentum 0 gives exactly the student, momentum 1 keeps the teacher, and a teacher equal to its student stays."""
    backend, device = backend_and_device
    teacher, student = torch.randn(5000, device=device), torch.randn(5000, device=device)
    old = teacher.clone()
    ema_update_([teacher], [student], 1, backend=backend)
    assert torch.equal(teacher, old)
    ema_update_([teacher], [student], 0.0, backend=backend)
    assert torch.equal(teacher, student)
    for _ in range(10):
        ema_update_([teacher], [student], 0.9, backend=backend)
    assert torch.equal(teacher, student)


@pytest.mark.parametrize("dtypes", EMA_PAIRS, ids=lambda pair: "<-".join(str(dtype)[6:] for dtype in pair))
def test_against_fp64(backend_and_device, dtypes):
    """The formula without torch.lerp, in float64: within one rounding of the difference and one of the result."""
    backend, device = backend_and_device
    teacher, student = torch.randn(4099).to(dtypes[0]), torch.randn(4099).to(dtypes[1])
    momentum = 0.97
    exact = momentum * teacher.double() + (1 - momentum) * student.double()
    got = teacher.to(device)
    ema_update_([got], [student.to(device)], momentum, backend=backend)
    error = (got.cpu().double() - exact).abs()
    bound = torch.finfo(dtypes[0]).eps * exact.abs() / 2 + torch.finfo(torch.float32).eps * (1 - momentum) * 8
    if is_interpreted(backend, device) and dtypes[0] == torch.bfloat16:
        bound *= 2  # the interpreter truncates
    assert (error <= bound).all()


def test_reference_is_one_fma():
    """The reference has the bits of the C library's fmaf: one rounding, and the mirrored form from weight 0.5."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    for weight in (0.001, 0.3, 0.5, 0.75, 1.0):
        teacher, student = torch.randn(301), torch.randn(301)
        rounded = torch.tensor(weight).item()
        difference = (student - teacher).tolist()
        want = [
            fmaf(rounded, d, t) if rounded < 0.5 else fmaf(rounded - 1, d, s)
            for t, s, d in zip(teacher.tolist(), student.tolist(), difference, strict=True)
        ]
        assert reference.lerp(teacher, student, weight).tolist() == want


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half(dtype):
    """All 65,536 values of a half type and values between them, through the kernel's conversions: copied, and
    averaged with 0. NaNs stay NaNs, whatever their payload."""
    if reason := eman_kernels.available_backends()["cpu"]:
        pytest.skip(f"backend cpu: {reason}")
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype)
    # Each value, the midpoints to its neighbors, and numbers just beside the midpoints.
    steps = torch.cat([every.float() * (1 + f) for f in (0, 2**-11, -(2**-11), 2**-9, 2**-8, 2**-8 + 2**-20, 2**-12)])
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FFF8000], dtype=torch.int32).view(torch.float32)
    for student, into in ((every, torch.float32), (torch.cat([steps, nans]), dtype), (every, dtype)):
        for momentum in (0.0, 0.5, 0.75):
            teacher = torch.zeros(len(student), dtype=into)
            want = lerp(teacher, student, momentum)
            ema_update_([teacher], [student], momentum, backend="cpu")
            assert_same_bits(teacher, want, f"{into} <- {student.dtype}, momentum {momentum}")


def test_cpu_kernel_uses_several_threads_with_the_same_bits():
    if reason := eman_kernels.available_backends()["cpu"]:
        pytest.skip(f"backend cpu: {reason}")
    from eman_kernels import _C
    from eman_kernels.backends import cpu
    from eman_kernels.networks.pairing import pair_lists

    teacher, student = torch.randn(1_000_003), torch.randn(1_000_003)
    want = lerp(teacher, student, 0.9)
    for threads in (1, 2, 5):
        mine = teacher.clone()
        ((_, work),) = planned(pair_lists([mine], [student]), "cpu")[0].works
        _C.update_cpu(_C.Arguments(work.table.data_ptr(), 0.9), len(work.table), False, threads)
        assert_same_bits(mine, want, f"{threads} threads")
    assert cpu.count_threads(10) == 1
    assert cpu.count_threads(1 << 30) == torch.get_num_threads()


def test_the_report_checks_each_available_backend(capsys, monkeypatch):
    assert report.main() == 0
    there = [name for name, reason in eman_kernels.available_backends().items() if reason is None]
    said = capsys.readouterr().out
    assert re.findall(r"^  (\w+) +available$", said, re.M) == there
    assert "self-check: passed" in said
    update = report.eman_update_

    def off_by_one_bit(teacher, student, momentum, backend):
        update(teacher, student, momentum, backend=backend)
        if backend == "foreach":
            teacher[0].bias.view(torch.int32)[-1] ^= 1

    monkeypatch.setattr(report, "eman_update_", off_by_one_bit)
    assert report.main() == 1
    said = capsys.readouterr().out
    assert re.search(r"foreach +available, but differs from the reference in 0\.bias$", said, re.M), said
    assert "self-check: failed" in said
