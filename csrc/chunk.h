// The chunk record and its codes: all that Python and C++ share.
//
// eman_kernels/plan.py writes these records into an int64 tensor [n_chunks, 4]; the CUDA kernel, the Triton kernel
// and the CPU code read them as they lie. tests/test_plan.py holds both sides to the same layout and codes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace eman {

struct alignas(16) Chunk {
  uint64_t teacher;  // address of the first teacher element: read, then written
  uint64_t student;  // address of the first student element: read only
  // A float teacher's: address of its low-precision copy, which is written too, or 0. A half teacher's: the number of
  // its first element among all of the update's, by which stochastic rounding draws; a multiple of 8.
  uint64_t extra;
  // 1 or more elements; how many is the plan's affair. A tensor's chunks are a multiple of 16, so that all are aligned
  // as its first.
  uint32_t numel;
  uint16_t pair;   // a Pair: the rule and both dtypes
  uint16_t flags;  // those below
};
static_assert(sizeof(Chunk) == 32 && offsetof(Chunk, numel) == 24, "plan.py writes this layout");

// Every address takes 16-byte accesses.
constexpr uint16_t kVector16 = 1;
// The pair is copied, not averaged: for copies whose dtype matters, because of a low-precision copy or of NaNs.
constexpr uint16_t kCopied = 2;
// The low-precision copy is float16, not bfloat16.
constexpr uint16_t kCastToHalf = 4;

// Several teachers of one student: the records of one piece of the student stand behind one another, a teacher each.
constexpr int kMaxTeachers = 8;

// Every pair a chunk can have: NAME(code, teacher type, student type). The types are those of ema_math.h.
#define EMAN_EMA_PAIRS(NAME)  \
  NAME(0, float, float)       \
  NAME(1, float, BFloat16)    \
  NAME(2, float, Half)        \
  NAME(3, BFloat16, BFloat16) \
  NAME(4, Half, Half)         \
  NAME(5, BFloat16, float)    \
  NAME(6, Half, float)        \
  NAME(7, double, double)

// A copy knows only widths: NAME(code, element type).
#define EMAN_COPY_PAIRS(NAME) \
  NAME(8, uint8_t)            \
  NAME(9, uint16_t)           \
  NAME(10, uint32_t)          \
  NAME(11, uint64_t)

}  // namespace eman
