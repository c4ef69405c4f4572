// The plain kernel and its launch. benchmarks/variants.py compiles this for each variant.
#define EMAN_PLAIN_ONLY
#include "eman_update.cuh"

// Returns null, or CUDA's error message.
extern "C" const char* launch(const eman::Chunk* chunks, double momentum, int64_t n_chunks, int device,
                              cudaStream_t stream) {
  eman::Arguments arguments{};
  arguments.chunks = chunks;
  arguments.weights[0] = eman::Weight(momentum);
  arguments.n_teachers = 1;
  if (cudaSetDevice(device) == cudaSuccess) {
    eman_update<<<static_cast<unsigned>(n_chunks), eman::kThreads, 0, stream>>>(arguments);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
