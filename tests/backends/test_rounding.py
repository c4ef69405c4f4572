"""Stochastic rounding: the generator, the distribution, and a teacher that follows for 10,000 steps."""

import math
import re
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT, values

from eman_kernels import EMANTeacher, available_backends, ema_update_
from eman_kernels.backends import reference
from eman_kernels.backends.interface import Arguments

sys.path.insert(0, str(ROOT / "benchmarks"))
import rounding as benchmark

HALVES = [torch.bfloat16, torch.float16]


def published_rounds(counter, key):
    """Philox 4x32-10 in Python's integers."""
    low = (1 << 32) - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def test_philox():
    """The known answers of Random123 by Philox's authors, and the reference compared on sampled counters and keys."""
    ones, pi = 4 * [0xFFFFFFFF], [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    for counter, key, answer in (
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (ones, ones[:2], [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (pi, [0xA4093822, 0x299F31D0], [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ):
        assert published_rounds(counter, key) == answer
    groups = [0, 1, 0xFFFFFFFF, 1 << 32, 0x05A308D3243F6A88]
    for seed, step in ((0, 0), (0xFFFFFFFF, 0xFFFFFFFF), (0xA4093822, 0x299F31D0)):
        for step_given in (step, torch.tensor(step), (7 << 32) + step):
            words = reference.philox(torch.tensor(groups), seed, step_given)
            for group, got in zip(groups, words.T.tolist(), strict=True):
                assert got == published_rounds([group & 0xFFFFFFFF, group >> 32, 0, 0], [seed, step])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_mean_over_all_draws_is_the_number_itself(dtype, monkeypatch):
    """Rounds to a neighbor, upward in the right share of all 2^16 draws. The kernels have the reference's bits."""
    draws = torch.arange(1 << 16)
    pairs = draws.view(-1, 4, 2)
    words = (pairs[..., 0] | pairs[..., 1] << 16).T
    monkeypatch.setattr(reference, "philox", lambda group, *_: words[:, group])
    smallest = torch.finfo(dtype).smallest_normal
    numbers = [1.0, 1.00390625, 1.0004, -3.14159, 65000.0, smallest * 1.3, smallest * 0.4, -smallest * 0.37, 1e-30]
    for number in torch.tensor([*numbers, 0.1, 7.3e-8]).tolist():
        rounded = reference.round_stochastically(torch.full((1 << 16,), number), dtype, 0, Arguments([0.0])).double()
        low, high = rounded.min().item(), rounded.max().item()
        assert low <= number <= high or high - low < 1e-40
        exact = torch.tensor(number, dtype=torch.float64).to(dtype).double().item()
        if number == exact:
            assert low == high == number
        else:
            upward = torch.nextafter(torch.tensor(low, dtype=dtype), torch.tensor(torch.inf, dtype=dtype)).item()
            assert high in (upward, low)
            # Only in float16's subnormals does float32 have more extra bits than the 16 that are drawn.
            assert abs(rounded.mean().item() - number) <= (upward - low) / 2**16


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_the_ends_of_the_range(dtype):
    """Infinities and NaNs stay; values beyond the largest number become it or infinity; zeros keep their sign."""
    largest, beyond = torch.finfo(dtype).max, 65535.0 if dtype == torch.float16 else 3.3961e38
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, largest, -largest, beyond]).repeat(1000)
    special[2::16] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # the NaN that a GPU produces
    for backend in (None, "reference"):
        teacher = torch.zeros(8000, dtype=dtype)
        # At momentum 0 the average is the student's number.
        ema_update_([teacher], [special], 0.0, backend=backend, rounding="stochastic", step=0)
        columns = teacher.view(1000, 8).T
        assert columns[0].unique().tolist() == [torch.inf]
        assert columns[1].unique().tolist() == [-torch.inf]
        assert columns[2].isnan().all()
        assert (columns[3:5] == 0).all()
        assert columns[5].unique().tolist() == [largest]
        assert columns[6].unique().tolist() == [-largest]
        assert columns[7].unique().tolist() == [largest, torch.inf]


def error(momentum, rounding, dtype):
    for _, last in benchmark.follow(momentum, rounding, dtype):  # noqa: B007
        pass
    return last.mean().item(), last.std().item() / math.sqrt(len(last))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("momentum", benchmark.MOMENTA)
def test_a_stochastically_rounded_teacher_follows_without_bias(momentum, dtype):
    """10,000 steps against a float64 teacher. Rounding to nearest must be biased, or the test would prove nothing."""
    mean, standard_error = error(momentum, "stochastic", dtype)
    print(f"{dtype}, {momentum}: mean error {mean:.2e}, standard error {standard_error:.2e}")
    assert abs(mean) < 3 * standard_error
    assert standard_error < 1e-3
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        mean, standard_error = error(momentum, "nearest", dtype)
    # float16 at 0.99 has steps large enough to move, so there is no warning.
    assert (abs(mean) > 20 * standard_error) == bool(warned) == ((dtype, momentum) != (torch.float16, 0.99))


@pytest.mark.filterwarnings("ignore:.*does not move")
def test_a_bfloat16_teacher_rounded_to_nearest_does_not_move():
    """Why stochastic rounding exists: 100 updates at a gap of 5 % move no element when rounded to nearest."""
    start = torch.rand(10_000) + 1
    teachers = [start.to(torch.bfloat16) for _ in range(2)]
    student = (teachers[0].float() * 1.05).to(torch.bfloat16)
    for step in range(100):
        ema_update_(teachers[:1], [student], 0.999)
        ema_update_(teachers[1:], [student], 0.999, rounding="stochastic", step=step)
    assert torch.equal(teachers[0], start.to(torch.bfloat16))
    moved = (teachers[1].double() / start.to(torch.bfloat16).double() - 1).mean().item()
    assert moved == pytest.approx(0.05 * (1 - 0.999**100), rel=0.05)


@pytest.mark.parametrize("first", [0, 0xFFFF, (1 << 32) - 1])
def test_each_step_draws_by_its_step_number(first):
    student = torch.nn.Linear(40, 40).to(torch.bfloat16)
    teacher = EMANTeacher(student, momentum=0.99, rounding="stochastic", seed=5)
    beside = [parameter.clone() for parameter in teacher.module.parameters()]
    with torch.no_grad():
        student.weight += 1
    teacher.step = first
    for step in range(first, first + 3):
        teacher.update(student)
        options = {"rounding": "stochastic", "seed": 5, "step": step, "backend": "reference"}
        ema_update_(beside, student.parameters(), 0.99, **options)
        for ours, theirs in zip(teacher.module.parameters(), beside, strict=True):
            assert torch.equal(ours, theirs), step


def test_a_teacher_that_cannot_move_warns_once():
    student = torch.nn.Linear(4, 4).to(torch.bfloat16)
    teacher = EMANTeacher(student, momentum=0.999)
    with pytest.warns(UserWarning, match="half-precision teacher rounded to nearest does not move.*stochastic") as seen:
        teacher.update(student)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher.update()
        EMANTeacher(student, momentum=0.9).update(student)
        EMANTeacher(student, momentum=0.999, rounding="stochastic").update(student)
        EMANTeacher(student, momentum=0.999, dtype=torch.float32).update(student)
        EMANTeacher(student, momentum=1.0).update(student)
        EMANTeacher(student.half(), momentum=0.99).update(student)
    with pytest.warns(UserWarning, match="0.998"):
        EMANTeacher(student.half(), momentum=0.998).update(student)


def test_values_of_every_magnitude_round_to_a_neighbor():
    for dtype in HALVES:
        student = values(20_000, torch.float32)
        student = student[student.isfinite() & (student.abs() < torch.finfo(dtype).max)]
        teacher = torch.zeros(len(student), dtype=dtype)
        ema_update_([teacher], [student], 0.0, rounding="stochastic", step=3)
        nearest = student.to(dtype).double()
        distance = (nearest.abs() * torch.finfo(dtype).eps).clamp(min=torch.finfo(dtype).smallest_normal / 128)
        assert ((teacher.double() - student.double()).abs() <= distance).all()


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install '.[bench]')")
    command = [sys.executable, benchmark.__file__, "--steps", "40", "--out", tmp_path / "rounding.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "rounding.png").read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"mean error [+-]\d\.\d{4} %", done.stdout)) == 2 * len(benchmark.MOMENTA)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_nan_of_any_payload_stays_one(backend, dtype):
    """The random addend must not carry out of a payload of all ones into the sign."""
    if reason := available_backends()[backend]:
        pytest.skip(reason)
    student = torch.full((1000,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    teacher = torch.ones(1000, dtype=dtype)
    ema_update_([teacher], [student], 0.5, backend=backend, rounding="stochastic", step=0)
    assert teacher.isnan().all()
