// Guards: before each update, check that everything that its plan depends on is unchanged.
//
// A walk visits the networks' modules and tensors in a fixed order and yields a sequence of 64-bit words: types, names,
// numbers of entries, and each tensor's address, dtype, device, shape and strides. When a plan is made, the walk
// records these words in a Snapshot. Before each update it walks again and compares each word with the recorded one. At
// the first difference it stops, and a new plan has to be made. Otherwise it returns the tensors that it found, which
// are the ones to update.
//
// Of a tensor the words are read from torch's own objects if Python has found where these store them (Torch::Fields):
// no call is needed then. Other tensors, and tensors of which such a word has changed, are compared by what torch's
// functions return.
//
// A snapshot keeps no module and no tensor alive, and it does not need to: it follows no recorded address of one. All
// objects are reached from the living networks. So a freed object is never read, and a new object at the address of a
// freed one is compared like any other.
//
// The code uses Python's C interface, and torch's stable C interface through function addresses that Python passes in,
// so that it does not link torch. The GIL is held throughout: this module does not declare that it works without, so a
// free-threaded interpreter enables the GIL when it is imported.
#include "guards.h"

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

using Roots = std::vector<py::object>;  // modules or lists of tensors, at which the walk starts

uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

// Functions and constants of torch, set once per process by use_torch.
struct Torch {
  using Handle = const void*;  // the address of an at::Tensor, which holds the address of a TensorImpl
  template <typename T>
  using Getter = int32_t (*)(Handle, T*);  // returns an error code, or 0

  Getter<void*> data_ptr;
  Getter<int64_t> dim;
  Getter<int64_t*> sizes, strides;
  Getter<int32_t> dtype, device_type, device_index, layout;
  int32_t strided;  // the code of the layout (torch.strided) in which a tensor has an address and strides
  // Tensor and Parameter. Other classes can override how they store data, so Python code checks their tensors.
  std::array<PyTypeObject*, 2> plain;
  size_t offset;                 // of the at::Tensor within its Python object
  size_t keys_offset;            // of the dispatch keys within a TensorImpl, or 0 if it is not known
  void (*bump_version)(Handle);  // torch::autograd::impl::bump_version(const at::Tensor&), or null

  // Where a TensorImpl and its StorageImpl store what the functions above return for a tensor of up to kInlineDims
  // dimensions: byte offsets that Python found. If it did not, all are 0 and the functions are called every time.
  static constexpr int kInlineDims = 5;
  struct Fields {
    size_t storage;      // address of the StorageImpl
    size_t dim, sizes;   // the strides follow the sizes of kInlineDims dimensions
    size_t first, last;  // from the number of the first element to the dispatch keys, with dtype, device and layout
    size_t data;         // in the StorageImpl: the address of the memory, then who frees it
  } fields;
} torch;

void use_torch(const std::array<uint64_t, 8>& functions, int32_t strided, py::type tensor, py::type parameter,
               size_t offset, size_t keys_offset, uint64_t bump_version, const std::array<size_t, 6>& fields) {
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
  torch.keys_offset = keys_offset;
  torch.bump_version = reinterpret_cast<decltype(torch.bump_version)>(bump_version);
  torch.fields = {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5]};
}

// Increments the version counters of some of the tensors, by which autograd notices writes. numbers: the address of n
// int64 indices into the list. Returns whether all were incremented.
bool bump_versions(const py::list& tensors, uint64_t numbers, int64_t n) {
  if (torch.bump_version == nullptr) return false;
  try {
    for (int64_t i = 0; i < n; ++i) {
      const int64_t number = reinterpret_cast<const int64_t*>(numbers)[i];
      torch.bump_version(reinterpret_cast<const char*>(PyList_GET_ITEM(tensors.ptr(), number)) + torch.offset);
    }
  } catch (const std::exception&) {
    return false;  // inference tensors have no version counter
  }
  return true;
}

// The names of the dicts in which an nn.Module stores its content.
const std::array<PyObject*, 3>& dict_names() {
  static const std::array<PyObject*, 3> names = {PyUnicode_InternFromString("_parameters"),
                                                 PyUnicode_InternFromString("_buffers"),
                                                 PyUnicode_InternFromString("_modules")};
  return names;
}

