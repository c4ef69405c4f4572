// The two ways to run a table of chunks. Addresses are plain numbers: nothing of torch comes in here.
#pragma once

#include <cstdint>

namespace eman {

// On CPU threads; returns when the work is done. threads >= 1.
void update_cpu(uint64_t chunks, int64_t n_chunks, double momentum, int threads);

#if defined(EMAN_WITH_CUDA)
// On a stream of a CUDA device; returns when the kernel is queued. The table lies on that device. momentum_address: 0,
// or where on the device the kernel reads the momentum instead, a double or a float. Throws std::runtime_error with
// CUDA's own words when the launch fails.
void update_cuda(uint64_t chunks, int64_t n_chunks, double momentum, uint64_t momentum_address, bool momentum_is_double,
                 int device, uint64_t stream);

// Whether this build has code for the device: throws std::runtime_error if it has not.
void check_cuda(int device);
#endif

}  // namespace eman
