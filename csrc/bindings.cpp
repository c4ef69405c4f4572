// The Python interface of the kernels. It takes addresses and numbers instead of tensors, so that it needs no header of
// torch and one build works with every version of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "chunk.h"
#include "eman_update.h"
#include "guards.h"

namespace py = pybind11;

namespace {

// Address 0 is the null pointer.
template <typename T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// The setter of a pointer field, which takes an address.
template <typename T>
auto address_setter(T* eman::Arguments::* field) {
  return [field](eman::Arguments& arguments, uint64_t address) { arguments.*field = pointer<T>(address); };
}

void check_n_teachers(int64_t n) {
  if (n < 1 || n > eman::kMaxTeachers) throw std::length_error("an update has 1 to 8 teachers");
}

// An update of one teacher, rounded to nearest; all else is 0.
eman::Arguments plain_arguments(uint64_t chunks, double momentum) {
  eman::Arguments arguments{};
  arguments.chunks = pointer<const eman::Chunk>(chunks);
  arguments.weights[0] = eman::Weight(momentum);
  arguments.n_teachers = 1;
  return arguments;
}

void set_momenta(eman::Arguments& arguments, const std::vector<double>& momenta) {
  check_n_teachers(static_cast<int64_t>(momenta.size()));
  for (size_t i = 0; i < momenta.size(); ++i) arguments.weights[i] = eman::Weight(momenta[i]);
  arguments.n_teachers = static_cast<int>(momenta.size());
}

void read_momenta(eman::Arguments& arguments, uint64_t address, int n_teachers, bool are_double) {
  check_n_teachers(n_teachers);
  arguments.momenta = pointer<const void>(address);
  arguments.momenta_are_double = are_double;
  arguments.n_teachers = n_teachers;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  const auto without_gil = py::call_guard<py::gil_scoped_release>();

  eman::bind_guards(m);
  // The constructor is kept short because most updates need nothing else, in every step. The rest is write-only.
  py::class_<eman::Arguments>(m, "Arguments")
      .def(py::init(&plain_arguments), py::arg("chunks"), py::arg("momentum"))
      .def("set_momenta", &set_momenta, py::arg("momenta"))
      .def("read_momenta", &read_momenta, py::arg("address"), py::arg("n_teachers"), py::arg("are_double"))
      .def_property("found_inf", nullptr, address_setter(&eman::Arguments::found_inf))
      .def_readwrite("stochastic", &eman::Arguments::stochastic)
      .def_readwrite("skip_nonfinite", &eman::Arguments::skip_nonfinite)
      .def_property("seed", nullptr, [](eman::Arguments& arguments, uint32_t seed) { arguments.philox.seed = seed; })
      .def_property("step", nullptr, [](eman::Arguments& arguments, uint32_t step) { arguments.philox.step = step; })
      .def_property("step_address", nullptr, address_setter(&eman::Arguments::step))
      .def_property("skipped", nullptr, address_setter(&eman::Arguments::skipped));
  m.def("update_cpu", &eman::update_cpu, py::arg("arguments"), py::arg("n_pieces"), py::arg("general"),
        py::arg("threads"), without_gil);
  m.def(
      "swap_cpu",
      [](uint64_t chunks, int64_t n_chunks, int threads) {
        eman::swap_cpu(pointer<const eman::Chunk>(chunks), n_chunks, threads);
      },
      py::arg("chunks"), py::arg("n_chunks"), py::arg("threads"), without_gil);
#if defined(EMAN_WITH_CUDA)
  m.def("update_cuda", &eman::update_cuda, py::arg("arguments"), py::arg("n_pieces"), py::arg("general"),
        py::arg("device"), py::arg("stream"), without_gil);
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
  m.attr("cuda_status") = EMAN_CUDA_STATUS;  // as the build printed it
  m.attr("openmp_status") = EMAN_OPENMP_STATUS;

  // For the test that compares the Python code with chunk.h.
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
