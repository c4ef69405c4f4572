// The arguments of an update, and the functions that run one. Tensors appear as plain addresses, so no header of torch
// is needed.
#pragma once

#include <cstdint>

#include "chunk.h"
#include "ema_math.h"

namespace eman {

// The arguments of one update. The plain kernels read only the first part. The general kernels, which are slower, read
// everything.
struct Arguments {
  const Chunk* chunks;  // n_teachers records per piece of the student, in the memory of the device that runs the kernel
  Weight weights[kMaxTeachers];
  // If not null, the momenta are read from here on the device, in place of `weights`. A captured CUDA graph can then be
  // replayed with other values.
  const void* momenta;  // n_teachers doubles or floats
  bool momenta_are_double;
  const float* found_inf;  // null, or the address of a number: if it is not 0, nothing is written

  int n_teachers;
  bool stochastic;      // round half-precision teachers stochastically, else to nearest
  bool skip_nonfinite;  // keep a teacher's element if the student's is NaN or infinite
  Philox philox;
  const int64_t* step;          // null, or the address from which the step is read, in place of philox.step
  unsigned long long* skipped;  // null, or the address of a counter, to which the skipped student elements are added

  EMAN_FN bool is_disabled() const { return found_inf != nullptr && *found_inf != 0.0f; }
  EMAN_FN Weight weight(int teacher) const {
    if (momenta == nullptr) return weights[teacher];
    return Weight(momenta_are_double ? static_cast<const double*>(momenta)[teacher]
                                     : static_cast<const float*>(momenta)[teacher]);
  }
  EMAN_FN Philox random() const { return {philox.seed, step == nullptr ? philox.step : static_cast<uint32_t>(*step)}; }
};

// On CPU threads. These return when the work is done. threads >= 1.
void update_cpu(const Arguments& arguments, int64_t n_pieces, bool general, int threads);
void swap_cpu(const Chunk* chunks, int64_t n_chunks, int threads);

#if defined(EMAN_WITH_CUDA)
// On a stream of a CUDA device. These return when the kernel is queued. If the launch fails, they throw
// std::runtime_error with CUDA's error message.
void update_cuda(const Arguments& arguments, int64_t n_pieces, bool general, int device, uint64_t stream);
void swap_cuda(const Chunk* chunks, int64_t n_chunks, int device, uint64_t stream);

// Throws std::runtime_error if this build has no code for the device.
void check_cuda(int device);
#endif

}  // namespace eman