// What the walk recorded.
struct Snapshot {
  std::vector<uint64_t> words;
  std::vector<py::object> names;  // kept alive, because the words contain their addresses
  std::vector<PyTypeObject*> types;
  std::vector<py::weakref> type_refs;  // to the same types: after a class is freed, another can have its address
  std::vector<size_t> opaque;          // the indices of tensors whose memory must be checked in Python
  size_t n_tensors = 0;
  // What torch's functions return for each tensor, and where its words begin in this list: read only if one of its
  // fields has changed.
  std::vector<uint64_t> described;
  std::vector<size_t> described_at;
  // The cache lines that a walk reads, and for each module and tensor where its lines end in this list. As many more
  // entries as a walk prefetches ahead follow.
  std::vector<uint64_t> lines;
  std::vector<size_t> lines_end;
};

// The walk. With kRecords it fills the snapshot; without, it compares with it and stops at the first difference. Its
// functions return whether it goes on; while recording, false means that the guards cannot handle what was found.
template <bool kRecords>
class Walk {
 public:
  explicit Walk(Snapshot& seen)
      : snapshot_(seen),
        recorded_words_(&seen.words),
        next_(seen.words.data()),
        line_(seen.lines.data()),
        found_(kRecords ? 0 : seen.n_tensors) {}

  bool over(const Roots& roots) {
    if (!same(roots.size())) return false;
    for (const auto& root : roots) {
      if (!(PyList_CheckExact(root.ptr()) ? list(root.ptr()) : module(root.ptr()))) return false;
    }
    if (kRecords) {
      snapshot_.n_tensors = n_found_;
      snapshot_.lines_end.insert(snapshot_.lines_end.end(), kAhead, snapshot_.lines.size());
    }
    return true;
  }

  py::list found() { return std::move(found_); }

 private:
  // Every word goes through here, in both modes.
  bool same(uint64_t word) {
    if (kRecords) recorded_words_->push_back(word);
    return kRecords || *next_++ == word;
  }

  bool same_type(PyTypeObject* type) {
    if (kRecords && std::find(snapshot_.types.begin(), snapshot_.types.end(), type) == snapshot_.types.end()) {
      snapshot_.types.push_back(type);
      snapshot_.type_refs.emplace_back(py::handle(reinterpret_cast<PyObject*>(type)));
    }
    return same(address(type));
  }

  // Names are usually interned strings, so that their addresses are equal. If not, their text is compared.
  bool same_name(PyObject* name) {
    if (!PyUnicode_Check(name)) return false;
    if (kRecords) snapshot_.names.push_back(py::reinterpret_borrow<py::object>(name));
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
    const bool holds = module_content(module);
    Py_LeaveRecursiveCall();
    return holds;
  }

  bool module_content(PyObject* module) {
    if (!same_type(Py_TYPE(module))) return false;
    if (!kRecords) prefetch();
    const auto dict = py::reinterpret_steal<py::object>(PyObject_GenericGetDict(module, nullptr));
    if (!dict) throw py::error_already_set();
    // Hold references during the walk: creating a dict can run the garbage collector, which can run any code.
    std::array<py::object, 3> own;
    for (size_t kind = 0; kind < own.size(); ++kind) {
      own[kind] = py::reinterpret_borrow<py::object>(find_entry(dict.ptr(), dict_names()[kind]));
      // For example scripted modules do not have these dicts.
      if (!own[kind] || !PyDict_Check(own[kind].ptr())) return false;
    }
    if (kRecords) {
      // From 64 bytes before the object, where CPython can store the address of its dict.
      record_lines(reinterpret_cast<char*>(module) - 64, 128);
      record_dict_lines(dict.ptr());
      for (const auto& held : own) record_dict_lines(held.ptr());
      snapshot_.lines_end.push_back(snapshot_.lines.size());
    }
    return entries(own[0].ptr(), false) && entries(own[1].ptr(), false) && entries(own[2].ptr(), true);
  }

