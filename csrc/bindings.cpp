// Addresses and numbers in, nothing of torch: one build serves every torch version.
#include <pybind11/pybind11.h>

#include "chunk.h"
#include "eman_update.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();

  m.def("prefetch", &eman::prefetch, py::arg("addresses"), py::arg("n"));
  m.def("update_cpu", &eman::update_cpu, py::arg("chunks"), py::arg("n_chunks"), py::arg("weight"), py::arg("threads"),
        without_gil);
#if defined(EMAN_WITH_CUDA)
  m.def("update_cuda", &eman::update_cuda, py::arg("chunks"), py::arg("n_chunks"), py::arg("weight"), py::arg("device"),
        py::arg("stream"), without_gil);
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
