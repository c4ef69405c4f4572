// The body of the CUDA kernel. A host compiler takes it too (tests/host_kernel.cpp runs it under sanitizers): what is
// CUDA's alone is the inline PTX of the accesses below.
#pragma once

#include "chunk.h"
#include "ema_math.h"
#include "eman_update.h"

namespace eman {

// benchmarks/variants.cu is the plain kernel alone, with other numbers than these.
#if !defined(EMAN_THREADS)
#define EMAN_THREADS 256
#endif
#if !defined(EMAN_IN_FLIGHT)
#define EMAN_IN_FLIGHT 1
#endif
constexpr int kThreads = EMAN_THREADS;
// The pairs of vectors that a thread of the plain kernel loads before it stores the first. With one, the 8 blocks of an
// SM have 64 KB in flight, where 25 KB keep the memory of an H200 busy (4.8 TB/s for 700 ns, over 132 SMs); two take
// 38 to 43 registers, which leave room for 5 or 6 blocks. Measured there, two and four gain nothing.
constexpr int kInFlight = EMAN_IN_FLIGHT;

struct alignas(16) Words {
  uint32_t x, y, z, w;
};

// An address out of a table is generic to the compiler (LD.E). These say that it is global (LDG.E), and that what is
// read only is not written while we run (.nc). Nothing here is read twice, but L1::no_allocate costs 3 to 6 % (H200).
#if defined(__CUDA_ARCH__)
#define EMAN_ACCESSES(TYPE, PTX, REGISTER)                                              \
  __device__ __forceinline__ void load_read_only(TYPE& v, uint64_t address) {           \
    asm("ld.global.nc." PTX " %0, [%1];" : "=" REGISTER(v) : "l"(address));             \
  }                                                                                     \
  __device__ __forceinline__ void load(TYPE& v, uint64_t address) {                     \
    asm volatile("ld.global." PTX " %0, [%1];" : "=" REGISTER(v) : "l"(address));       \
  }                                                                                     \
  __device__ __forceinline__ void store(uint64_t address, TYPE v) {                     \
    asm volatile("st.global." PTX " [%0], %1;" ::"l"(address), REGISTER(v) : "memory"); \
  }
EMAN_ACCESSES(uint16_t, "u16", "h")
EMAN_ACCESSES(uint32_t, "u32", "r")
EMAN_ACCESSES(uint64_t, "u64", "l")
#undef EMAN_ACCESSES

// PTX has no 8-bit register.
__device__ __forceinline__ void load_read_only(uint8_t& v, uint64_t address) {
  uint16_t wide;
  asm("ld.global.nc.u8 %0, [%1];" : "=h"(wide) : "l"(address));
  v = static_cast<uint8_t>(wide);
}
__device__ __forceinline__ void load(uint8_t& v, uint64_t address) {
  uint16_t wide;
  asm volatile("ld.global.u8 %0, [%1];" : "=h"(wide) : "l"(address));
  v = static_cast<uint8_t>(wide);
}
__device__ __forceinline__ void store(uint64_t address, uint8_t v) {
  asm volatile("st.global.u8 [%0], %1;" ::"l"(address), "h"(static_cast<uint16_t>(v)) : "memory");
}

__device__ __forceinline__ void load_read_only(Words& v, uint64_t address) {
  asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
}
__device__ __forceinline__ void load(Words& v, uint64_t address) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
}
__device__ __forceinline__ void store(uint64_t address, const Words& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
#else
template <typename W>
EMAN_FN void load_read_only(W& v, uint64_t address) {
  v = *reinterpret_cast<const W*>(address);
}
template <typename W>
EMAN_FN void load(W& v, uint64_t address) {
  v = *reinterpret_cast<const W*>(address);
}
template <typename W>
EMAN_FN void store(uint64_t address, const W& v) {
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

template <typename T, int kN>
struct Elements {
  T at[kN];
  using Word = typename WordOf<sizeof(T) * kN>::type;
  EMAN_FN void from(const Word& word) { memcpy(at, &word, sizeof at); }
  EMAN_FN Word word() const {
    Word word;
    memcpy(&word, at, sizeof at);
    return word;
  }
};

template <int kNumber>
using Constant = std::integral_constant<int, kNumber>;

// Calls visit(kN, kCount, first) for kCount times kN neighbouring elements that are this thread's, kThreads * kN apart.
// The wider of a mixed pair takes 16-byte accesses and the narrower 8-byte ones: had both 16, a warp's request for the
// wider one would touch every 32-byte sector twice.
template <typename T, typename S, int kAtOnce, typename Visit>
__device__ __forceinline__ void for_elements(const Chunk& chunk, Visit visit) {
  constexpr uint32_t kVector = 16 / (sizeof(T) > sizeof(S) ? sizeof(T) : sizeof(S));
  const uint32_t vectors = chunk.flags & kVector16 ? chunk.numel / kVector : 0;
  uint32_t done = 0;
  if constexpr (kAtOnce > 1) {
    // All threads of a block or none: a warp waits for itself in there.
    for (; done + kAtOnce * kThreads <= vectors; done += kAtOnce * kThreads) {
      visit(Constant<kVector>(), Constant<kAtOnce>(), (done + threadIdx.x) * kVector);
    }
  }
  for (uint32_t v = done + threadIdx.x; v < vectors; v += kThreads) {
    visit(Constant<kVector>(), Constant<1>(), v * kVector);
  }
  for (uint32_t i = vectors * kVector + threadIdx.x; i < chunk.numel; i += kThreads) {
    visit(Constant<1>(), Constant<1>(), i);
  }
}

// One teacher, rounded to nearest: all that most updates are.
template <typename Rule>
__device__ __forceinline__ void update_chunk(const Chunk& chunk, const Rule& rule) {
  using T = typename Rule::Teacher;
  using S = typename Rule::Student;
  if (rule.rests()) return;
  for_elements<T, S, kInFlight>(chunk, [&](auto n, auto count, uint32_t first) {
    constexpr int kN = decltype(n)::value, kCount = decltype(count)::value;
    const uint64_t teacher_address = chunk.teacher + uint64_t{first} * sizeof(T);
    const uint64_t student_address = chunk.student + uint64_t{first} * sizeof(S);
    Elements<T, kN> teacher;
    Elements<S, kN> student;
    typename Elements<T, kN>::Word teacher_words[kCount];
    typename Elements<S, kN>::Word student_words[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      load_read_only(student_words[k], student_address + k * kThreads * sizeof student);
      if (Rule::kReadsTeacher) load(teacher_words[k], teacher_address + k * kThreads * sizeof teacher);
    }
    // Without it the assembler puts a store between the loads.
    if (kCount > 1) __syncwarp();
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      student.from(student_words[k]);
      if (Rule::kReadsTeacher) teacher.from(teacher_words[k]);
#pragma unroll
      for (int i = 0; i < kN; ++i) teacher.at[i] = rule(teacher.at[i], student.at[i]);
      store(teacher_address + k * kThreads * sizeof teacher, teacher.word());
    }
  });
}

template <typename Low, int kN>
__device__ __forceinline__ void store_copy(uint64_t address, const Elements<float, kN>& teacher) {
  Elements<Low, kN> low;
#pragma unroll
  for (int i = 0; i < kN; ++i) low.at[i] = narrow<Low>(teacher.at[i]);
  store(address, low.word());
}

// All that an update can be. The student's elements are read once for all teachers, and each teacher's before they are
// needed: with the student's, or before the teacher's before it is computed. Returns how many were skipped.
template <typename Rule>
__device__ __forceinline__ uint32_t update_piece(const Chunk* records, Rule rule, const Call& call,
                                                 const Philox& philox) {
  using T = typename Rule::Teacher;
  using S = typename Rule::Student;
  uint32_t skipped = 0;
  rule.heals = call.skip_nonfinite;
  const uint64_t first_student = records[0].student, first_teacher = records[0].teacher;
  for_elements<T, S, 1>(records[0], [&](auto n, auto, uint32_t first) {
    constexpr int kN = decltype(n)::value;
    const uint64_t offset = uint64_t{first} * sizeof(T);
    Elements<S, kN> student;
    typename Elements<S, kN>::Word student_word;
    typename Elements<T, kN>::Word teacher_word;
    load_read_only(student_word, first_student + uint64_t{first} * sizeof(S));
    load(teacher_word, first_teacher + offset);
    student.from(student_word);
    uint32_t kept = 0;  // a bit each
    if (call.skip_nonfinite) {
#pragma unroll
      for (int i = 0; i < kN; ++i) kept |= is_finite(student.at[i]) ? 0u : 1u << i;
      skipped += __popc(kept);
    }
    for (int k = 0; k < call.n_teachers; ++k) {
      const Chunk chunk = records[k];
      Elements<T, kN> was, teacher;
      was.from(teacher_word);
      if (k + 1 < call.n_teachers) load(teacher_word, records[k + 1].teacher + offset);
      rule.weight = call.weight(k);
      if (chunk.flags & kCopied) {
#pragma unroll
        for (int i = 0; i < kN; ++i) teacher.at[i] = rule.copied(student.at[i]);
      } else if (rule.rests()) {
        teacher = was;
      } else if (Rule::kRounds && call.stochastic) {
        const uint64_t number = chunk.extra + first;
        const Random random = philox(number / 8);
        // Where it is known to be 0, the words need not be chosen when running.
        const uint32_t from = kN == 8 ? 0 : static_cast<uint32_t>(number) % 8;
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          teacher.at[i] = rule.stochastic(was.at[i], student.at[i], random[(kN == 4 ? from & 4 : from) + i]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kN; ++i) teacher.at[i] = rule(was.at[i], student.at[i]);
      }
      if (kept != 0) {
#pragma unroll
        for (int i = 0; i < kN; ++i) teacher.at[i] = kept >> i & 1u ? was.at[i] : teacher.at[i];
      }
      store(chunk.teacher + offset, teacher.word());
      if constexpr (Rule::kCasts) {
        const uint64_t copy_address = chunk.extra + uint64_t{first} * sizeof(uint16_t);
        if (chunk.extra == 0) continue;
        if (chunk.flags & kCastToHalf) {
          store_copy<Half>(copy_address, teacher);
        } else {
          store_copy<BFloat16>(copy_address, teacher);
        }
      }
    }
  });
  return skipped;
}

template <typename U>
__device__ __forceinline__ void swap_chunk(const Chunk& chunk) {
  for_elements<U, U, 1>(chunk, [&](auto n, auto, uint32_t first) {
    typename Elements<U, decltype(n)::value>::Word teacher, student;
    const uint64_t offset = uint64_t{first} * sizeof(U);
    load(teacher, chunk.teacher + offset);
    load(student, chunk.student + offset);
    store(chunk.teacher + offset, student);
    store(chunk.student + offset, teacher);
  });
}

}  // namespace eman

