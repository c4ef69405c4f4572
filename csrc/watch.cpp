// Is what a plan rests on still so? A walk over what networks hold now, compared word by word with an earlier one.
//
// Python's C interface and torch's stable one, whose addresses come in as numbers: nothing is linked. A watch keeps
// names and nothing else alive. It needs no more: whatever is compared was reached from living roots, so that a new
// object which came to lie where an old one was is looked at like any other. The GIL is held throughout; a
// free-threaded interpreter takes it up for this module, which does not say that it can do without.
#include "watch.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <unordered_set>
#include <vector>

namespace py = pybind11;

namespace eman {
namespace {

using Roots = std::vector<py::object>;  // modules, and lists of tensors

uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

// What is known of torch, once for a process.
struct Torch {
  using Handle = const void*;  // the address of an at::Tensor, which holds the address of a TensorImpl
  template <typename T>
  using Getter = int32_t (*)(Handle, T*);  // returns 0, or an error

  Getter<void*> data_ptr;
  Getter<int64_t> dim;
  Getter<int64_t*> sizes, strides;
  Getter<int32_t> dtype, device_type, device_index, layout;
  int32_t strided;  // the layout of tensors that have an address and strides
  // Tensor and Parameter. Objects of other classes are asked in Python, where their classes may answer.
  std::array<PyTypeObject*, 2> plain;
  size_t offset;                 // of the at::Tensor in its Python object
  void (*bump_version)(Handle);  // of C++, torch::autograd::impl::bump_version(const at::Tensor&); or null
} torch;

void use_torch(const std::array<uint64_t, 8>& functions, int32_t strided, py::type tensor, py::type parameter,
               size_t offset, uint64_t bump_version) {
  const auto set = [&](auto& getter, int i) {
    getter = reinterpret_cast<std::decay_t<decltype(getter)>>(functions[i]);
  };
  set(torch.data_ptr, 0);
  set(torch.dim, 1);
  set(torch.sizes, 2);
  set(torch.strides, 3);
  set(torch.dtype, 4);
  set(torch.device_type, 5);
  set(torch.device_index, 6);
  set(torch.layout, 7);
  torch.strided = strided;
  torch.plain = {reinterpret_cast<PyTypeObject*>(tensor.ptr()), reinterpret_cast<PyTypeObject*>(parameter.ptr())};
  torch.offset = offset;
  torch.bump_version = reinterpret_cast<decltype(torch.bump_version)>(bump_version);
}

// Tells autograd that these of the tensors are written. `numbers`: the address of n int64. Returns whether all were.
bool bump_versions(const py::list& tensors, uint64_t numbers, int64_t n) {
  if (torch.bump_version == nullptr) return false;
  try {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t number = reinterpret_cast<const int64_t*>(numbers)[i];
      torch.bump_version(reinterpret_cast<const char*>(PyList_GET_ITEM(tensors.ptr(), number)) + torch.offset);
    }
  } catch (const std::exception&) {
    return false;  // inference tensors have no version
  }
  return true;
}

// The names of the dicts in which a module keeps its own.
const std::array<PyObject*, 3>& kinds() {
  static const std::array<PyObject*, 3> names = {PyUnicode_InternFromString("_parameters"),
                                                 PyUnicode_InternFromString("_buffers"),
                                                 PyUnicode_InternFromString("_modules")};
  return names;
}

// What one walk saw.
struct Seen {
  std::vector<uint64_t> words;
  std::vector<py::object> names;  // kept, because words hold their addresses
  std::vector<PyTypeObject*> types;
  std::vector<py::weakref> alive;  // the same types: a class can go, and another come to lie in its place
  std::vector<size_t> others;      // the tensors that must be asked in Python
  size_t n_tensors = 0;
  // The cache lines that a walk touches, and how many of them for each module and tensor and those before it.
  std::vector<uint64_t> lines;
  std::vector<size_t> upto;
};

// Looks at everything in one order. Recording, it writes down what it sees; else it stops at the first difference.
template <bool kRecords>
class Walk {
 public:
  explicit Walk(Seen& seen)
      : seen_(seen), next_(seen.words.data()), line_(seen.lines.data()), found_(kRecords ? 0 : seen.n_tensors) {}

  bool over(const Roots& roots) {
    if (!same(roots.size())) return false;
    for (const auto& root : roots) {
      if (!(PyList_CheckExact(root.ptr()) ? list(root.ptr()) : module(root.ptr()))) return false;
    }
    if (kRecords) seen_.n_tensors = n_found_;
    return true;
  }