  // The entry of this name in a dict, or null. Its position is recorded too: usually it is still there, which saves the
  // lookup.
  PyObject* find_entry(PyObject* dict, PyObject* name) {
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

  // The modules or tensors in one of a module's dicts.
  bool entries(PyObject* own, bool modules) {
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
    const char* object = reinterpret_cast<char*>(tensor);
    const void* handle = object + torch.offset;
    bool holds;
    if (kRecords) {
      if (!PyType_IsSubtype(type, torch.plain[0])) return false;
      PyList_Append(found_.ptr(), tensor);
      record_lines(object, 48);
      snapshot_.described_at.push_back(snapshot_.described.size());
      recorded_words_ = &snapshot_.described;
      n_dims_ = kOpaque;
      holds = described(type, handle);
      recorded_words_ = &snapshot_.words;
      record_fields(impl_of(handle));
      snapshot_.lines_end.push_back(snapshot_.lines.size());
    } else {
      prefetch();
      PyList_SET_ITEM(found_.ptr(), n_found_, Py_NewRef(tensor));
      holds = same_fields(impl_of(handle)) || described_as_before(type, handle);
    }
    ++n_found_;
    return holds;
  }

  static const char* impl_of(Torch::Handle handle) { return *static_cast<const char* const*>(handle); }

  static uint64_t read_word(const char* at) {
    uint64_t word;
    std::memcpy(&word, at, sizeof word);
    return word;
  }

  // Calls visit with each word of a TensorImpl and its StorageImpl that determines what torch's functions return.
  template <typename Visit>
  static void visit_fields(const char* impl, const char* storage, uint64_t n_dims, Visit visit) {
    const auto& at = torch.fields;
    visit(read_word(impl + at.dim));
    for (uint64_t i = 0; i < n_dims; ++i) {
      visit(read_word(impl + at.sizes + 8 * i));
      visit(read_word(impl + at.sizes + 8 * (Torch::kInlineDims + i)));
    }
    for (size_t offset = at.first; offset <= at.last; offset += 8) visit(read_word(impl + offset));
    for (size_t i = 0; i < 3; ++i) visit(read_word(storage + at.data + 8 * i));
  }
  static uint64_t count_fields(uint64_t n_dims) {
    return 1 + 2 * n_dims + (torch.fields.last - torch.fields.first) / 8 + 1 + 3;
  }

  void record_fields(const char* impl) {
    const auto& at = torch.fields;
    const uint64_t storage = at.dim == 0 || n_dims_ > Torch::kInlineDims ? 0 : read_word(impl + at.storage);
    if (storage == 0) {
      same(kNoFields);
      if (n_dims_ != kOpaque) record_impl_lines(impl);
      return;
    }
    const char* memory = reinterpret_cast<const char*>(storage);
    same(n_dims_);
    same(storage);
    visit_fields(impl, memory, n_dims_, [&](uint64_t word) { same(word); });
    record_lines(impl + at.storage, at.last + 8 - at.storage);
    record_lines(memory + at.data, 24);
  }

  // Whether the fields of a tensor are those that were recorded: then torch's functions would return the same too. The
  // storage is read only if it is the recorded one, which the tensor keeps alive.
  bool same_fields(const char* impl) {
    const uint64_t n_dims = *next_++;
    if (n_dims == kNoFields) return false;
    const uint64_t* recorded = next_;
    next_ += 1 + count_fields(n_dims);
    const uint64_t storage = read_word(impl + torch.fields.storage);
    if (storage != *recorded++) return false;
    uint64_t different = 0;
    visit_fields(impl, reinterpret_cast<const char*>(storage), n_dims,
                 [&](uint64_t word) { different |= word ^ *recorded++; });
    return different == 0;
  }

  // Whether torch's functions return what they returned then.
  bool described_as_before(PyTypeObject* type, Torch::Handle handle) {
    const uint64_t* after = next_;
    next_ = snapshot_.described.data() + snapshot_.described_at[n_found_];
    const bool holds = described(type, handle);
    next_ = after;
    return holds;
  }

  bool described(PyTypeObject* type, Torch::Handle handle) {
    bool opaque = type != torch.plain[0] && type != torch.plain[1];
    if (!opaque) {
      int32_t layout;
      if (torch.layout(handle, &layout) != 0 || !same(layout)) return false;
      opaque = layout != torch.strided;
    }
    if (!opaque) return strided(handle);
    if (kRecords) snapshot_.opaque.push_back(n_found_);
    return true;
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
    // Of two tensors that are alike otherwise, one can be a lazily negated view: only its dispatch keys say so.
    uint64_t keys = 0;
    if (torch.keys_offset != 0) {
      std::memcpy(&keys, *static_cast<const char* const*>(handle) + torch.keys_offset, sizeof keys);
    }
    bool holds = same(keys) && same(address(data)) && same(dtype) && same(type) && same(index) && same(dim);
    for (int64_t i = 0; holds && i < dim; ++i) holds = same(sizes[i]) && same(strides[i]);
    if (kRecords) n_dims_ = dim;
    return holds;
  }

  // The following functions record which cache lines a walk reads, for prefetch. The sizes are estimates of what the
  // interpreter and torch read of an object; wrong ones make a walk slower, never wrong.
  void record_lines(const char* object, int bytes) {
    const uint64_t end = address(object) + bytes;
    for (uint64_t line = address(object) & ~uint64_t{63}; line < end; line += 64) {
      if (recorded_.insert(line).second) snapshot_.lines.push_back(line);
    }
  }
  void record_dict_lines(PyObject* object) {
    const auto* dict = reinterpret_cast<PyDictObject*>(object);
    const int entries = static_cast<int>(std::min<Py_ssize_t>(dict->ma_used, 24));
    record_lines(reinterpret_cast<const char*>(dict), sizeof *dict);
    if (dict->ma_used == 0) return;
    record_lines(reinterpret_cast<const char*>(dict->ma_keys), 64 + 24 * entries);
    if (dict->ma_values != nullptr) record_lines(reinterpret_cast<const char*>(dict->ma_values), 8 * entries);
  }

  // The first words of a TensorImpl include the addresses of its storage and its version counter. Which words these are
  // depends on the version of torch, so every word that could be an address counts.
  void record_impl_lines(const char* impl) {
    record_lines(impl, 192);
    std::array<uint64_t, 8> words;
    std::memcpy(words.data(), impl, sizeof words);
    for (uint64_t word : words) {
      if (word <= 1 << 16 || word >= uint64_t{1} << 48 || word % 8 != 0) continue;
      record_lines(reinterpret_cast<const char*>(word), 64);
    }
  }

  // A training step evicts all of these objects from the cache, and a walk would then wait for memory at each of them.
  // Prefetching some modules and tensors ahead lets these waits overlap. Prefetches are hints, which cannot fail: a
  // line may be unmapped by now.
  void prefetch() {
    const uint64_t* end = snapshot_.lines.data() + snapshot_.lines_end[item_++ + kAhead];
#pragma GCC unroll 8
    for (; line_ < end; ++line_) __builtin_prefetch(reinterpret_cast<const void*>(*line_));
  }

  static constexpr size_t kAhead = 8;  // modules and tensors
  // In place of a number of dimensions: a tensor that torch's functions do not describe, and one without fields.
  static constexpr int64_t kOpaque = 1 << 16;
  static constexpr uint64_t kNoFields = kOpaque;

  Snapshot& snapshot_;
  std::vector<uint64_t>* recorded_words_;
  const uint64_t *next_, *line_;
  int64_t n_dims_ = kOpaque;  // of the tensor that is being recorded
  py::list found_;
  size_t n_found_ = 0, item_ = 0;
  std::unordered_set<uint64_t> recorded_;  // the lines in snapshot_.lines
};

class Guards {
 public:
  // Records the networks as they are now. Throws std::invalid_argument if they hold something that is not supported.
  explicit Guards(const Roots& roots) {
    if (!Walk<true>(snapshot_).over(roots)) throw std::invalid_argument("a root holds an unsupported object");
  }

  // Returns the tensors in the order of the walk if everything is unchanged, else None. Of opaque tensors only the
  // class and the name are compared.
  py::object check(const Roots& roots) {
    for (const auto& type : snapshot_.type_refs) {
      if (type().is_none()) return py::none();
    }
    Walk<false> walk(snapshot_);
    if (!walk.over(roots)) return py::none();
    return walk.found();
  }

  // The indices of tensors whose memory must be checked in Python.
  const std::vector<size_t>& opaque() const { return snapshot_.opaque; }

 private:
  Snapshot snapshot_;
};

}  // namespace

void bind_guards(py::module_& m) {
  m.def("use_torch", &use_torch, py::arg("functions"), py::arg("strided"), py::arg("tensor"), py::arg("parameter"),
        py::arg("offset"), py::arg("keys_offset"), py::arg("bump_version"), py::arg("fields"));
  m.def("bump_versions", &bump_versions, py::arg("tensors"), py::arg("numbers"), py::arg("n"));
  py::class_<Guards>(m, "Guards")
      .def(py::init<const Roots&>(), py::arg("roots"))
      .def("check", &Guards::check, py::arg("roots"))
      .def_property_readonly("opaque", &Guards::opaque);
}

}  // namespace eman
