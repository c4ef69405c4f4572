// The update and the swap on CPU threads. They read the same chunk table as the CUDA kernels.
#include <algorithm>
#include <utility>

#include "chunk.h"
#include "ema_math.h"
#include "eman_update.h"

// One build has to run on any x86-64 machine, but the basic instruction set has no fma: each would be a call of a
// library function. So GCC compiles the marked functions three times, and the dynamic loader selects the best version
// for the machine. `flatten` inlines everything that is called in them, which is then compiled for the same
// instructions. Other compilers and architectures compile once, with the instructions that the flags allow.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && \
    !defined(EMAN_NO_CLONES)
#define EMAN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define EMAN_CLONES
#endif

namespace eman {
namespace {

template <typename Rule>
EMAN_FN void update_chunk(const Chunk& chunk, const Rule& rule) {
  auto* __restrict teacher = reinterpret_cast<typename Rule::Teacher*>(chunk.teacher);
  const auto* __restrict student = reinterpret_cast<const typename Rule::Student*>(chunk.student);
  if (rule.is_noop()) return;
  if (rule.copies()) {
    // Hoisted out of the loop below, where the rule would check for it in every element.
    for (uint32_t i = 0; i < chunk.numel; ++i) teacher[i] = rule.copied(student[i]);
  } else {
    for (uint32_t i = 0; i < chunk.numel; ++i) teacher[i] = rule(teacher[i], student[i]);
  }
}

EMAN_CLONES void update_chunk_of_any_pair(const Chunk& chunk, Weight weight) {
  with_rule(chunk.pair, weight, [&](const auto& rule) { update_chunk(chunk, rule); });
}

// Block size of the general update: each block is processed for all teachers, so that the student is read from memory
// only once.
constexpr uint32_t kBlock = 2048;

// Draws the 16 random bits of the elements number ... number + kBlock - 1; number is a multiple of 8. This is
// Philox::operator() for many groups. The loop over groups is the inner one, so that the compiler vectorizes it: with
// one group after the other the whole update takes five times as long.
EMAN_FN void draw(const Philox& philox, uint64_t number, uint16_t (&bits)[kBlock]) {
  constexpr uint32_t kGroups = kBlock / 8;
  uint32_t c0[kGroups], c1[kGroups], c2[kGroups], c3[kGroups];
  for (uint32_t i = 0; i < kGroups; ++i) {
    c0[i] = static_cast<uint32_t>(number / 8 + i);
    c1[i] = static_cast<uint32_t>((number / 8 + i) >> 32);
    c2[i] = c3[i] = 0;
  }
  uint32_t k0 = philox.seed, k1 = philox.step;
  for (int round = 0; round < Philox::kRounds; ++round, Philox::next(k0, k1)) {
    for (uint32_t i = 0; i < kGroups; ++i) Philox::round(c0[i], c1[i], c2[i], c3[i], k0, k1);
  }
  for (uint32_t i = 0; i < kGroups; ++i) {
    bits[8 * i + 0] = static_cast<uint16_t>(c0[i]);
    bits[8 * i + 1] = static_cast<uint16_t>(c0[i] >> 16);
    bits[8 * i + 2] = static_cast<uint16_t>(c1[i]);
    bits[8 * i + 3] = static_cast<uint16_t>(c1[i] >> 16);
    bits[8 * i + 4] = static_cast<uint16_t>(c2[i]);
    bits[8 * i + 5] = static_cast<uint16_t>(c2[i] >> 16);
    bits[8 * i + 6] = static_cast<uint16_t>(c3[i]);
    bits[8 * i + 7] = static_cast<uint16_t>(c3[i] >> 16);
  }
}

template <typename Low>
EMAN_FN void cast(const float* __restrict teacher, uint64_t address, uint32_t n) {
  auto* __restrict copy = reinterpret_cast<Low*>(address);
  for (uint32_t i = 0; i < n; ++i) copy[i] = narrow<Low>(teacher[i]);
}

template <typename Rule, bool kSkips>
EMAN_FN void update_block(const Chunk& chunk, const Rule& rule, const Arguments& arguments, uint32_t first,
                          uint32_t n) {
  using T = typename Rule::Teacher;
  using S = typename Rule::Student;
  auto* __restrict teacher = reinterpret_cast<T*>(chunk.teacher) + first;
  const auto* __restrict student = reinterpret_cast<const S*>(chunk.student) + first;
  const auto store = [&](uint32_t i, T next) {
    if (kSkips && !is_finite(student[i])) next = teacher[i];
    teacher[i] = next;
  };
  if (chunk.flags & kCopied) {
    for (uint32_t i = 0; i < n; ++i) store(i, rule.copied(student[i]));
  } else if (rule.is_noop()) {
    // Nothing to store in the teacher. The low-precision copy below is still written.
  } else if (Rule::kRounds && arguments.stochastic) {
    uint16_t random[kBlock];
    draw(arguments.random(), chunk.extra + first, random);
    for (uint32_t i = 0; i < n; ++i) store(i, rule.stochastic(teacher[i], student[i], random[i]));
  } else {
    for (uint32_t i = 0; i < n; ++i) store(i, rule(teacher[i], student[i]));
  }
  if constexpr (Rule::kCasts) {
    const uint64_t copy = chunk.extra + uint64_t{first} * sizeof(uint16_t);
    if (chunk.extra == 0) return;
    if (chunk.flags & kCastToHalf) {
      cast<Half>(teacher, copy, n);
    } else {
      cast<BFloat16>(teacher, copy, n);
    }
  }
}

// The general update of one piece of the student, for all teachers. Returns how many of its elements were skipped.
EMAN_CLONES uint64_t update_piece(const Chunk* records, const Arguments& arguments) {
  uint64_t skipped = 0;
  // The lambda must be inlined: otherwise it is compiled once, without fma instructions, and all clones call it.
  with_rule(records[0].pair, Weight(), [&](auto rule) __attribute__((always_inline)) {
    using S = typename decltype(rule)::Student;
    for (uint32_t first = 0; first < records[0].numel; first += kBlock) {
      const uint32_t n = std::min(kBlock, records[0].numel - first);
      if (arguments.skip_nonfinite) {
        const auto* student = reinterpret_cast<const S*>(records[0].student) + first;
        for (uint32_t i = 0; i < n; ++i) skipped += !is_finite(student[i]);
      }
      for (int k = 0; k < arguments.n_teachers; ++k) {
        rule.weight = arguments.weight(k);
        rule.replaces_nonfinite = arguments.skip_nonfinite;
        if (arguments.skip_nonfinite) {
          update_block<decltype(rule), true>(records[k], rule, arguments, first, n);
        } else {
          update_block<decltype(rule), false>(records[k], rule, arguments, first, n);
        }
      }
    }
  });
  return skipped;
}

template <typename U>
EMAN_FN void swap_chunk(const Chunk& chunk) {
  auto* __restrict teacher = reinterpret_cast<U*>(chunk.teacher);
  auto* __restrict student = reinterpret_cast<U*>(chunk.student);
  for (uint32_t i = 0; i < chunk.numel; ++i) std::swap(teacher[i], student[i]);
}

EMAN_CLONES void swap_chunk_of_any_width(const Chunk& chunk) {
  with_width(chunk.pair, [&](auto element) { swap_chunk<decltype(element)>(chunk); });
}

}  // namespace

// Threads take 16 neighboring chunks at a time, so that each streams through memory (5 % faster than 4 at a time, on
// two cores). The small tensors at the end of the table balance the load.
#define EMAN_BY_SIXTEEN schedule(dynamic, 16) num_threads(threads) if (threads > 1)

void update_cpu(const Arguments& arguments, int64_t n_pieces, bool general, int threads) {
  if (arguments.is_disabled()) return;
  if (!general) {
    const Weight weight = arguments.weight(0);
#pragma omp parallel for EMAN_BY_SIXTEEN
    for (int64_t i = 0; i < n_pieces; ++i) update_chunk_of_any_pair(arguments.chunks[i], weight);
    return;
  }
  uint64_t skipped = 0;
#pragma omp parallel for EMAN_BY_SIXTEEN reduction(+ : skipped)
  for (int64_t i = 0; i < n_pieces; ++i)
    skipped += update_piece(arguments.chunks + i * arguments.n_teachers, arguments);
  if (arguments.skipped != nullptr) *arguments.skipped += skipped;
}

void swap_cpu(const Chunk* chunks, int64_t n_chunks, int threads) {
#pragma omp parallel for EMAN_BY_SIXTEEN
  for (int64_t i = 0; i < n_chunks; ++i) swap_chunk_of_any_width(chunks[i]);
}

}  // namespace eman
