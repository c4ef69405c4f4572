// The chunk record and its codes: everything that Python and C++ share.
//
// Python cuts each pair of tensors into chunks and writes one record per chunk into an int64 tensor [n_chunks, 4]. The
// CUDA kernel, the Triton kernel and the CPU code read the records from there: a CUDA block, a Triton program or an
// iteration of a CPU loop updates one chunk. tests/plan/test_chunks.py compares the layout and the codes of both sides.
#pragma once

#include <cstddef>
#include <cstdint>

namespace eman {

struct alignas(16) Chunk {
  uint64_t teacher;  // address of the first teacher element: read, then written
  uint64_t student;  // address of the first student element: read only, except by a swap
  // Two meanings, because no teacher needs both.
  // float teacher: the address of its low-precision copy, which is written too, or 0 without one.
  // Half-precision teacher: the number of the chunk's first element among all elements of the update, a multiple of 8.
  // Stochastic rounding draws by this number, so the random bits do not depend on how tensors are cut into chunks.
  uint64_t extra;
  // 1 or more elements; the plan chooses the size. Full chunks have a multiple of 16 elements, so that all chunks of a
  // tensor have the alignment of its first.
  uint32_t numel;
  uint16_t pair;   // the rule and both dtypes: one of the codes below
  uint16_t flags;  // the constants below, combined by |
};
static_assert(sizeof(Chunk) == 32 && offsetof(Chunk, numel) == 24, "Python writes this layout");

// All addresses in the records of this piece of a student (one record per teacher) are multiples of 16, so that 16-byte
// vector accesses are allowed. The kernels read the flag of the first record only.
constexpr uint16_t kVector16 = 1;
// The pair has the code of an average but is copied. Copies usually have a code that states only the element width.
// This flag is for those that need the dtype: to write a low-precision copy or to find NaNs.
constexpr uint16_t kCopied = 2;
// The low-precision copy is float16. Without this flag it is bfloat16.
constexpr uint16_t kCastToHalf = 4;

// If several teachers follow one student, each piece of the student has one record per teacher, in consecutive rows of
// the table. The pieces' student addresses, sizes and codes are then equal, and the student is read only once.
constexpr int kMaxTeachers = 8;

// The averages: NAME(code, teacher type, student type). ema_math.h defines the types.
#define EMAN_EMA_PAIRS(NAME)  \
  NAME(0, float, float)       \
  NAME(1, float, BFloat16)    \
  NAME(2, float, Half)        \
  NAME(3, BFloat16, BFloat16) \
  NAME(4, Half, Half)         \
  NAME(5, BFloat16, float)    \
  NAME(6, Half, float)        \
  NAME(7, double, double)

// The copies, by element width only: NAME(code, element type).
#define EMAN_COPY_PAIRS(NAME) \
  NAME(8, uint8_t)            \
  NAME(9, uint16_t)           \
  NAME(10, uint32_t)          \
  NAME(11, uint64_t)

}  // namespace eman
