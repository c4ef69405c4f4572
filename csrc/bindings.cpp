// Addresses and numbers in, nothing of torch: one build serves every torch version.
#include <pybind11/pybind11.h>

#include "chunk.h"
#include "eman_update.h"

namespace py = pybind11;

namespace {

// A training step drives from the cache what the checks of the next update look at, and each look would then wait for
// memory by itself. Asked for together, the lines come together. `lines`: addresses, which are only asked for and may
// be of nothing. `dicts`: addresses of live dicts, whose entries lie elsewhere.
void prefetch(uint64_t lines, int64_t n_lines, uint64_t dicts, int64_t n_dicts) {
  const auto* line = reinterpret_cast<const char* const*>(lines);
  const auto* dict = reinterpret_cast<PyDictObject* const*>(dicts);
  for (int64_t i = 0; i < n_dicts; ++i) __builtin_prefetch(dict[i]);
  for (int64_t i = 0; i < n_lines; ++i) __builtin_prefetch(line[i]);
  for (int64_t i = 0; i < n_dicts; ++i) {
    const auto* entries = reinterpret_cast<const char*>(dict[i]->ma_keys);
    for (int offset = 0; offset < 192; offset += 64) __builtin_prefetch(entries + offset);
  }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();

  m.def("prefetch", &prefetch, py::arg("lines"), py::arg("n_lines"), py::arg("dicts"), py::arg("n_dicts"));
  m.def("update_cpu", &eman::update_cpu, py::arg("chunks"), py::arg("n_chunks"), py::arg("momentum"),
        py::arg("threads"), without_gil);
#if defined(EMAN_WITH_CUDA)
  m.def("update_cuda", &eman::update_cuda, py::arg("chunks"), py::arg("n_chunks"), py::arg("momentum"),
        py::arg("momentum_address"), py::arg("momentum_is_double"), py::arg("device"), py::arg("stream"), without_gil);
  m.def("check_cuda", &eman::check_cuda, py::arg("device"), without_gil);
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.attr("cuda_status") = EMAN_CUDA_STATUS;  // the line that the build printed
  m.attr("openmp_status") = EMAN_OPENMP_STATUS;

  // For the test that plan.py writes what chunk.h declares.
  m.attr("chunk_bytes") = sizeof(eman::Chunk);
  m.attr("chunk_size") = eman::kChunkSize;
  py::dict codes;
#define EMAN_CODE(CODE, T, S) codes[#T "<-" #S] = CODE;
  EMAN_EMA_PAIRS(EMAN_CODE)
#undef EMAN_CODE
#define EMAN_CODE(CODE, U) codes[#U] = CODE;
  EMAN_COPY_PAIRS(EMAN_CODE)
#undef EMAN_CODE
  m.attr("pair_codes") = codes;
}
