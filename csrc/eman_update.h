// What an update is, and the ways to run one. Addresses are plain numbers: nothing of torch comes in here.
#pragma once

#include <cstdint>

#include "chunk.h"
#include "ema_math.h"

namespace eman {

// One update. The plain kernels know no more than the first part; the general ones, slower, all of it.
struct Call {
  const Chunk* chunks;  // n_teachers records for each piece of the student, in the memory of the device that runs
  Weight weights[kMaxTeachers];
  // Null, or where on the device to read instead: a captured graph can then replay with other values.
  const void* momenta;  // n_teachers doubles or floats
  bool momenta_are_double;
  const float* found_inf;  // nothing is written when it is not 0

  int n_teachers;
  bool stochastic;      // rounding of half teachers, else to nearest
  bool skip_nonfinite;  // a teacher's element stays where the student's is NaN or infinite
  Philox philox;
  const int64_t* step;          // null, or where to read philox.step instead
  unsigned long long* skipped;  // null, or what the number of skipped student elements is added to

  EMAN_FN bool is_off() const { return found_inf != nullptr && *found_inf != 0.0f; }
  EMAN_FN Weight weight(int teacher) const {
    if (momenta == nullptr) return weights[teacher];
    return Weight(momenta_are_double ? static_cast<const double*>(momenta)[teacher]
                                     : static_cast<const float*>(momenta)[teacher]);
  }
  EMAN_FN Philox random() const { return {philox.seed, step == nullptr ? philox.step : static_cast<uint32_t>(*step)}; }
};

// On CPU threads; return when the work is done. threads >= 1.
void update_cpu(const Call& call, int64_t n_pieces, bool general, int threads);
void swap_cpu(const Chunk* chunks, int64_t n_chunks, int threads);

#if defined(EMAN_WITH_CUDA)
// On a stream of a CUDA device; return when the kernel is queued. Throw std::runtime_error with CUDA's own words when
// the launch fails.
void update_cuda(const Call& call, int64_t n_pieces, bool general, int device, uint64_t stream);
void swap_cuda(const Chunk* chunks, int64_t n_chunks, int device, uint64_t stream);

// Whether this build has code for the device: throws std::runtime_error if it has not.
void check_cuda(int device);
#endif

}  // namespace eman
