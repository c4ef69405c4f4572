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
// free-threaded interpreter enables the GIL when it is imported. The garbage collector is off during a walk, because
// finalizers can run any code, which could free what the walk visits.
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
  static constexpr uint64_t kInlineDims = 5;
  struct Fields {
    size_t storage;      // address of the StorageImpl
    size_t first, last;  // words: number of dimensions, sizes, strides, number of the first element ... dispatch keys
    size_t data;         // in the StorageImpl: the address of the memory, then who frees it
  } fields;
} torch;

void use_torch(const std::array<uint64_t, 8>& functions, int32_t strided, py::type tensor, py::type parameter,
               size_t offset, size_t keys_offset, uint64_t bump_version, const std::array<size_t, 4>& fields) {
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
  torch.fields = {fields[0], fields[1], fields[2], fields[3]};
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

// Switches the garbage collector off, and on again if it was on.
class NoGarbageCollection {
 public:
  NoGarbageCollection() : was_enabled_(PyGC_Disable()) {}
  ~NoGarbageCollection() {
    if (was_enabled_) PyGC_Enable();
  }

 private:
  int was_enabled_;
};

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
    const NoGarbageCollection disabled;
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
    if (kRecords) {
      if (!PyUnicode_Check(name)) return false;
      snapshot_.names.push_back(py::reinterpret_borrow<py::object>(name));
    }
    return same(address(name)) ||
           (PyUnicode_Check(name) && PyUnicode_Compare(name, reinterpret_cast<PyObject*>(next_[-1])) == 0);
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
    if (kRecords && !record_module_lines(module, dict.ptr())) return false;
    const auto& [parameters, buffers, modules] = dict_names();
    return tensors(find_entry(dict.ptr(), parameters)) && tensors(find_entry(dict.ptr(), buffers)) &&
           children(find_entry(dict.ptr(), modules));
  }

  // The entry of this name in a dict, or null. Its position is recorded too: usually it is still there, which saves the
  // lookup.
  PyObject* find_entry(PyObject* dict, PyObject* name) {
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t at = 0;
    if (kRecords) {
      same(position(dict, name));
      return PyDict_GetItem(dict, name);
    }
    at = static_cast<Py_ssize_t>(*next_++);
    PyDict_Next(dict, &at, &key, &value);
    return key == name ? value : PyDict_GetItem(dict, name);
  }

  // What PyDict_Next needs to find the entry first.
  static Py_ssize_t position(PyObject* dict, PyObject* name) {
    PyObject *key = nullptr, *value = nullptr;
    Py_ssize_t here = 0, next = 0;
    while (PyDict_Next(dict, &next, &key, &value) && key != name) here = next;
    return here;
  }

  // Calls visit with each entry of one of a module's dicts. Scripted modules, for example, do not have these dicts.
  template <typename Visit>
  [[gnu::always_inline]] bool entries(PyObject* own, Visit visit) {
    if (own == nullptr || !PyDict_Check(own)) return false;
    const Py_ssize_t n = PyDict_GET_SIZE(own);
    if (!same(n)) return false;
    PyObject *name, *value;
    for (Py_ssize_t i = 0, at = 0; i < n; ++i) {
      if (!PyDict_Next(own, &at, &name, &value) || !same_name(name)) return false;
      if (!(value == Py_None ? same(0) : visit(value))) return false;
    }
    return true;
  }

  bool tensors(PyObject* own) {
    return entries(own, [this](PyObject* value) { return tensor(value); });
  }

  bool children(PyObject* own) {
    return entries(own, [this](PyObject* value) { return module(value); });
  }

  [[gnu::always_inline]] bool tensor(PyObject* tensor) {
    PyTypeObject* type = Py_TYPE(tensor);
    if (!same_type(type)) return false;
    const char* object = reinterpret_cast<char*>(tensor);
    const void* handle = object + torch.offset;
    const size_t number = n_found_++;
    if (!kRecords) {
      prefetch();
      PyList_SET_ITEM(found_.ptr(), number, Py_NewRef(tensor));
      return same_fields(impl_of(handle)) || described_as_before(number, type, handle);
    }
    if (!PyType_IsSubtype(type, torch.plain[0])) return false;
    PyList_Append(found_.ptr(), tensor);
    record_lines(object, 48);
    snapshot_.described_at.push_back(snapshot_.described.size());
    recorded_words_ = &snapshot_.described;
    n_dims_ = kOpaque;
    const bool holds = described(number, type, handle);
    recorded_words_ = &snapshot_.words;
    record_fields(impl_of(handle));
    snapshot_.lines_end.push_back(snapshot_.lines.size());
    return holds;
  }

  static const char* impl_of(Torch::Handle handle) { return *static_cast<const char* const*>(handle); }

  template <typename Word>
  static Word read(const void* at) {
    Word word;
    std::memcpy(&word, at, sizeof word);
    return word;
  }

  // Calls visit with the address and the number of the words that determine what torch's functions return: those of a
  // TensorImpl, then those of its StorageImpl.
  template <typename Visit>
  static void visit_fields(const char* impl, const char* storage, Visit visit) {
    const auto& at = torch.fields;
    visit(impl + at.first, (at.last - at.first) / 8 + 1);
    visit(storage + at.data, 3);
  }

  void record_fields(const char* impl) {
    const auto& at = torch.fields;
    const bool has_fields = at.data != 0 && n_dims_ <= Torch::kInlineDims;
    const uint64_t storage = has_fields ? read<uint64_t>(impl + at.storage) : 0;
    same(storage);
    if (storage == 0) {
      if (n_dims_ != kOpaque) record_impl_lines(impl);
      return;
    }
    visit_fields(impl, reinterpret_cast<const char*>(storage), [&](const char* words, size_t n) {
      for (size_t i = 0; i < n; ++i) same(read<uint64_t>(words + 8 * i));
    });
    record_lines(impl + at.storage, at.last + 8 - at.storage);
    record_lines(reinterpret_cast<const char*>(storage) + at.data, 24);
  }

  // Whether the fields of a tensor are those that were recorded: then torch's functions would return the same too. The
  // storage is read only if it is the recorded one, which the tensor keeps alive.
  bool same_fields(const char* impl) {
    using TwoWords = uint64_t __attribute__((vector_size(16)));
    const uint64_t storage = *next_++;
    if (storage == 0) return false;  // none were recorded
    const bool same_storage = read<uint64_t>(impl + torch.fields.storage) == storage;
    TwoWords different{};
    visit_fields(impl, reinterpret_cast<const char*>(storage), [&](const char* words, size_t n) {
      const uint64_t* end = next_ + n;
      if (same_storage) {
        for (size_t i = 0; i + 2 <= n; i += 2) different |= read<TwoWords>(words + 8 * i) ^ read<TwoWords>(next_ + i);
        if (n % 2) different[0] |= read<uint64_t>(words + 8 * (n - 1)) ^ end[-1];
      }
      next_ = end;
    });
    return same_storage && (different[0] | different[1]) == 0;
  }

  // Whether torch's functions return what they returned then.
  [[gnu::noinline]] bool described_as_before(size_t number, PyTypeObject* type, Torch::Handle handle) {
    const uint64_t* after = next_;
    next_ = snapshot_.described.data() + snapshot_.described_at[number];
    const bool holds = described(number, type, handle);
    next_ = after;
    return holds;
  }

  bool described(size_t number, PyTypeObject* type, Torch::Handle handle) {
    bool opaque = type != torch.plain[0] && type != torch.plain[1];
    if (!opaque) {
      int32_t layout;
      if (torch.layout(handle, &layout) != 0 || !same(layout)) return false;
      opaque = layout != torch.strided;
    }
    if (!opaque) return strided(handle);
    if (kRecords) snapshot_.opaque.push_back(number);
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
    if (torch.keys_offset != 0) keys = read<uint64_t>(impl_of(handle) + torch.keys_offset);
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
  bool record_module_lines(PyObject* module, PyObject* dict) {
    // From 64 bytes before the object, where CPython can store the address of its dict.
    record_lines(reinterpret_cast<char*>(module) - 64, 128);
    Py_ssize_t last = 0;
    for (PyObject* name : dict_names()) last = std::max(last, position(dict, name));
    record_dict_lines(dict, last + 1);
    for (PyObject* name : dict_names()) {
      PyObject* own = PyDict_GetItem(dict, name);
      if (own == nullptr || !PyDict_Check(own)) return false;
      record_dict_lines(own, PyDict_GET_SIZE(own));
    }
    snapshot_.lines_end.push_back(snapshot_.lines.size());
    return true;
  }
  // The dict itself, and of its keys the header, the index and the first entries.
  void record_dict_lines(PyObject* object, Py_ssize_t n_entries) {
    const auto* dict = reinterpret_cast<PyDictObject*>(object);
    const int n = static_cast<int>(std::min<Py_ssize_t>(n_entries, 64));
    const int index = static_cast<int>(std::clamp<Py_ssize_t>(2 * dict->ma_used, 8, 256));
    const int entry = PY_VERSION_HEX >= 0x030B0000 ? 16 : 24;
    record_lines(reinterpret_cast<const char*>(dict), sizeof *dict);
    if (dict->ma_used == 0) return;
    record_lines(reinterpret_cast<const char*>(dict->ma_keys), 32 + index + entry * n);
    if (dict->ma_values != nullptr) record_lines(reinterpret_cast<const char*>(dict->ma_values), 8 * n);
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
    const uint64_t *line = line_, *end = snapshot_.lines.data() + snapshot_.lines_end[item_++ + kAhead];
    for (; end - line >= 4; line += 4) {
      for (int i = 0; i < 4; ++i) __builtin_prefetch(reinterpret_cast<const void*>(line[i]));
    }
    for (; line < end; ++line) __builtin_prefetch(reinterpret_cast<const void*>(*line));
    line_ = end;
  }

  static constexpr size_t kAhead = 8;           // modules and tensors
  static constexpr uint64_t kOpaque = 1 << 16;  // in place of a number of dimensions: torch's functions return none

  Snapshot& snapshot_;
  std::vector<uint64_t>* recorded_words_;
  const uint64_t *next_, *line_;
  uint64_t n_dims_ = kOpaque;  // of the tensor that is being recorded
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
