// Runs the source of both kernels on the host, under sanitizers: one malloc a tensor, so that an access outside of one
// is seen. tests/test_host_kernel.py writes the cases to standard input and compares what comes back.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

// What CUDA would define.
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__
static struct {
  unsigned x;
} threadIdx, blockIdx;

#include "eman_update.cuh"
#include "eman_update.h"

namespace {

struct Case {
  uint32_t pair, numel, teacher_bytes, student_bytes, teacher_offset, student_offset;
};

template <typename T>
void read(T* to, size_t count) {
  if (count && fread(to, sizeof(T), count, stdin) != count) {
    fprintf(stderr, "the input ended early\n");
    exit(2);
  }
}

// A tensor whose last byte is its allocation's last. The bytes before it, which offset it, are checked at the end.
struct Tensor {
  uint32_t offset, bytes;
  uint8_t* memory;
  Tensor(uint32_t offset, uint32_t bytes)
      : offset(offset), bytes(bytes), memory(static_cast<uint8_t*>(malloc(offset + bytes))) {
    memset(memory, 0x5A, offset);
    read(memory + offset, bytes);
  }
  uint64_t address() const { return reinterpret_cast<uint64_t>(memory + offset); }
  void check() const {
    for (uint32_t i = 0; i < offset; ++i) {
      if (memory[i] != 0x5A) {
        fprintf(stderr, "a byte before a tensor was written\n");
        exit(3);
      }
    }
  }
};

}  // namespace

int main(int argc, char** argv) {
  const char* kernel = argc > 1 ? argv[1] : "";
  double momentum;
  uint32_t count;
  read(&momentum, 1);
  read(&count, 1);
  std::vector<Case> cases(count);
  read(cases.data(), count);

  std::vector<Tensor> teachers, students;
  std::vector<eman::Chunk> table;
  for (const Case& c : cases) {
    teachers.emplace_back(c.teacher_offset, c.numel * c.teacher_bytes);
    students.emplace_back(c.student_offset, c.numel * c.student_bytes);
    for (uint32_t first = 0; first < c.numel; first += eman::kChunkSize) {
      eman::Chunk chunk{};
      chunk.teacher = teachers.back().address() + uint64_t{first} * c.teacher_bytes;
      chunk.student = students.back().address() + uint64_t{first} * c.student_bytes;
      chunk.numel = c.numel - first < eman::kChunkSize ? c.numel - first : eman::kChunkSize;
      chunk.pair = static_cast<uint16_t>(c.pair);
      chunk.flags = (chunk.teacher | chunk.student) % 16 == 0 ? eman::kVector16 : 0;
      table.push_back(chunk);
    }
  }

  if (strcmp(kernel, "cpu") == 0) {
    eman::update_cpu(reinterpret_cast<uint64_t>(table.data()), static_cast<int64_t>(table.size()), momentum, 2);
  } else {
    // By value, or read from where it lies, as a double or a float.
    const float in_float = static_cast<float>(momentum);
    const bool is_double = strcmp(kernel, "cuda-double") == 0;
    const bool is_float = strcmp(kernel, "cuda-float") == 0;
    const void* address = is_double ? static_cast<const void*>(&momentum) : is_float ? &in_float : nullptr;
    const eman::Params params{table.data(), eman::Weight(address ? 0.25 : momentum), address, is_double};
    for (blockIdx.x = 0; blockIdx.x < table.size(); ++blockIdx.x) {
      for (threadIdx.x = 0; threadIdx.x < eman::kThreads; ++threadIdx.x) eman_update(params);
    }
  }

  for (size_t i = 0; i < cases.size(); ++i) {
    teachers[i].check();
    students[i].check();
    fwrite(teachers[i].memory + teachers[i].offset, 1, teachers[i].bytes, stdout);
    free(teachers[i].memory);
    free(students[i].memory);
  }
}
