// Runs the sources of the CUDA and CPU kernels on the host, under sanitizers. Each tensor has its own malloc, so that
// an access outside of it is detected. test_host_kernel.py writes the cases to standard input and compares the output.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "host_cuda.h"
// Included after host_cuda.h, which replaces CUDA's definitions.
#include "eman_update.cuh"
#include "eman_update.h"

namespace {

constexpr uint32_t kChunkSize = 16384;

struct Case {
  uint32_t pair, numel, teacher_bytes, student_bytes, teacher_offset, student_offset;
  uint64_t first;  // the number of its first element, for stochastic rounding
};

template <typename T>
void read(T* to, size_t count) {
  if (count && fread(to, sizeof(T), count, stdin) != count) {
    fprintf(stderr, "the input ended early\n");
    exit(2);
  }
}

// A tensor that ends where its allocation ends. The bytes before it, which give it an offset, are checked at the end.
struct Tensor {
  uint32_t offset, bytes;
  uint8_t* memory;
  Tensor(uint32_t offset, uint32_t bytes)
      : offset(offset), bytes(bytes), memory(static_cast<uint8_t*>(malloc(offset + bytes))) {
    memset(memory, 0x5A, offset);
  }
  uint64_t address() const { return reinterpret_cast<uint64_t>(memory + offset); }
  void write_out() const {
    for (uint32_t i = 0; i < offset; ++i) {
      if (memory[i] != 0x5A) {
        fprintf(stderr, "a byte before a tensor was written\n");
        exit(3);
      }
    }
    fwrite(memory + offset, 1, bytes, stdout);
    free(memory);
  }
};

}  // namespace

// argv[1]:
//   cuda, cpu                  the plain kernels
//   cuda-double, cuda-float    the same, with the momentum read from memory
//   cuda-general, cpu-general  one teacher, stochastic rounding, NaNs skipped, and bfloat16 copies of float teachers
//   cuda-several, cpu-several  the same, with three teachers: the first, and its elements rotated by one and by two
//   ...-nearest                the same, rounded to nearest, and NaNs are not skipped
//   cuda-swap, cpu-swap        the exchange
int main(int, char** argv) {
  const std::string kernel = argv[1];
  const auto is = [&](const char* what) { return kernel.find(what) != std::string::npos; };
  const bool several = is("several"), general = several || is("general"), swap = is("swap");
  const int n_teachers = several ? 3 : 1;
  double momenta[3] = {0, 0.25, 1};
  uint32_t count;
  read(momenta, 1);
  read(&count, 1);
  std::vector<Case> cases(count);
  read(cases.data(), count);

  std::vector<Tensor> students;
  std::vector<Tensor> teachers;  // of each case: a teacher, then its low-precision copy, which may have no bytes
  std::vector<eman::Chunk> table;
  for (const Case& c : cases) {
    Tensor original(c.teacher_offset, c.numel * c.teacher_bytes);
    read(original.memory + original.offset, original.bytes);
    students.emplace_back(c.student_offset, c.numel * c.student_bytes);
    read(students.back().memory + students.back().offset, students.back().bytes);
    const size_t mine = teachers.size();
    const bool casts = general && c.pair <= 2;  // float
    for (int k = 0; k < n_teachers; ++k) {
      teachers.emplace_back(original.offset, original.bytes);
      // Teachers that differ: teacher k begins with element k.
      const uint8_t *first = original.memory + original.offset, *end = first + original.bytes;
      const uint32_t shift = c.numel == 0 ? 0 : k % c.numel * c.teacher_bytes;
      std::rotate_copy(first, first + shift, end, teachers.back().memory + original.offset);
      teachers.emplace_back(c.teacher_offset / 2, casts ? c.numel * 2 : 0);
    }
    free(original.memory);
    for (uint32_t first = 0; first < c.numel; first += kChunkSize) {
      for (int k = 0; k < n_teachers; ++k) {
        eman::Chunk chunk{};
        chunk.teacher = teachers[mine + 2 * k].address() + uint64_t{first} * c.teacher_bytes;
        chunk.student = students.back().address() + uint64_t{first} * c.student_bytes;
        chunk.extra = casts ? teachers[mine + 2 * k + 1].address() + uint64_t{first} * 2 : c.first + first;
        chunk.numel = c.numel - first < kChunkSize ? c.numel - first : kChunkSize;
        chunk.pair = static_cast<uint16_t>(c.pair);
        const uint64_t addresses = chunk.teacher | chunk.student | (casts ? chunk.extra : 0);
        chunk.flags = addresses % 16 == 0 ? eman::kVector16 : 0;
        table.push_back(chunk);
      }
    }
  }

  unsigned long long skipped = 0;
  const int64_t step = 2;
  const float in_float = static_cast<float>(momenta[0]);
  eman::Arguments arguments{};
  arguments.chunks = table.data();
  arguments.n_teachers = n_teachers;
  for (int k = 0; k < n_teachers; ++k) arguments.weights[k] = eman::Weight(momenta[k]);
  arguments.stochastic = arguments.skip_nonfinite = !is("nearest");
  arguments.philox = {1, is("cuda") ? 0u : 2u};
  arguments.skipped = &skipped;
  if (is("cuda")) arguments.step = &step;
  if (is("double") || is("float")) {
    arguments.weights[0] = eman::Weight(0.25);
    arguments.momenta_are_double = is("double");
    arguments.momenta = is("double") ? static_cast<const void*>(momenta) : &in_float;
  }
  const auto n_pieces = static_cast<int64_t>(table.size()) / n_teachers;

  if (is("cpu")) {
    if (swap) {
      eman::swap_cpu(table.data(), n_pieces, 2);
    } else {
      eman::update_cpu(arguments, n_pieces, general, 2);
    }
  } else {
    for (blockIdx.x = 0; blockIdx.x < n_pieces; ++blockIdx.x) {
      for (threadIdx.x = 0; threadIdx.x < eman::kThreads; ++threadIdx.x) {
        if (swap) {
          eman_swap(table.data());
        } else if (several) {
          eman_update_several(arguments);
        } else if (general) {
          eman_update_general(arguments);
        } else {
          eman_update(arguments);
        }
      }
    }
  }

  for (size_t i = 0; i < teachers.size(); ++i) teachers[i].write_out();
  for (size_t i = 0; i < students.size(); ++i) students[i].write_out();
  fwrite(&skipped, sizeof skipped, 1, stdout);
}
