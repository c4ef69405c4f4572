// What benchmarks/variants.py compiles for each variant: the plain kernel alone, and its launch.
#define EMAN_PLAIN_ONLY
#include "eman_update.cuh"

// Null, or what is wrong, in CUDA's words.
extern "C" const char* launch(const eman::Chunk* chunks, double momentum, int64_t n_chunks, int device,
                              cudaStream_t stream) {
  eman::Call call{};
  call.chunks = chunks;
  call.weights[0] = eman::Weight(momentum);
  call.n_teachers = 1;
  if (cudaSetDevice(device) == cudaSuccess) {
    eman_update<<<static_cast<unsigned>(n_chunks), eman::kThreads, 0, stream>>>(call);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