  py::list found() { return std::move(found_); }

 private:
  bool same(uint64_t word) {
    if (kRecords) seen_.words.push_back(word);
    return kRecords || *next_++ == word;
  }

  bool same_type(PyTypeObject* type) {
    if (kRecords && std::find(seen_.types.begin(), seen_.types.end(), type) == seen_.types.end()) {
      seen_.types.push_back(type);
      seen_.alive.emplace_back(py::handle(reinterpret_cast<PyObject*>(type)));
    }
    return same(address(type));
  }

  bool same_name(PyObject* name) {
    if (!PyUnicode_Check(name)) return false;
    if (kRecords) seen_.names.push_back(py::reinterpret_borrow<py::object>(name));
    return same(address(name)) || PyUnicode_Compare(name, reinterpret_cast<PyObject*>(next_[-1])) == 0;
  }

  bool list(PyObject* tensors) {
    const Py_ssize_t n = PyList_GET_SIZE(tensors);
    if (!same(n)) return false;
    for (Py_ssize_t i = 0; i < n; ++i) {
      if (!tensor(PyList_GET_ITEM(tensors, i))) return false;
    }
    return true;
  }

  bool module(PyObject* module) {
    if (Py_EnterRecursiveCall(" in a tree of modules")) throw py::error_already_set();
    const bool holds = entered(module);
    Py_LeaveRecursiveCall();
    return holds;
  }

  bool entered(PyObject* module) {
    if (!same_type(Py_TYPE(module))) return false;
    if (!kRecords) fetch_ahead();
    const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!dict) throw py::error_already_set();
    // Kept while it is walked: to make a dict can run the garbage collector, and that can run anything.
    std::array<py::object, 3> own;
    for (size_t kind = 0; kind < own.size(); ++kind) {
      own[kind] = py::reinterpret_borrow<py::object>(entry(dict.ptr(), kinds()[kind]));
      // Scripted modules, for one, have no dicts.
      if (!own[kind] || !PyDict_Check(own[kind].ptr())) return false;
    }
    if (kRecords) {
      touches(reinterpret_cast<char*>(module) - 64, 128);  // what lies before an object may be its dict's address
      touches_dict(dict.ptr());
      for (const auto& held : own) touches_dict(held.ptr());
      seen_.upto.push_back(seen_.lines.size());
    }
    return held(own[0].ptr(), false) && held(own[1].ptr(), false) && held(own[2].ptr(), true);
  }

  // Of this name, or null. Where it stood last time it will stand again, which spares the lookup.
  PyObject* entry(PyObject* dict, PyObject* name) {
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t at = 0;
    if (kRecords) {
      Py_ssize_t here = 0;
      while (PyDict_Next(dict, &at, &key, &value) && key != name) here = at;
      same(here);
    } else {
      at = static_cast<Py_ssize_t>(*next_++);
      PyDict_Next(dict, &at, &key, &value);
    }
    return key == name ? value : PyDict_GetItem(dict, name);
  }

  bool held(PyObject* own, bool modules) {
    const Py_ssize_t n = PyDict_GET_SIZE(own);
    if (!same(n)) return false;
    PyObject *name, *value;
    for (Py_ssize_t i = 0, at = 0; i < n; ++i) {
      if (!PyDict_Next(own, &at, &name, &value) || !same_name(name)) return false;
      if (value == Py_None) {
        if (!same(0)) return false;
      } else if (modules) {
        const auto kept = py::reinterpret_borrow<py::object>(value);
        if (!module(value)) return false;
      } else if (!tensor(value)) {
        return false;
      }
    }
    return true;
  }

  bool tensor(PyObject* tensor) {
    PyTypeObject* type = Py_TYPE(tensor);
    if (!same_type(type)) return false;
    if (!kRecords) fetch_ahead();
    const char* object = reinterpret_cast<char*>(tensor);
    const void* handle = object + torch.offset;
    bool other = type != torch.plain[0] && type != torch.plain[1];
    if (!other) {
      int32_t layout;
      if (torch.layout(handle, &layout) != 0 || !same(layout)) return false;
      other = layout != torch.strided;
    }
    if (kRecords) {
      if (!PyType_IsSubtype(type, torch.plain[0])) return false;
      touches(object, 48);
      if (other) {
        seen_.others.push_back(n_found_);
      } else {
        touches_impl(*static_cast<const char* const*>(handle));
      }
      seen_.upto.push_back(seen_.lines.size());
      PyList_Append(found_.ptr(), tensor);
    } else {
      PyList_SET_ITEM(found_.ptr(), n_found_, Py_NewRef(tensor));
    }
    ++n_found_;
    return other || strided(handle);
  }

