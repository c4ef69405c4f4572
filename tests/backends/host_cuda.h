// Replaces what CUDA defines, so that a host compiler can compile the kernels.
#pragma once

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __popc __builtin_popcount
#define __grid_constant__
static struct {
  unsigned x;
} threadIdx, blockIdx;
inline void atomicAdd(unsigned long long* sum, unsigned long long number) { *sum += number; }
inline void __syncwarp() {}
