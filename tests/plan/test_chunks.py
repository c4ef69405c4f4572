"""The chunk table, and which pairs are eligible for it."""

import tracemalloc
import types

import pytest
import torch
from conftest import COPY_DTYPES, EMA_PAIRS, assert_same_bits, lerp, planned, profiled, skip_unless_selectable, work_of
from hypothesis import given, settings
from hypothesis import strategies as st

from eman_kernels import ema_update_
from eman_kernels.backends import extension, interface, reference
from eman_kernels.networks.pairing import Pair, pair_lists
from eman_kernels.plan.chunks import (
    CHUNK_SIZE,
    COPY_CODES,
    GPU_CHUNK_BYTES,
    MAX_TEACHERS,
    PAIR_CODES,
    VECTOR16,
    build_table,
    elements_per_chunk,
)

numels = st.one_of(st.integers(0, 40), st.integers(CHUNK_SIZE - 9, CHUNK_SIZE + 9), st.integers(0, 5 * CHUNK_SIZE))
dtypes = st.sampled_from([*EMA_PAIRS, *((dtype, dtype) for dtype in COPY_DTYPES)])
sizes = st.lists(st.tuples(numels, dtypes, st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


def records(rows):
    """Unpack the table's rows as csrc/chunk.h declares them."""
    for teacher, student, extra, packed in rows.tolist():
        yield teacher, student, extra, packed & 0xFFFFFFFF, packed >> 32 & 0xFFFF, packed >> 48


@given(sizes, st.sampled_from([None, 1024, GPU_CHUNK_BYTES]))
@settings(max_examples=200, deadline=None)
def test_every_element_is_in_exactly_one_chunk(cases, chunk_bytes):
    pairs = []
    for i, (numel, (teacher, student), *offsets) in enumerate(cases):
        t, s = (torch.empty(numel + o, dtype=d)[o:] for d, o in zip((teacher, student), offsets, strict=True))
        pairs.append(Pair(str(i), t, s, "ema" if teacher.is_floating_point else "copy", first=i << 40))
    pairs = [pair for pair in pairs if pair.teacher.numel()]
    covered = {}
    lengths = []
    for teacher, student, extra, numel, code, flags in records(build_table(pairs, chunk_bytes=chunk_bytes)):
        assert flags == (VECTOR16 if teacher % 16 == 0 and student % 16 == 0 else 0)
        lengths.append(numel)
        covered.setdefault(code, []).append((teacher, student, extra, numel))
    expected = {}
    n_full = 0
    for pair in pairs:
        code = PAIR_CODES.get((pair.rule, pair.teacher.dtype, pair.student.dtype))
        code = COPY_CODES[pair.teacher.element_size()] if code is None else code
        t_bytes, s_bytes = pair.teacher.element_size(), pair.student.element_size()
        most = CHUNK_SIZE if chunk_bytes is None else chunk_bytes // max(t_bytes, s_bytes)
        for first in range(0, pair.teacher.numel(), most):
            n = min(most, pair.teacher.numel() - first)
            n_full += n == most
            expected.setdefault(code, []).append(
                (
                    pair.teacher.data_ptr() + first * t_bytes,
                    pair.student.data_ptr() + first * s_bytes,
                    pair.first + first if pair.teacher.dtype in (torch.bfloat16, torch.float16) else 0,
                    n,
                )
            )
    assert {code: sorted(rows) for code, rows in covered.items()} == {c: sorted(rows) for c, rows in expected.items()}
    ends = lengths[n_full:]  # the full chunks come first
    assert ends == sorted(ends, reverse=True)


def test_when_chunks_use_16_byte_accesses():
    """All three addresses must be aligned, the low-precision copy's too; the element offset does not matter."""
    teacher, student, low = torch.zeros(64), torch.ones(64), torch.zeros(72, dtype=torch.bfloat16)
    half = torch.zeros(64, dtype=torch.bfloat16)
    for pair, wide in (
        (Pair("", teacher, student, "ema", cast=low[:64]), True),
        (Pair("", teacher, student, "ema", cast=low[1:65]), False),
        (Pair("", teacher, student, "ema", cast=low[8:]), True),
        (Pair("", half, student, "ema", first=8), True),
    ):
        ((*_, flags),) = records(build_table([pair]))
        assert (flags & VECTOR16 == VECTOR16) == wide


def test_codes_and_layout_match_chunk_h():
    if extension.missing:
        pytest.skip(extension.missing)
    C = extension.C
    names = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Half", torch.float64: "double"}
    mine = {f"{names[teacher]}<-{names[student]}": code for (_, teacher, student), code in PAIR_CODES.items()}
    mine |= {f"uint{8 * width}_t": code for width, code in COPY_CODES.items()}
    assert mine == C.pair_codes
    assert (C.chunk_bytes, C.max_teachers) == (32, MAX_TEACHERS)


@pytest.mark.parametrize(
    ("teacher", "student", "size"),
    [
        (torch.float32, torch.float32, 2048),
        (torch.float32, torch.bfloat16, 2048),
        (torch.float16, torch.float32, 2048),
        (torch.bfloat16, torch.bfloat16, 4096),
        (torch.float64, torch.float64, 1024),
        (torch.int64, torch.int64, 1024),
        (torch.bool, torch.bool, 8192),
    ],
)
def test_the_size_of_a_chunk(teacher, student, size):
    """Two rounds of 256 threads with 16 bytes each of the wider tensor."""
    pair = Pair("", torch.zeros(1, dtype=teacher), torch.zeros(1, dtype=student), "ema")
    assert elements_per_chunk(pair, GPU_CHUNK_BYTES) == size
    assert elements_per_chunk(pair, None) == CHUNK_SIZE


@pytest.mark.parametrize(("device", "n_pieces"), [("cpu", 25), ("cuda", 196), ("xpu", 196)])
def test_devices_other_than_cpus_use_the_gpu_chunk_size(monkeypatch, device, n_pieces):
    """400,000 elements in chunks of 16,384 and of 2,048, for one teacher and for two."""
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_: tensor)
    monkeypatch.setattr(interface.Work, "current_stream", lambda work: 0)
    teachers, student = [torch.zeros(400_000) for _ in range(2)], torch.zeros(400_000)
    for n in (1, 2):
        pairs = [Pair("", teacher, student, "ema", group) for group, teacher in enumerate(teachers[:n])]
        work = work_of(pairs, types.SimpleNamespace(TAKES_TABLE=True), torch.device(device, 0), n)
        assert work.n_pieces == n_pieces
        assert sum(packed & 0xFFFFFFFF for packed in work.table[:, 3].tolist()) == n * 400_000


def test_a_table_takes_32_bytes_per_chunk_and_no_tensor_is_allocated():
    teacher, student = torch.zeros(10_000_000), torch.ones(10_000_000)
    ema_update_([teacher], [student], 0.5)
    tracemalloc.start()
    with profiled(torch.profiler.ProfilerActivity.CPU, profile_memory=True) as profile:
        ema_update_([teacher], [student], 0.5)
    tracemalloc.stop()
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
    # Without the extension, foreach checks for infinities with a sum.
    assert allocated == 0 if extension.missing is None else allocated <= 16
    assert build_table(pair_lists([teacher], [student])).nbytes == 32 * -(-10_000_000 // CHUNK_SIZE)


def test_a_table_without_pairs_has_four_columns():
    assert build_table([]).shape == (0, 4)


def test_one_unaligned_teacher_makes_all_of_its_piece_unaligned():
    """The kernels read the flag from the first teacher's record only."""
    student, aligned, unaligned = torch.zeros(40), torch.zeros(40), torch.zeros(41)[1:]
    for teachers, flag in (([aligned, aligned.clone()], 1), ([aligned, unaligned], 0), ([unaligned, aligned], 0)):
        pairs = [Pair("", teacher, student, "ema", group) for group, teacher in enumerate(teachers)]
        assert [packed >> 48 for packed in build_table(pairs, 2)[:, 3].tolist()] == [flag] * 2


# ---------------------------------------------------------------- pairs that the kernels do not take


def ineligible_pairs():
    t = torch.arange(24.0).reshape(4, 6)
    yield "strides", t.clone(), (t * 2).t().contiguous().t()
    yield "dense", torch.zeros(4, 12)[:, ::2], torch.ones(4, 12)[:, ::2]
    yield "no kernel", t.clone(), t.double() * 2
    yield "no kernel", t.to(torch.float8_e4m3fn), (t * 2).to(torch.float8_e4m3fn)
    yield "no kernel", torch.zeros(5, dtype=torch.complex64), torch.ones(5, dtype=torch.complex64) * (1 + 2j)
    yield "no kernel", torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int32)
    yield "strides", torch.zeros(4, 6), torch.ones(1, 6).expand(4, 6)
    yield "conjugate", torch.zeros(5, dtype=torch.complex64).conj().imag, torch.ones(5)
    yield "element size", torch.zeros(41, dtype=torch.uint8)[1:].view(torch.int8)[:40], torch.ones(40, dtype=torch.int8)


@pytest.mark.parametrize(("why", "teacher", "student"), list(ineligible_pairs())[:-1])
def test_the_reference_updates_ineligible_pairs_in_the_same_call(why, teacher, student):
    skip_unless_selectable(teacher.dtype)
    easy_t, easy_s = torch.zeros(100), torch.ones(100)
    want = teacher.clone()
    want.copy_(reference.lerp(teacher, student, 0.25) if teacher.dtype != torch.int64 else student)
    plan, _ = planned(pair_lists([easy_t, teacher], [easy_s, student]))
    assert why in plan.describe()
    assert "teacher_tensors[1]" in plan.describe()
    ema_update_([easy_t, teacher], [easy_s, student], 0.75)
    assert torch.equal(teacher.to(torch.complex128), want.to(torch.complex128))
    assert torch.equal(easy_t, torch.full((100,), 0.25))


def test_dense_layouts_take_the_fast_path():
    layouts = {
        "contiguous": torch.randn(2, 3, 4, 5),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(6, 4).t(),
        "one by one": torch.randn(8, 3, 1, 1).to(memory_format=torch.channels_last),
    }
    students = {name: torch.randn_like(tensor) for name, tensor in layouts.items()}
    students["one by one"] = torch.randn(8, 3, 1, 1)  # strides differ only in dimensions of size 1
    plan, _ = planned(pair_lists(list(layouts.values()), list(students.values())))
    assert not plan.ineligible
    for name, tensor in layouts.items():
        want = lerp(tensor, students[name], 0.9)
        ema_update_([tensor], [students[name]], 0.9)
        assert_same_bits(tensor, want, name)


def test_a_channels_last_teacher_of_a_contiguous_student():
    student = torch.randn(2, 3, 4, 5)
    teacher = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    want = lerp(teacher, student, 0.9)
    ema_update_([teacher], [student], 0.9)
    assert_same_bits(teacher, want)
