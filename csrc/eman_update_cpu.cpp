// The same table on CPU threads.
#include <type_traits>

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

}  // namespace

void update_cpu(uint64_t chunks, int64_t n_chunks, double momentum, int threads) {
  const auto* table = reinterpret_cast<const Chunk*>(chunks);
  const Weight weight(momentum);
// Sixteen neighbouring chunks at a time: a thread then streams through memory (5 % over 4 at a time on two cores), and
// the small tensors at the table's end even out what is left.
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < n_chunks; ++i) update_chunk_of_any_pair(table[i], weight);
}

}  // namespace eman
