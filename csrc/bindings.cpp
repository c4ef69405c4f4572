// Addresses and numbers in, nothing of torch: one build serves every torch version.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "chunk.h"
#include "eman_update.h"
#include "watch.h"

namespace py = pybind11;

namespace {

// 0 is null.
template <typename T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

eman::Call call(uint64_t chunks, const std::vector<double>& momenta, uint64_t momenta_address, bool momenta_are_double,
                uint64_t found_inf, bool stochastic, bool skip_nonfinite, uint32_t seed, uint32_t step,
                uint64_t step_address, uint64_t skipped) {
  if (momenta.empty() || momenta.size() > eman::kMaxTeachers) throw std::length_error("momenta: 1 to 8 are needed");
  eman::Call call{};
  call.chunks = pointer<const eman::Chunk>(chunks);
  for (size_t i = 0; i < momenta.size(); ++i) call.weights[i] = eman::Weight(momenta[i]);
  call.momenta = pointer<const void>(momenta_address);
  call.momenta_are_double = momenta_are_double;
  call.found_inf = pointer<const float>(found_inf);
  call.n_teachers = static_cast<int>(momenta.size());
  call.stochastic = stochastic;
  call.skip_nonfinite = skip_nonfinite;
  call.philox = {seed, step};
  call.step = pointer<const int64_t>(step_address);
  call.skipped = pointer<unsigned long long>(skipped);
  return call;
}

eman::Call plain_call(uint64_t chunks, double momentum) {
  return call(chunks, {momentum}, 0, false, 0, false, false, 0, 0, 0, 0);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();

  eman::bind_watch(m);
  py::class_<eman::Call>(m, "Call")
      // What most updates are, first: it is found without a look at nine defaults.
      .def(py::init(&plain_call), py::arg("chunks"), py::arg("momentum"))
      .def(py::init(&call), py::arg("chunks"), py::arg("momenta"), py::kw_only(), py::arg("momenta_address") = 0,
           py::arg("momenta_are_double") = false, py::arg("found_inf") = 0, py::arg("stochastic") = false,
           py::arg("skip_nonfinite") = false, py::arg("seed") = 0, py::arg("step") = 0, py::arg("step_address") = 0,
           py::arg("skipped") = 0);
  m.def("update_cpu", &eman::update_cpu, py::arg("call"), py::arg("n_pieces"), py::arg("general"), py::arg("threads"),
        without_gil);
  m.def(
      "swap_cpu",
      [](uint64_t chunks, int64_t n_chunks, int threads) {
        eman::swap_cpu(pointer<const eman::Chunk>(chunks), n_chunks, threads);
      },
      py::arg("chunks"), py::arg("n_chunks"), py::arg("threads"), without_gil);
#if defined(EMAN_WITH_CUDA)
  m.def("update_cuda", &eman::update_cuda, py::arg("call"), py::arg("n_pieces"), py::arg("general"), py::arg("device"),
        py::arg("stream"), without_gil);
  m.def(
      "swap_cuda",
      [](uint64_t chunks, int64_t n_chunks, int device, uint64_t stream) {
        eman::swap_cuda(pointer<const eman::Chunk>(chunks), n_chunks, device, stream);
      },
      py::arg("chunks"), py::arg("n_chunks"), py::arg("device"), py::arg("stream"), without_gil);
  m.def("check_cuda", &eman::check_cuda, py::arg("device"), without_gil);
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.attr("cuda_status") = EMAN_CUDA_STATUS;  // the line that the build printed
  m.attr("openmp_status") = EMAN_OPENMP_STATUS;

  // For the test that plan.py writes what chunk.h declares.
  m.attr("chunk_bytes") = sizeof(eman::Chunk);
  m.attr("max_teachers") = eman::kMaxTeachers;
  py::dict codes;
#define EMAN_CODE(CODE, T, S) codes[#T "<-" #S] = CODE;
  EMAN_EMA_PAIRS(EMAN_CODE)
#undef EMAN_CODE
#define EMAN_CODE(CODE, U) codes[#U] = CODE;
  EMAN_COPY_PAIRS(EMAN_CODE)
#undef EMAN_CODE
  m.attr("pair_codes") = codes;
}
