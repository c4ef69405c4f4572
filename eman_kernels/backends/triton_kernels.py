"""The Triton kernels: the update and the swap. Each program processes one piece of the student.

This module is imported at the first launch, because importing Triton takes longer than importing the whole package.
"""

import triton
import triton.language as tl


@triton.jit
def _ema(teacher, student, weight):
    """The average; csrc/ema_math.h explains this form. With a branch Triton would neither inline the function nor emit
    wide accesses."""
    near_teacher = weight < 0.5
    coefficient = tl.where(near_teacher, weight, weight - 1.0)
    difference = tl.where(weight == 1.0, 0.0, tl.where(student == teacher, 0.0, student - teacher))
    return tl.fma(coefficient, difference, tl.where(near_teacher, teacher, student))


@triton.jit
def _load_weight(momenta, weights, k: tl.constexpr, REAL: tl.constexpr):
    """1 minus the momentum that is stored on the device, if there is one, else the sum of three floats."""
    if momenta is not None:
        weight = (1.0 - tl.load(momenta + k).to(tl.float64)).to(REAL)
    else:
        high, middle, low = weights[k]
        weight = tl.cast(high, REAL)
        if REAL.is_fp64():
            weight = weight + tl.cast(middle, REAL) + tl.cast(low, REAL)
    return weight


@triton.jit
def _update_elements(teacher, student, weight, mask, REAL: tl.constexpr, AVERAGED: tl.constexpr):
    """Update a block of elements, given by pointers. Accesses are wide only without a mask (None)."""
    followed = tl.load(student, mask=mask)
    if AVERAGED:
        average = _ema(tl.load(teacher, mask=mask).to(REAL), followed.to(REAL), weight)
        tl.store(teacher, average.to(teacher.dtype.element_ty), mask=mask)
    else:
        tl.store(teacher, followed, mask=mask)


