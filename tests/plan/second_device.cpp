// A second torch device for machines without one: tensors in separate host memory, and streams that run their work
// only when something waits for them. Code that forgets to wait reads old values, or new ones too early.
//
// With SECOND_DEVICE_LIKE_MPS in the environment it has two properties of Apple's mps: there is no float64, and the
// address of a storage is that of a handle, which contains the address of the memory.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>
#include <set>
#include <vector>

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;

struct Queue {
  std::vector<std::function<void()>> tasks;
  size_t done = 0;
};

const bool like_mps = std::getenv("SECOND_DEVICE_LIKE_MPS") != nullptr;

std::recursive_mutex mutex;
auto& queues = *new std::vector<Queue>(1);  // never destroyed: tensors outlive this library's static variables
c10::StreamId current = 0;
int64_t copies = 0, pageable = 0;
auto& pinned = *new std::set<void*>;
auto& handles = *new std::deque<void*>;  // the memory of each storage, never removed

void finish(c10::StreamId stream, size_t tasks) {
  std::lock_guard<std::recursive_mutex> lock(mutex);
  while (queues[stream].done < tasks) {
    auto task = std::move(queues[stream].tasks[queues[stream].done++]);
    task();
  }
}

void finish(c10::StreamId stream) { finish(stream, queues[stream].tasks.size()); }

struct Event {
  c10::StreamId stream;
  size_t tasks;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return {kType, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  static c10::Stream stream(c10::StreamId id) { return c10::Stream(c10::Stream::UNSAFE, c10::Device(kType, 0), id); }
  c10::Stream getStream(c10::Device) const override { return stream(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    queues.emplace_back();
    return stream(queues.size() - 1);
  }
  c10::Stream exchangeStream(c10::Stream next) const override { return stream(std::exchange(current, next.id())); }
  bool queryStream(const c10::Stream& its) const override {
    return queues[its.id()].done == queues[its.id()].tasks.size();
  }
  void synchronizeStream(const c10::Stream& its) const override { finish(its.id()); }
  void synchronizeDevice(c10::DeviceIndex) const override {
    for (size_t id = 0; id < queues.size(); ++id) finish(id);
  }
  void record(void** event, const c10::Stream& its, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Event;
    *static_cast<Event*>(*event) = {its.id(), queues[its.id()].tasks.size()};
  }
  void block(void* event, const c10::Stream& its) const override {
    auto [stream, tasks] = *static_cast<Event*>(event);
    queues[its.id()].tasks.push_back([stream = stream, tasks = tasks] { finish(stream, tasks); });
  }
  bool queryEvent(void* event) const override {
    return queues[static_cast<Event*>(event)->stream].done >= static_cast<Event*>(event)->tasks;
  }
  void synchronizeEvent(void* event) const override {
    finish(static_cast<Event*>(event)->stream, static_cast<Event*>(event)->tasks);
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

template <bool kPinned>
struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = bytes ? std::aligned_alloc(64, (bytes + 63) / 64 * 64) : nullptr;
    if (!kPinned && like_mps) data = &handles.emplace_back(data);
    if (kPinned) pinned.insert(data);
    return {data, data, &release, kPinned ? c10::Device(c10::kCPU) : c10::Device(kType, 0)};
  }
  static void release(void* data) {
    pinned.erase(data);
    std::free(!kPinned && like_mps ? *static_cast<void**>(data) : data);
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    if (!kPinned && like_mps) to = *static_cast<void**>(to), from = *static_cast<void* const*>(from);
    std::memcpy(to, from, bytes);
  }
};
Memory<false> device_memory;
Memory<true> pinned_memory;
REGISTER_ALLOCATOR(kType, &device_memory)

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* data) const override { return pinned.count(const_cast<void*>(data)); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
};

c10::ScalarType supported(std::optional<c10::ScalarType> dtype) {
  TORCH_CHECK_TYPE(!like_mps || dtype != c10::kDouble, "this device does not support float64");
  return dtype.value_or(c10::kFloat);
}

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &device_memory, keys, supported(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  const c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &device_memory, keys, supported(dtype));
}

at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor.detach();
  auto keeper = [storage = tensor.storage()](void*) {};
  void* data = tensor.data_ptr();
  if (like_mps && tensor.storage().data()) {
    data = *static_cast<char* const*>(tensor.storage().data()) + tensor.storage_offset() * tensor.itemsize();
  }
  const auto options = at::TensorOptions().dtype(tensor.dtype()).device(c10::kCPU);
  return at::from_blob(data, tensor.sizes(), tensor.strides(), keeper, options, c10::Device(c10::kCPU));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  const bool to_host = to.is_cpu();
  copies += to_host;
  pageable += to_host && !pinned.count(to.storage().mutable_data());
  queues[current].tasks.push_back([from = on_host(self), to = on_host(to)] { to.copy_(from); });
  // The source is host memory: copy now, because the caller may overwrite it.
  if (self.is_cpu() || (to_host && !non_blocking)) finish(current);
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  if (self.sizes() != to.sizes()) {  // `to` is the empty result of an operation
    const at::Tensor resized = empty(self.sizes(), self.scalar_type(), {}, {}, {}, {});
    to.unsafeGetTensorImpl()->set_storage_keep_dtype(resized.storage());
    to.unsafeGetTensorImpl()->set_sizes_contiguous(self.sizes());
  }
  return copy_from(self, to, false);
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
  const auto numel = static_cast<int64_t>(source.nbytes() / self.itemsize());
  return at::native::set_storage_cpu_(self, std::move(source), 0, {numel});
}

void on_the_host(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  finish(current);
  at::native::cpu_fallback(operation, stack);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&on_the_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("set_.source_Storage", TORCH_FN(set_storage));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
}

TORCH_LIBRARY(second_device, m) {
  m.def("copies_to_host() -> (int, int)", [] { return std::make_tuple(copies, pageable); });
}

const bool registered = (at::RegisterPrivateUse1HooksInterface(new Hooks), true);

}  // namespace