// Each kernel: one block a piece of the student.
extern "C" __global__ void __launch_bounds__(eman::kThreads) eman_update(const __grid_constant__ eman::Call call) {
  using namespace eman;
  if (call.is_off()) return;
  const Chunk chunk = call.chunks[blockIdx.x];
  with_rule(chunk.pair, call.weight(0), [&](const auto& rule) { update_chunk(chunk, rule); });
}

#if !defined(EMAN_PLAIN_ONLY)
// 64 registers, so that no architecture spills: 4 blocks then lie on an SM, enough of them to keep memory busy.
extern "C" __global__ void __launch_bounds__(eman::kThreads, 1024 / eman::kThreads)
    eman_update_general(const __grid_constant__ eman::Call call) {
  using namespace eman;
  if (call.is_off()) return;
  const Chunk* records = call.chunks + int64_t{call.n_teachers} * blockIdx.x;
  const Philox philox = call.random();
  uint32_t skipped = 0;
  with_rule(records[0].pair, Weight(), [&](const auto& rule) { skipped = update_piece(records, rule, call, philox); });
  // Rare, so that nothing is gained by adding up a block's first.
  if (skipped != 0 && call.skipped != nullptr) atomicAdd(call.skipped, static_cast<unsigned long long>(skipped));
}

extern "C" __global__ void __launch_bounds__(eman::kThreads) eman_swap(const eman::Chunk* chunks) {
  using namespace eman;
  const Chunk chunk = chunks[blockIdx.x];
  with_width(chunk.pair, [&](auto element) { swap_chunk<decltype(element)>(chunk); });
}
#endif
