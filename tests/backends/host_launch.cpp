// The launches of csrc/eman_update.cu, with a fake of the CUDA runtime that keeps its last error like the real one.
// Prints the result of each attempt; test_host_kernel.py compares it.
#include <cstdint>
#include <cstdio>
#include <exception>

#include "host_cuda.h"

enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice, cudaErrorNoKernelImageForDevice };
using cudaStream_t = void*;
struct dim3 {
  unsigned x;
  explicit dim3(unsigned x) : x(x) {}
};
struct cudaFuncAttributes {};

static cudaError_t last = cudaSuccess, next_launch = cudaSuccess;
static int current = 0, launches = 0;
static cudaError_t said(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}
static cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
static const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorNoKernelImageForDevice";
}
static const char* cudaGetErrorString(cudaError_t) { return "in words"; }
static cudaError_t cudaGetDevice(int* device) {
  *device = current;
  return cudaSuccess;
}
static cudaError_t cudaSetDevice(int device) {
  if (device > 1) return said(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}
static const void* launched = nullptr;
static cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3, void**, size_t, cudaStream_t) {
  launched = kernel;
  launches += static_cast<int>(grid.x);
  return said(next_launch);
}
static cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return said(next_launch); }

#include "eman_update.cu"

template <typename Attempt>
static void attempt(const char* what, Attempt run) {
  launches = 0;
  try {
    run();
    printf("%s: %d blocks", what, launches);
  } catch (const std::exception& error) {
    printf("%s: %s", what, error.what());
  }
  printf("; device %d, last error %d\n", current, last);
}

int main() {
  eman::Arguments arguments{};
  attempt("no such device", [&] { eman::update_cuda(arguments, 3, false, 99, 0); });
  attempt("after it", [&] { eman::update_cuda(arguments, 3, false, 0, 0); });
  next_launch = cudaErrorNoKernelImageForDevice;
  attempt("no image", [&] { eman::swap_cuda(nullptr, 3, 1, 0); });
  attempt("no image at all", [&] { eman::check_cuda(1); });
  next_launch = cudaSuccess;
  last = cudaErrorInvalidDevice;  // of an unrelated call
  attempt("another's error", [&] { eman::update_cuda(arguments, 4, true, 1, 0); });
  const auto launches_for = [&](int n_teachers, bool general, void (*kernel)(eman::Arguments)) {
    arguments.n_teachers = n_teachers;
    eman::update_cuda(arguments, 1, general, 0, 0);
    return launched == reinterpret_cast<const void*>(kernel);
  };
  const bool right = launches_for(1, false, eman_update) && launches_for(1, true, eman_update_general) &&
                     launches_for(3, true, eman_update_several);
  printf("the kernels by number of teachers: %s\n", right ? "right" : "wrong");
  attempt("nothing to do", [&] { eman::update_cuda(arguments, 0, false, 99, 0); });
}
