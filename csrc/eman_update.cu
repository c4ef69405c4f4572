// The launch of the CUDA kernel.
#include <stdexcept>
#include <string>

#include "eman_update.cuh"
#include "eman_update.h"

namespace eman {
namespace {

void check(cudaError_t error, const char* what, int device) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("eman_kernels: ") + what + " failed on cuda:" + std::to_string(device) + ": " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// The caller's current device comes back however we leave.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice", device);
    if (previous_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice", device);
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace

void update_cuda(const Call& call, int64_t n_pieces, bool general, int device, uint64_t stream) {
  if (n_pieces == 0) return;
  const DeviceGuard guard(device);
  auto* kernel = general ? eman_update_general : eman_update;
  kernel<<<static_cast<unsigned>(n_pieces), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(call);
  check(cudaGetLastError(), "the launch of eman_update", device);
}

void swap_cuda(const Chunk* chunks, int64_t n_chunks, int device, uint64_t stream) {
  if (n_chunks == 0) return;
  const DeviceGuard guard(device);
  eman_swap<<<static_cast<unsigned>(n_chunks), kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(chunks);
  check(cudaGetLastError(), "the launch of eman_swap", device);
}

void check_cuda(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, eman_update), "loading eman_update", device);
}

}  // namespace eman
