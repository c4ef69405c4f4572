// The bodies of the CUDA kernels. They also compile as host C++, which tests/backends/host_kernel.cpp runs under
// sanitizers: only the inline PTX of the memory accesses below is specific to CUDA.
#pragma once

#include "chunk.h"
#include "ema_math.h"
#include "eman_update.h"

namespace eman {

// benchmarks/variants.cu compiles the plain kernel with other values of these.
#if !defined(EMAN_THREADS)
#define EMAN_THREADS 256
#endif
#if !defined(EMAN_IN_FLIGHT)
#define EMAN_IN_FLIGHT 1
#endif
constexpr int kThreads = EMAN_THREADS;
// How many pairs of vectors (teacher and student) a thread of the plain kernel loads before it stores the first result.
// With one, the 8 blocks on an SM have 64 KB of loads in flight. CUB's tuning of memory-bound kernels asks for 32 KB on
// an H100, 48 KB on an H200 and 64 KB on a B200. Two take 38 to 43 registers, with which only 5 or 6 blocks fit on an
// SM. Measured on an H200, two and four gain nothing.
constexpr int kInFlight = EMAN_IN_FLIGHT;

struct alignas(16) Words {
  uint32_t x, y, z, w;
};

// The addresses come from a table, so the compiler cannot know that they point to global memory and would emit generic
// accesses (LD.E in the machine code). The inline PTX says that they are global (LDG.E), and that the student is not
// written while the kernel runs (.nc, which allows the read-only cache). No byte is read twice, but the hint
// L1::no_allocate costs 3 to 6 % (H200).
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

// PTX has no 8-bit registers, so bytes are loaded and stored through 16-bit ones.
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

// The integer type that one memory access of this many bytes loads or stores.
template <size_t kBytes>
struct WordOf;
// clang-format off
template <> struct WordOf<1> { using type = uint8_t; };
template <> struct WordOf<2> { using type = uint16_t; };
template <> struct WordOf<4> { using type = uint32_t; };
template <> struct WordOf<8> { using type = uint64_t; };
template <> struct WordOf<16> { using type = Words; };
// clang-format on

// kN neighboring elements that are loaded or stored as one word.
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

// Passes a number to a generic lambda such that it is a compile-time constant there.
template <int kNumber>
using Constant = std::integral_constant<int, kNumber>;

// Divides the elements of a chunk among the block's threads. Calls visit(kN, kCount, first) for kCount vectors of kN
// neighboring elements each: the first vector begins at element `first`, the next ones kThreads * kN elements further
// on.
//
// Neighboring threads get neighboring vectors, so that a warp's accesses are coalesced. If the chunk is aligned
// (kVector16), most of it is visited in vectors, and the last numel % kVector elements one by one. Otherwise all
// elements are visited one by one. In a pair of different widths, the wider type gets 16-byte accesses and the narrower
// 8-byte ones: with 16 bytes for both, a warp's request for the wider type would touch every 32-byte sector twice.
template <typename T, typename S, int kAtOnce, typename Visit>
__device__ __forceinline__ void for_elements(const Chunk& chunk, Visit visit) {
  constexpr uint32_t kVector = 16 / (sizeof(T) > sizeof(S) ? sizeof(T) : sizeof(S));
  const uint32_t vectors = chunk.flags & kVector16 ? chunk.numel / kVector : 0;
  uint32_t done = 0;
  if constexpr (kAtOnce > 1) {
    // All threads of the block run this loop equally often, because visit synchronizes each warp.
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

// The plain update: one teacher, rounded to nearest. Most updates are of this kind.
template <typename Rule>
__device__ __forceinline__ void update_chunk(const Chunk& chunk, const Rule& rule) {
  using T = typename Rule::Teacher;
  using S = typename Rule::Student;
  if (rule.is_noop()) return;
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
    // Without this barrier the assembler moves a store between the loads.
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

// The random bits for two vectors of four elements, which are kThreads * 4 elements apart. `number`: the number of the
// first one's first element (see Chunk::extra). Philox gives the bits of a group of eight elements, which two
// neighboring lanes have together. So each lane calls it for one of its two vectors only, and passes the half that it
// does not need to its neighbor. All lanes of a warp must call this.
__device__ __forceinline__ void draw_in_pairs(const Philox& philox, uint64_t number, Random (&random)[2]) {
  const auto draw = [&](bool second) { return philox((number + (second ? kThreads * 4 : 0)) / 8); };
  const bool is_upper = number & 4;  // whether this lane has the upper halves of both groups
  const Random drawn = draw(is_upper);
#if defined(__CUDA_ARCH__)
  const uint32_t low = __shfl_xor_sync(0xFFFFFFFFu, is_upper ? drawn.words[0] : drawn.words[2], 1);
  const uint32_t high = __shfl_xor_sync(0xFFFFFFFFu, is_upper ? drawn.words[1] : drawn.words[3], 1);
#else
  // On the host one thread runs after the other, so this computes what the neighbor would pass.
  const Random neighbors = draw(!is_upper);
  const uint32_t low = neighbors.words[is_upper ? 2 : 0], high = neighbors.words[is_upper ? 3 : 1];
#endif
  // Half of a group is enough, because Random selects the half by the element's number.
  const Random passed = {{low, high, low, high}};
  random[0] = is_upper ? passed : drawn;
  random[1] = is_upper ? drawn : passed;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kIsTuring = true;
#else
constexpr bool kIsTuring = false;
#endif

// The general update: stochastic rounding, low-precision copies, skipping of NaNs, several teachers. A thread loads two
// vectors of the student and two of the teacher before it computes the first: the 4 blocks on an SM then have 48 or
// 64 KB in flight. The student's elements are read once for all teachers. Each further teacher's loads are issued when
// the previous teacher's values have arrived, before those are computed, so each teacher costs one latency of the
// memory.
template <bool kSeveral, typename Rule>
__device__ __forceinline__ void update_piece(const Chunk* records, const Chunk& first_record, Rule rule,
                                             const Arguments& arguments) {
  using T = typename Rule::Teacher;
  using S = typename Rule::Student;
  const int n_teachers = kSeveral ? arguments.n_teachers : 1;
  const bool stochastic = Rule::kRounds && arguments.stochastic;
  rule.replaces_nonfinite = arguments.skip_nonfinite;
  // With several teachers, only one vector of eight elements fits into the registers, and on sm_75 one of any type.
  constexpr int kAtOnce = kSeveral && (kIsTuring || (sizeof(T) == 2 && sizeof(S) == 2)) ? 1 : 2;
  for_elements<T, S, kAtOnce>(first_record, [&](auto n, auto count, uint32_t first) {
    constexpr int kN = decltype(n)::value, kCount = decltype(count)::value;
    constexpr uint64_t kApart = uint64_t{kThreads} * kN;
    typename Elements<S, kN>::Word student_words[kCount];
    typename Elements<T, kN>::Word teacher_words[kCount];
    const auto load_teacher = [&](uint64_t address) {
#pragma unroll
      for (int v = 0; v < kCount; ++v) load(teacher_words[v], address + (first + v * kApart) * sizeof(T));
    };
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      load_read_only(student_words[v], first_record.student + (first + v * kApart) * sizeof(S));
    }
    load_teacher(first_record.teacher);
    // As in update_chunk: all loads before the first use.
    if (kCount > 1) __syncwarp();
    uint32_t kept = 0;  // bit v * kN + i: element i of vector v is not finite in the student: the teachers keep theirs
    if (arguments.skip_nonfinite) {
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        Elements<S, kN> student;
        student.from(student_words[v]);
#pragma unroll
        for (int i = 0; i < kN; ++i) kept |= is_finite(student.at[i]) ? 0u : 1u << (v * kN + i);
      }
      // This is rare, so that summing over the block first would gain nothing.
      if (kept != 0 && arguments.skipped != nullptr) {
        atomicAdd(arguments.skipped, static_cast<unsigned long long>(__popc(kept)));
      }
    }
#pragma unroll 1
    for (int k = 0; k < n_teachers; ++k) {
      const Chunk chunk = kSeveral ? records[k] : first_record;
      Elements<T, kN> was[kCount];
#pragma unroll
      for (int v = 0; v < kCount; ++v) was[v].from(teacher_words[v]);
      if (k + 1 < n_teachers) load_teacher(records[k + 1].teacher);
      rule.weight = arguments.weight(k);
      // Read here and not at the beginning, where it would take registers.
      const Philox philox = stochastic ? arguments.random() : Philox{};
      const uint64_t number = chunk.extra + first;
      Random in_pairs[2];
      constexpr bool kInPairs = kN == 4 && kCount == 2;
      if (kInPairs && stochastic) draw_in_pairs(philox, number, in_pairs);
#pragma unroll
      for (int v = 0; v < kCount; ++v) {
        Elements<S, kN> student;
        Elements<T, kN> teacher;
        student.from(student_words[v]);
        const auto for_each = [&](auto compute) {
#pragma unroll
          for (int i = 0; i < kN; ++i) teacher.at[i] = compute(was[v].at[i], student.at[i], i);
        };
        if (chunk.flags & kCopied) {
          for_each([&](T, S s, int) { return rule.copied(s); });
        } else if (rule.is_noop()) {
          for_each([&](T t, S, int) { return t; });
        } else if (stochastic) {
          const Random random = kInPairs ? in_pairs[v] : philox((number + v * kApart) / 8);
          // Vectors of 8 or 4 elements begin at multiples of 8 or 4. This form tells the compiler so, which then
          // selects the words of `random` at compile time as far as possible.
          const uint32_t from = kN == 8 ? 0 : static_cast<uint32_t>(number) & (kN == 4 ? 4 : 7);
          for_each([&](T t, S s, int i) { return rule.stochastic(t, s, random[from + i]); });
        } else {
          for_each([&](T t, S s, int) { return rule(t, s); });
        }
        if (kept != 0) {
          for_each([&](T t, S, int i) { return kept >> (v * kN + i) & 1u ? t : teacher.at[i]; });
        }
        const uint64_t at = first + v * kApart;
        store(chunk.teacher + at * sizeof(T), teacher.word());
        if constexpr (Rule::kCasts) {
          const uint64_t copy_address = chunk.extra + at * sizeof(uint16_t);
          if (chunk.extra == 0) continue;
          if (chunk.flags & kCastToHalf) {
            store_copy<Half>(copy_address, teacher);
          } else {
            store_copy<BFloat16>(copy_address, teacher);
          }
        }
      }
    }
  });
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

// The kernels. Each block processes one piece of the student.
extern "C" __global__ void __launch_bounds__(eman::kThreads)
    eman_update(const __grid_constant__ eman::Arguments arguments) {
  using namespace eman;
  if (arguments.is_disabled()) return;
  const Chunk chunk = arguments.chunks[blockIdx.x];
  with_rule(chunk.pair, arguments.weight(0), [&](const auto& rule) { update_chunk(chunk, rule); });
}

#if !defined(EMAN_PLAIN_ONLY)
namespace eman {
template <bool kSeveral>
__device__ __forceinline__ void update_general(const Arguments& arguments) {
  if (arguments.is_disabled()) return;
  const Chunk* records = arguments.chunks + (kSeveral ? int64_t{arguments.n_teachers} : 1) * blockIdx.x;
  const Chunk first_record = records[0];
  with_rule(first_record.pair, Weight(),
            [&](const auto& rule) { update_piece<kSeveral>(records, first_record, rule, arguments); });
}
}  // namespace eman

// For one teacher and for several. At least 4 blocks per SM, which allows 64 registers, without spills.
extern "C" __global__ void __launch_bounds__(eman::kThreads, 1024 / eman::kThreads)
    eman_update_general(const __grid_constant__ eman::Arguments arguments) {
  eman::update_general<false>(arguments);
}
extern "C" __global__ void __launch_bounds__(eman::kThreads, 1024 / eman::kThreads)
    eman_update_several(const __grid_constant__ eman::Arguments arguments) {
  eman::update_general<true>(arguments);
}

extern "C" __global__ void __launch_bounds__(eman::kThreads) eman_swap(const eman::Chunk* chunks) {
  using namespace eman;
  const Chunk chunk = chunks[blockIdx.x];
  with_width(chunk.pair, [&](auto element) { swap_chunk<decltype(element)>(chunk); });
}
#endif
