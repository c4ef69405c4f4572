"""The chunk table: which piece of which pair each thread block updates. csrc/chunk.h declares the same record in C++.

A pair is cut into chunks of equal size, and the rest at its end. Each chunk is a record of four 64-bit words:

    address of the teacher's elements | address of the student's | extra | number of elements, pair code, flags

extra is the address of the low-precision copy, or else the number of the first element (for stochastic rounding). If
several teachers follow one student, each chunk has one record per teacher, next to each other, so that the student's
elements are read once.
"""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from ..networks.pairing import Pair

# Elements per full chunk on a CPU, and bytes of the wider tensor per full chunk on a GPU (see elements_per_chunk).
CHUNK_SIZE, GPU_CHUNK_BYTES = 16384, 8192
MAX_TEACHERS = 8
# Flags of a record: every address is a multiple of 16 bytes; an "ema" record that copies; the low-precision copy is
# float16 instead of bfloat16.
VECTOR16, COPIED, CAST_TO_HALF = 1, 2, 4
PAIR_CODES = {
    ("ema", torch.float32, torch.float32): 0,
    ("ema", torch.float32, torch.bfloat16): 1,
    ("ema", torch.float32, torch.float16): 2,
    ("ema", torch.bfloat16, torch.bfloat16): 3,
    ("ema", torch.float16, torch.float16): 4,
    ("ema", torch.bfloat16, torch.float32): 5,
    ("ema", torch.float16, torch.float32): 6,
    ("ema", torch.float64, torch.float64): 7,
}
COPY_CODES = {1: 8, 2: 9, 4: 10, 8: 11}  # by bytes per element
HALF_DTYPES = (torch.bfloat16, torch.float16)


def elements_per_chunk(pair: Pair, chunk_bytes: int | None) -> int:
    """The number of elements in a full chunk of this pair. chunk_bytes: of the wider tensor, on a GPU; None on a CPU.

    On a GPU a full chunk is two rounds of a block's 256 threads with 16 bytes each: enough blocks to share the work
    evenly, while the record is 32 bytes of about 24,000. Measured on an H200 (benchmarks/variants.py, float32, time
    over that of a flat lerp): 1.03 for ResNet-50 and 1.01 for ViT-B; with chunks eight times as large 1.09 and 1.05,
    half as large 1.03 and 1.02. A power of two, so that all chunks of a tensor are aligned like the first one.
    """
    if chunk_bytes is None:
        return CHUNK_SIZE
    return chunk_bytes // max(pair.teacher.element_size(), pair.student.element_size())


def build_table(
    pairs: Sequence[Pair], n_teachers: int = 1, skip_nonfinite: bool = False, chunk_bytes: int | None = None
) -> Tensor:
    """The chunk records, int64 [n_pieces * n_teachers, 4]. chunk_bytes: as in elements_per_chunk.

    pairs: the pairs of one student tensor are adjacent, one per teacher.

    Full chunks come first: small chunks then fill the tail of the launch instead of opening it. Uses array and not
    torch, whose loops start OpenMP threads, for which a forked child process would wait forever.
    """
    full, ends = array("q"), []
    for bundle in (pairs[i : i + n_teachers] for i in range(0, len(pairs), n_teachers)):
        chunk = elements_per_chunk(bundle[0], chunk_bytes)
        n_full, rest = divmod(bundle[0].teacher.numel(), chunk)
        by_dtype = skip_nonfinite or any(pair.cast is not None for pair in bundle)
        columns, end = [], array("q")
        records = [_first_record(pair, by_dtype) for pair in bundle]
        # The kernels read this flag from the first teacher's record only, and apply it to all teachers.
        aligned = all(code >> 16 & VECTOR16 for _, _, code in records)
        for words, bytes_per_element, code in records:
            code = code if aligned else code & ~(VECTOR16 << 16)
            columns += [
                _arithmetic_sequence(word, chunk * size, n_full)
                for word, size in zip(words, bytes_per_element, strict=True)
            ]
            columns += [_arithmetic_sequence(chunk | code << 32, 0, n_full)]
            end.extend(word + n_full * chunk * size for word, size in zip(words, bytes_per_element, strict=True))
            end.append(rest | code << 32)
        rows = array("q", bytes(8 * len(columns) * n_full))
        for i, column in enumerate(columns):
            rows[i :: len(columns)] = column
        full += rows
        if rest:
            ends.append((rest, end))
    for _, end in sorted(ends, key=lambda end: -end[0]):
        full += end
    return torch.frombuffer(full, dtype=torch.int64).view(-1, 4) if full else torch.empty(0, 4, dtype=torch.int64)


def _arithmetic_sequence(first: int, step: int, count: int) -> array:
    return array("q", range(first, first + count * step, step)) if step else array("q", [first]) * count


def _first_record(pair: Pair, by_dtype: bool) -> tuple[tuple[int, int, int], tuple[int, int, int], int]:
    """The first three words of the pair's first chunk, by how much one element advances each, and the code with flags.

    by_dtype: distinguish copies of different dtypes of the same width.
    """
    teacher, student, cast = pair.teacher, pair.student, pair.cast
    code, extra, bytes_of_extra = find_pair_code(pair), 0, 0
    addresses = teacher.data_ptr() | student.data_ptr()
    if pair.rule == "copy" and teacher.is_floating_point() and by_dtype:
        code = PAIR_CODES["ema", teacher.dtype, teacher.dtype] | COPIED << 16
    if cast is not None:
        code |= (cast.dtype == torch.float16) * CAST_TO_HALF << 16
        extra, bytes_of_extra = cast.data_ptr(), 2
        addresses |= extra
    elif teacher.dtype in HALF_DTYPES:
        extra, bytes_of_extra = pair.first, 1
    code |= (addresses % 16 == 0) * VECTOR16 << 16
    sizes = teacher.element_size(), student.element_size(), bytes_of_extra
    return (teacher.data_ptr(), student.data_ptr(), extra), sizes, code


def find_pair_code(pair: Pair) -> int | None:
    """The pair's code in a chunk record; None if the kernels do not support it."""
    if pair.cast is not None and pair.teacher.dtype != torch.float32:
        return None
    if pair.rule == "ema":
        return PAIR_CODES.get(("ema", pair.teacher.dtype, pair.student.dtype))
    if pair.teacher.dtype != pair.student.dtype or pair.teacher.is_complex():
        return None
    return COPY_CODES.get(pair.teacher.element_size())
