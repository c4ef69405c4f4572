// The same table on CPU threads.
#include <algorithm>
#include <utility>

#include "chunk.h"
#include "ema_math.h"
#include "eman_update.h"

// Without these, a build for any x86-64 would call a library function for every fma. The loader picks one by the
// machine that runs it. Other compilers and machines: what the compiler's flags say.
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
  if (rule.rests()) return;
  if (rule.copies()) {
    // Asked here, the other loop need not ask for each element.
    for (uint32_t i = 0; i < chunk.numel; ++i) teacher[i] = rule.copied(student[i]);
  } else {
    for (uint32_t i = 0; i < chunk.numel; ++i) teacher[i] = rule(teacher[i], student[i]);
  }
}

EMAN_CLONES void update_chunk_of_any_pair(const Chunk& chunk, Weight weight) {
  with_rule(chunk.pair, weight, [&](const auto& rule) { update_chunk(chunk, rule); });
}

// Elements at a time of which a piece is done for all teachers, so that the student's are read from memory once.
constexpr uint32_t kBlock = 2048;

// The 16 bits for each of the elements number ... number + kBlock - 1; number is a multiple of 8. All groups go through
// a round together, so that it becomes vector code: one group after the other makes the whole update take five times as
// long.
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
EMAN_FN void update_block(const Chunk& chunk, const Rule& rule, const Call& call, uint32_t first, uint32_t n) {
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
  } else if (rule.rests()) {
    // The copy below is written all the same.
  } else if (Rule::kRounds && call.stochastic) {
    uint16_t random[kBlock];
    draw(call.random(), chunk.extra + first, random);
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

// All that an update can be, for one piece of the student. Returns how many of its elements were skipped.
EMAN_CLONES uint64_t update_piece(const Chunk* records, const Call& call) {
  uint64_t skipped = 0;
  // Not inlined, the lambda would be compiled once for any x86-64, and a clone would call it.
  with_rule(records[0].pair, Weight(), [&](auto rule) __attribute__((always_inline)) {
    using S = typename decltype(rule)::Student;
    for (uint32_t first = 0; first < records[0].numel; first += kBlock) {
      const uint32_t n = std::min(kBlock, records[0].numel - first);
      if (call.skip_nonfinite) {
        const auto* student = reinterpret_cast<const S*>(records[0].student) + first;
        for (uint32_t i = 0; i < n; ++i) skipped += !is_finite(student[i]);
      }
      for (int k = 0; k < call.n_teachers; ++k) {
        rule.weight = call.weight(k);
        rule.heals = call.skip_nonfinite;
        if (call.skip_nonfinite) {
          update_block<decltype(rule), true>(records[k], rule, call, first, n);
        } else {
          update_block<decltype(rule), false>(records[k], rule, call, first, n);
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

// Sixteen neighbouring chunks at a time: a thread then streams through memory (5 % over 4 at a time on two cores), and
// the small tensors at the table's end even out what is left.
#define EMAN_BY_SIXTEEN schedule(dynamic, 16) num_threads(threads) if (threads > 1)

void update_cpu(const Call& call, int64_t n_pieces, bool general, int threads) {
  if (call.is_off()) return;
  if (!general) {
    const Weight weight = call.weight(0);
#pragma omp parallel for EMAN_BY_SIXTEEN
    for (int64_t i = 0; i < n_pieces; ++i) update_chunk_of_any_pair(call.chunks[i], weight);
    return;
  }
  uint64_t skipped = 0;
#pragma omp parallel for EMAN_BY_SIXTEEN reduction(+ : skipped)
  for (int64_t i = 0; i < n_pieces; ++i) skipped += update_piece(call.chunks + i * call.n_teachers, call);
  if (call.skipped != nullptr) *call.skipped += skipped;
}

void swap_cpu(const Chunk* chunks, int64_t n_chunks, int threads) {
#pragma omp parallel for EMAN_BY_SIXTEEN
  for (int64_t i = 0; i < n_chunks; ++i) swap_chunk_of_any_width(chunks[i]);
}

}  // namespace eman