  bool strided(Torch::Handle handle) {
    void* data;
    int64_t dim, *sizes, *strides;
    int32_t dtype, type, index;
    if (torch.data_ptr(handle, &data) != 0 || torch.dim(handle, &dim) != 0 || torch.sizes(handle, &sizes) != 0 ||
        torch.strides(handle, &strides) != 0 || torch.dtype(handle, &dtype) != 0 ||
        torch.device_type(handle, &type) != 0 || torch.device_index(handle, &index) != 0) {
      return false;
    }
    bool holds = same(address(data)) && same(dtype) && same(type) && same(index) && same(dim);
    for (int64_t i = 0; holds && i < dim; ++i) holds = same(sizes[i]) && same(strides[i]);
    return holds;
  }

  void touches(const char* object, int bytes) {
    const uint64_t end = address(object) + bytes;
    for (uint64_t line = address(object) & ~uint64_t{63}; line < end; line += 64) {
      if (touched_.insert(line).second) seen_.lines.push_back(line);
    }
  }
  void touches_dict(PyObject* object) {
    const auto* dict = reinterpret_cast<PyDictObject*>(object);
    const int entries = static_cast<int>(std::min<Py_ssize_t>(dict->ma_used, 24));
    touches(reinterpret_cast<const char*>(dict), sizeof *dict);
    if (dict->ma_used == 0) return;
    touches(reinterpret_cast<const char*>(dict->ma_keys), 64 + 24 * entries);
    if (dict->ma_values != nullptr) touches(reinterpret_cast<const char*>(dict->ma_values), 8 * entries);
  }

  // Among the first words of a TensorImpl are the addresses of its storage and of its version counter. Which they are
  // is torch's own affair.
  void touches_impl(const char* impl) {
    touches(impl, 192);
    std::array<uint64_t, 8> words;
    std::memcpy(words.data(), impl, sizeof words);
    for (uint64_t word : words) {
      if (word > 1 << 16 && word < uint64_t{1} << 48 && word % 8 == 0) touches(reinterpret_cast<const char*>(word), 64);
    }
  }

  // A training step drives all of this from the cache, and each look would then wait for memory by itself. Asked for
  // some way ahead, the lines come together. They are hints: there may be nothing of ours any more.
  void fetch_ahead() {
    constexpr size_t kAhead = 8;  // modules and tensors
    const uint64_t* end = seen_.lines.data() + seen_.upto[std::min(item_++ + kAhead, seen_.upto.size() - 1)];
    for (; line_ < end; ++line_) __builtin_prefetch(reinterpret_cast<const void*>(*line_));
  }

  Seen& seen_;
  const uint64_t *next_, *line_;
  py::list found_;
  size_t n_found_ = 0, item_ = 0;
  std::unordered_set<uint64_t> touched_;  // while recording
};

class Watch {
 public:
  explicit Watch(const Roots& roots) {
    if (!Walk<true>(seen_).over(roots)) throw std::invalid_argument("a root holds what this walk does not know");
  }

  py::object look(const Roots& roots) {
    for (const auto& type : seen_.alive) {
      if (type().is_none()) return py::none();
    }
    Walk<false> walk(seen_);
    if (!walk.over(roots)) return py::none();
    return walk.found();
  }

  const std::vector<size_t>& others() const { return seen_.others; }

 private:
  Seen seen_;
};

}  // namespace

void bind_watch(py::module_& m) {
  m.def("use_torch", &use_torch, py::arg("functions"), py::arg("strided"), py::arg("tensor"), py::arg("parameter"),
        py::arg("offset"), py::arg("bump_version"));
  m.def("bump_versions", &bump_versions, py::arg("tensors"), py::arg("numbers"), py::arg("n"));
  py::class_<Watch>(m, "Watch")
      .def(py::init<const Roots&>(), py::arg("roots"))
      .def("look", &Watch::look, py::arg("roots"))
      .def_property_readonly("others", &Watch::others);
}

}  // namespace eman
