// The body of the CUDA kernel. A host compiler takes it too (tests/host_kernel.cpp runs it under sanitizers): what is
// CUDA's alone is the inline PTX of the accesses below.
#pragma once

#include "chunk.h"
#include "ema_math.h"

namespace eman {

constexpr int kThreads = 256;

struct Params {
  const Chunk* chunks;
  Weight weight;
  // Where to read the momentum instead, or null: a captured graph can then replay with another one.
  const void* momentum;
  bool momentum_is_double;  // else float
};

struct alignas(16) Words {
  uint32_t x, y, z, w;
};

// An address out of a table is generic to the compiler (LD.E). These say that it is global (LDG.E), that the student is
// not written while we run (.nc), and that nothing here is read twice (L1::no_allocate).
#if defined(__CUDA_ARCH__)
#define EMAN_ACCESSES(TYPE, PTX, REGISTER)                                                        \
  __device__ __forceinline__ void load_student(TYPE& v, uint64_t address) {                       \
    asm("ld.global.nc.L1::no_allocate." PTX " %0, [%1];" : "=" REGISTER(v) : "l"(address));       \
  }                                                                                               \
  __device__ __forceinline__ void load_teacher(TYPE& v, uint64_t address) {                       \
    asm volatile("ld.global.L1::no_allocate." PTX " %0, [%1];" : "=" REGISTER(v) : "l"(address)); \
  }                                                                                               \
  __device__ __forceinline__ void store_teacher(uint64_t address, TYPE v) {                       \
    asm volatile("st.global." PTX " [%0], %1;" ::"l"(address), REGISTER(v) : "memory");           \
  }
EMAN_ACCESSES(uint16_t, "u16", "h")
EMAN_ACCESSES(uint32_t, "u32", "r")
EMAN_ACCESSES(uint64_t, "u64", "l")
#undef EMAN_ACCESSES

// PTX has no 8-bit register.
__device__ __forceinline__ void load_student(uint8_t& v, uint64_t address) {
  uint16_t wide;
  asm("ld.global.nc.L1::no_allocate.u8 %0, [%1];" : "=h"(wide) : "l"(address));
  v = static_cast<uint8_t>(wide);
}
__device__ __forceinline__ void load_teacher(uint8_t& v, uint64_t address) {
  uint16_t wide;
  asm volatile("ld.global.L1::no_allocate.u8 %0, [%1];" : "=h"(wide) : "l"(address));
  v = static_cast<uint8_t>(wide);
}
__device__ __forceinline__ void store_teacher(uint64_t address, uint8_t v) {
  asm volatile("st.global.u8 [%0], %1;" ::"l"(address), "h"(static_cast<uint16_t>(v)) : "memory");
}

__device__ __forceinline__ void load_student(Words& v, uint64_t address) {
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
}
__device__ __forceinline__ void load_teacher(Words& v, uint64_t address) {
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
}
__device__ __forceinline__ void store_teacher(uint64_t address, const Words& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
#else
template <typename W>
EMAN_FN void load_student(W& v, uint64_t address) {
  v = *reinterpret_cast<const W*>(address);
}
template <typename W>
EMAN_FN void load_teacher(W& v, uint64_t address) {
  v = *reinterpret_cast<const W*>(address);
}
template <typename W>
EMAN_FN void store_teacher(uint64_t address, const W& v) {
  *reinterpret_cast<W*>(address) = v;
}
#endif

// The word that carries so many bytes in one access.
template <size_t kBytes>
struct WordOf;
// clang-format off
template <> struct WordOf<1> { using type = uint8_t; };
template <> struct WordOf<2> { using type = uint16_t; };
template <> struct WordOf<4> { using type = uint32_t; };
template <> struct WordOf<8> { using type = uint64_t; };
template <> struct WordOf<16> { using type = Words; };
// clang-format on

// kN neighbouring elements, each tensor in one access.
template <int kN, typename Rule>
__device__ __forceinline__ void update_elements(const Chunk& chunk, uint32_t first, const Rule& rule) {
  using T = typename Rule::Teacher;
  using S = typename Rule::Student;
  T teacher[kN];
  S student[kN];
  typename WordOf<sizeof teacher>::type teacher_word;
  typename WordOf<sizeof student>::type student_word;
  const uint64_t teacher_address = chunk.teacher + uint64_t{first} * sizeof(T);

  load_student(student_word, chunk.student + uint64_t{first} * sizeof(S));
  memcpy(student, &student_word, sizeof student);
  if (Rule::kReadsTeacher) {
    load_teacher(teacher_word, teacher_address);
    memcpy(teacher, &teacher_word, sizeof teacher);
  }
#pragma unroll
  for (int i = 0; i < kN; ++i) teacher[i] = rule(teacher[i], student[i]);
  memcpy(&teacher_word, teacher, sizeof teacher);
  store_teacher(teacher_address, teacher_word);
}

__device__ __forceinline__ Weight weight_of(const Params& params) {
  if (params.momentum == nullptr) return params.weight;
  return Weight(params.momentum_is_double ? *static_cast<const double*>(params.momentum)
                                          : *static_cast<const float*>(params.momentum));
}

// The wider of a mixed pair takes 16-byte accesses and the narrower 8-byte ones: had both 16, a warp's request for the
// wider one would touch every 32-byte sector twice.
template <typename Rule>
__device__ __forceinline__ void update_chunk(const Chunk& chunk, const Rule& rule) {
  constexpr size_t kWidest = sizeof(typename Rule::Teacher) > sizeof(typename Rule::Student)
                                 ? sizeof(typename Rule::Teacher)
                                 : sizeof(typename Rule::Student);
  constexpr uint32_t kVector = 16 / kWidest;
  const uint32_t vectors = chunk.flags & kVector16 ? chunk.numel / kVector : 0;
  for (uint32_t v = threadIdx.x; v < vectors; v += kThreads) update_elements<kVector>(chunk, v * kVector, rule);
  for (uint32_t i = vectors * kVector + threadIdx.x; i < chunk.numel; i += kThreads) {
    update_elements<1>(chunk, i, rule);
  }
}

}  // namespace eman

// One block a chunk.
extern "C" __global__ void __launch_bounds__(eman::kThreads) eman_update(const __grid_constant__ eman::Params params) {
  using namespace eman;
  const Chunk chunk = params.chunks[blockIdx.x];
  const Weight weight = weight_of(params);
  with_rule(chunk.pair, weight, [&](const auto& rule) { update_chunk(chunk, rule); });
}
