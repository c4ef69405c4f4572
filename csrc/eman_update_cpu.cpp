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
  for (uint32_t i = 0; i < chunk.numel; ++i) teacher[i] = rule(teacher[i], student[i]);
}

EMAN_CLONES void update_chunk_of_any_pair(const Chunk& chunk, Weight weight) {
  with_rule(chunk.pair, weight, [&](const auto& rule) { update_chunk(chunk, rule); });
}

// Elements at a time of which a piece is done for all teachers, so that the student's are read from memory once.
constexpr uint32_t kBlock = 2048;

// The bits for elements number ... number + kBlock - 1; number is a multiple of 8. By words, so that the loop over
// groups becomes vector code.
EMAN_FN void draw(const Philox& philox, uint64_t number, uint32_t (&words)[4][kBlock / 8]) {
  for (uint32_t group = 0; group < kBlock / 8; ++group) {
    const Random random = philox(number / 8 + group);
    for (int i = 0; i < 4; ++i) words[i][group] = random.words[i];
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
  const auto keeps = [&](uint32_t i) { return kSkips && !is_finite(student[i]); };
  if (chunk.flags & kCopied) {
    for (uint32_t i = 0; i < n; ++i) teacher[i] = keeps(i) ? teacher[i] : rule.copied(student[i]);
  } else if (Rule::kRounds && call.stochastic) {
    uint32_t words[4][kBlock / 8];
    draw(call.random(), chunk.extra + first, words);
    for (uint32_t i = 0; i < n; ++i) {
      const uint32_t random = words[i % 8 / 2][i / 8] >> (i % 2 * 16) & 0xFFFFu;
      teacher[i] = keeps(i) ? teacher[i] : rule.stochastic(teacher[i], student[i], random);
    }
  } else {
    for (uint32_t i = 0; i < n; ++i) teacher[i] = keeps(i) ? teacher[i] : rule(teacher[i], student[i]);
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
  with_rule(records[0].pair, Weight(), [&](auto rule) {
    using S = typename decltype(rule)::Student;
    for (uint32_t first = 0; first < records[0].numel; first += kBlock) {
      const uint32_t n = std::min(kBlock, records[0].numel - first);
      if (call.skip_nonfinite) {
        const auto* student = reinterpret_cast<const S*>(records[0].student) + first;
        for (uint32_t i = 0; i < n; ++i) skipped += !is_finite(student[i]);
      }
      for (int k = 0; k < call.n_teachers; ++k) {
        rule.weight = call.weight(k);
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

}  // namespace

// Sixteen neighbouring chunks at a time: a thread then streams through memory (5 % over 4 at a time on two cores), and
// the small tensors at the table's end even out what is left.
#define EMAN_PARALLEL _Pragma("omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)")

void update_cpu(const Call& call, int64_t n_pieces, bool general, int threads) {
  if (call.is_off()) return;
  if (!general) {
    const Weight weight = call.weight(0);
    EMAN_PARALLEL
    for (int64_t i = 0; i < n_pieces; ++i) update_chunk_of_any_pair(call.chunks[i], weight);
    return;
  }
  uint64_t skipped = 0;
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1) reduction(+ : skipped)
  for (int64_t i = 0; i < n_pieces; ++i) skipped += update_piece(call.chunks + i * call.n_teachers, call);
  if (call.skipped != nullptr) *call.skipped += skipped;
}

void swap_cpu(const Chunk* chunks, int64_t n_chunks, int threads) {
  EMAN_PARALLEL
  for (int64_t i = 0; i < n_chunks; ++i) {
    with_width(chunks[i].pair, [&](auto element) { swap_chunk<decltype(element)>(chunks[i]); });
  }
}

}  // namespace eman