@triton.jit
def _draw(group, column, seed, step):
    """16 random bits per element, for rows of eight elements. Each row is a group in the sense of csrc/ema_math.h's
    Random."""
    if step.dtype.is_ptr():
        step = tl.load(step)
    key = (step.to(tl.uint64) << 32) | (seed.to(tl.uint64) & 0xFFFFFFFF)
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(key, low, high, low * 0, low * 0)
    word = tl.where(column >= 4, tl.where(column >= 6, d, c), tl.where(column >= 2, b, a))
    return (word >> (column % 2 * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def _round_stochastically(average, random, T: tl.constexpr):
    """narrow_stochastic of csrc/ema_math.h, which explains the constants."""
    bits = average.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if T.is_bf16():
        rounded = tl.where(magnitude > 0x7F800000, 0x7FC0, (bits + random) >> 16)
    else:
        is_subnormal = magnitude < 113 << 23
        small = tl.where(is_subnormal, tl.abs(average) * 1099511627776.0, 0.0)  # 2^40
        subnormal = (small.to(tl.uint32) + random) >> 16
        normal = (magnitude - (112 << 23) + (random >> 3)) >> 13
        infinite_or_nan = tl.where(magnitude > 0x7F800000, 0x7E00, 0x7C00)
        rounded = tl.where(magnitude >= 143 << 23, infinite_or_nan, tl.where(is_subnormal, subnormal, normal))
        rounded |= (bits >> 16) & 0x8000
    return rounded.to(tl.uint16).to(T, bitcast=True)


@triton.jit
def _update_rows(records, student, first, numel, arguments, ROWS: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
                 REAL: tl.constexpr, AVERAGED: tl.constexpr, GENERAL: tl.constexpr):  # fmt: skip
    """Update rows of eight elements for all teachers. The student's elements are read once. Returns which were skipped.

    numel: None if all elements of the block exist and all addresses allow 16-byte accesses.
    """
    momenta, weights, _, seed, step, _ = arguments
    TEACHERS: tl.constexpr = GENERAL[0]
    STOCHASTIC: tl.constexpr = GENERAL[1]
    SKIPS: tl.constexpr = GENERAL[2]
    CASTS: tl.constexpr = GENERAL[3]
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, 8)[None, :]
    at = first + row * 8 + column
    mask = None if numel is None else at < numel
    followed = tl.load(student + at, mask=mask)
    keeps = at < 0
    if SKIPS and S.is_floating():
        wide = followed.to(REAL)
        keeps = (wide - wide) != 0.0
        if numel is not None:
            keeps = keeps & mask
    for k in tl.static_range(TEACHERS):
        teacher = tl.load(records + 4 * k).to(tl.pointer_type(T))
        if numel is None:
            teacher = tl.multiple_of(teacher, 16)
        if AVERAGED:
            extra = tl.load(records + 4 * k + 2)
            flags = tl.load(records + 4 * k + 3) >> 48  # 1: kVector16, 2: kCopied, 4: kCastToHalf
            old = tl.load(teacher + at, mask=mask)
            start = old.to(REAL)
            if SKIPS:
                # The student's value replaces a teacher's that is not finite.
                start = tl.where((start - start) != 0.0, followed.to(REAL), start)
            weight = _load_weight(momenta, weights, k, REAL)
            average = _ema(start, followed.to(REAL), weight)
            if STOCHASTIC and (T.is_bf16() or T.is_fp16()):
                group = (extra + first).to(tl.uint64) // 8 + row.to(tl.uint64)
                new = _round_stochastically(average, _draw(group, column, seed, step), T)
            else:
                new = average.to(T)
            # At momentum 1 even a NaN keeps its bits.
            new = tl.where(weight == 0.0, old, new)
            new = tl.where(flags & 2 != 0, followed.to(REAL).to(T), new)
            if SKIPS:
                new = tl.where(keeps, old, new)
            tl.store(teacher + at, new, mask=mask)
            if CASTS and T.is_fp32() and extra != 0:
                if flags & 4 != 0:
                    _store_copy(extra, at, new, mask, tl.float16)
                else:
                    _store_copy(extra, at, new, mask, tl.bfloat16)
        else:
            tl.store(teacher + at, followed, mask=mask)
    return keeps.to(tl.int32)


@triton.jit
def _store_copy(address, at, teacher, mask, LOW: tl.constexpr):
    copy = address.to(tl.pointer_type(LOW))
    if mask is None:
        copy = tl.multiple_of(copy, 16)
    tl.store(copy + at, teacher.to(LOW), mask=mask)


@triton.jit
def _update_chunk(records, arguments, T: tl.constexpr, S: tl.constexpr, REAL: tl.constexpr, AVERAGED: tl.constexpr,
                  GENERAL: tl.constexpr, THREADS: tl.constexpr):  # fmt: skip
    """Update a piece of the student, whose pair has these types. arguments: numbers, or pointers to them."""
    momenta, weights, found_inf, _, _, skipped = arguments
    student = tl.load(records + 1).to(tl.pointer_type(S))
    packed = tl.load(records + 3)
    numel = (packed & 0xFFFFFFFF).to(tl.int32)
    if found_inf is not None:
        numel = tl.where(tl.load(found_inf) != 0, 0, numel)
    done = numel * 0
    # The elements of a round: per thread, 16 bytes of the wider type. The hint that addresses are multiples of 16 is
    # given for the pointers below; given for an integer address, it would be lost in the cast to a pointer.
    WIDE: tl.constexpr = THREADS * 128 // max(T.primitive_bitwidth, S.primitive_bitwidth)
    if GENERAL is None:
        teacher = tl.load(records).to(tl.pointer_type(T))
        weight = 0.0
        if AVERAGED:
            weight = _load_weight(momenta, weights, 0, REAL)
            # At momentum 1 nothing is written.
            numel = tl.where(weight == 0.0, 0, numel)
        if (packed >> 48) & 1 != 0:
            aligned_teacher = tl.multiple_of(teacher, 16)
            aligned_student = tl.multiple_of(student, 16)
            done = numel // WIDE * WIDE
            for first in range(0, done, WIDE):
                at = first + tl.arange(0, WIDE)
                _update_elements(aligned_teacher + at, aligned_student + at, weight, None, REAL, AVERAGED)
        for first in range(done, numel, THREADS):
            at = first + tl.arange(0, THREADS)
            _update_elements(teacher + at, student + at, weight, at < numel, REAL, AVERAGED)
    else:
        count = tl.zeros([WIDE // 8, 8], tl.int32)
        if (packed >> 48) & 1 != 0:
            aligned = tl.multiple_of(student, 16)
            done = numel // WIDE * WIDE
            for first in range(0, done, WIDE):
                count += _update_rows(
                    records, aligned, first, None, arguments, WIDE // 8, T, S, REAL, AVERAGED, GENERAL
                )
        tail = tl.zeros([THREADS // 8, 8], tl.int32)
        for first in range(done, numel, THREADS):
            tail += _update_rows(records, student, first, numel, arguments, THREADS // 8, T, S, REAL, AVERAGED, GENERAL)
        if skipped is not None and S.is_floating():
            both = tl.sum(count) + tl.sum(tail)
            tl.atomic_add(skipped, both.to(tl.int64), mask=both > 0)


@triton.jit(do_not_specialize=["seed", "step"])
def eman_update(table, momenta, weights, found_inf, seed, step, skipped, GENERAL: tl.constexpr,
                THREADS: tl.constexpr):  # fmt: skip
    """One program per piece of the student. csrc/chunk.h defines the records and the codes, csrc/eman_update.h the
    arguments. GENERAL: None for the plain update, else (n_teachers, stochastic, skip_nonfinite, casts).
    """
    arguments = (momenta, weights, found_inf, seed, step, skipped)
    records = table + tl.program_id(0).to(tl.int64) * (4 if GENERAL is None else 4 * GENERAL[0])
    pair = ((tl.load(records + 3) >> 32) & 0xFFFF).to(tl.int32)
    if pair == 0:
        _update_chunk(records, arguments, tl.float32, tl.float32, tl.float32, True, GENERAL, THREADS)
    elif pair == 1:
        _update_chunk(records, arguments, tl.float32, tl.bfloat16, tl.float32, True, GENERAL, THREADS)
    elif pair == 2:
        _update_chunk(records, arguments, tl.float32, tl.float16, tl.float32, True, GENERAL, THREADS)
    elif pair == 3:
        _update_chunk(records, arguments, tl.bfloat16, tl.bfloat16, tl.float32, True, GENERAL, THREADS)
    elif pair == 4:
        _update_chunk(records, arguments, tl.float16, tl.float16, tl.float32, True, GENERAL, THREADS)
    elif pair == 5:
        _update_chunk(records, arguments, tl.bfloat16, tl.float32, tl.float32, True, GENERAL, THREADS)
    elif pair == 6:
        _update_chunk(records, arguments, tl.float16, tl.float32, tl.float32, True, GENERAL, THREADS)
    elif pair == 7:
        _update_chunk(records, arguments, tl.float64, tl.float64, tl.float64, True, GENERAL, THREADS)
    elif pair == 8:
        _update_chunk(records, arguments, tl.uint8, tl.uint8, tl.uint8, False, GENERAL, THREADS)
    elif pair == 9:
        _update_chunk(records, arguments, tl.uint16, tl.uint16, tl.uint16, False, GENERAL, THREADS)
    elif pair == 10:
        _update_chunk(records, arguments, tl.uint32, tl.uint32, tl.uint32, False, GENERAL, THREADS)
    elif pair == 11:
        _update_chunk(records, arguments, tl.uint64, tl.uint64, tl.uint64, False, GENERAL, THREADS)


@triton.jit
def _exchange(teacher, student, at, mask):
    was = tl.load(teacher + at, mask=mask)
    tl.store(teacher + at, tl.load(student + at, mask=mask), mask=mask)
    tl.store(student + at, was, mask=mask)


@triton.jit
def _swap_chunk(record, U: tl.constexpr, THREADS: tl.constexpr):
    teacher = tl.load(record).to(tl.pointer_type(U))
    student = tl.load(record + 1).to(tl.pointer_type(U))
    packed = tl.load(record + 3)
    numel = (packed & 0xFFFFFFFF).to(tl.int32)
    done = numel * 0
    if (packed >> 48) & 1 != 0:
        aligned_teacher = tl.multiple_of(teacher, 16)
        aligned_student = tl.multiple_of(student, 16)
        WIDE: tl.constexpr = THREADS * 128 // U.primitive_bitwidth
        done = numel // WIDE * WIDE
        for first in range(0, done, WIDE):
            _exchange(aligned_teacher, aligned_student, first + tl.arange(0, WIDE), None)
    for first in range(done, numel, THREADS):
        at = first + tl.arange(0, THREADS)
        _exchange(teacher, student, at, at < numel)


@triton.jit
def eman_swap(table, THREADS: tl.constexpr):
    """One program per chunk. The pair codes are those of copies."""
    record = table + tl.program_id(0).to(tl.int64) * 4
    pair = ((tl.load(record + 3) >> 32) & 0xFFFF).to(tl.int32)
    if pair == 8:
        _swap_chunk(record, tl.uint8, THREADS)
    elif pair == 9:
        _swap_chunk(record, tl.uint16, THREADS)
    elif pair == 10:
        _swap_chunk(record, tl.uint32, THREADS)
    elif pair == 11:
        _swap_chunk(record, tl.uint64, THREADS)
