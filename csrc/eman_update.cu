// The launches of the CUDA kernels.
#include <stdexcept>
#include <string>

#include "eman_update.cuh"
#include "eman_update.h"

namespace eman {
namespace {

void check(cudaError_t error, const char* what, int device) {
  if (error == cudaSuccess) return;
  // Clear the error. The runtime would otherwise report it again, for an unrelated launch.
  cudaGetLastError();
  throw std::runtime_error(std::string("eman_kernels: ") + what + " failed on cuda:" + std::to_string(device) + ": " +
                           cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Sets the current device, and restores the previous one at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice", device);
    if (previous_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice", device);
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_ && cudaSetDevice(previous_) != cudaSuccess) cudaGetLastError();
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

// One block per piece. cudaLaunchKernel returns the error of this launch only; cudaGetLastError could also return what
// an earlier call of someone else left behind.
template <typename Argument>
void launch(void (*kernel)(Argument), const char* what, int64_t n_pieces, Argument argument, int device,
            uint64_t stream) {
  if (n_pieces == 0) return;
  const DeviceGuard guard(device);
  void* arguments[] = {&argument};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(n_pieces)), dim3(kThreads),
                         arguments, 0, reinterpret_cast<cudaStream_t>(stream)),
        what, device);
}

}  // namespace

void update_cuda(const Arguments& arguments, int64_t n_pieces, bool general, int device, uint64_t stream) {
  const auto kernel = !general ? eman_update : arguments.n_teachers == 1 ? eman_update_general : eman_update_several;
  launch(kernel, "the launch of eman_update", n_pieces, arguments, device, stream);
}

void swap_cuda(const Chunk* chunks, int64_t n_chunks, int device, uint64_t stream) {
  launch(eman_swap, "the launch of eman_swap", n_chunks, chunks, device, stream);
}

void check_cuda(int device) {
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(eman_update)), "loading eman_update", device);
}

}  // namespace eman
