// A libFuzzer target: builds a chunk table from arbitrary bytes and runs it on the CPU and CUDA kernels under
// sanitizers. Each tensor has its own malloc, so that an access outside of it is detected. Both kernels must give the
// same numbers.
//
// For compilers without libFuzzer, define EMAN_DRIVER: main() then runs argv[1] random inputs.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "host_cuda.h"
// Included after host_cuda.h, which replaces CUDA's definitions.
#include "eman_update.cuh"
#include "eman_update.h"

namespace {

using namespace eman;

constexpr uint32_t kMostElements = 16384;  // per chunk

// Reads numbers from the input; zeros after its end.
struct Input {
  const uint8_t* at;
  size_t left;
  uint32_t next(uint32_t below) {
    uint32_t number = 0;
    for (int i = 0; i < 2 && left > 0; ++i, ++at, --left) number = number << 8 | *at;
    return number % below;
  }
};

// A tensor with the same values twice, for the CPU kernel and the CUDA kernel. It ends where its allocation ends.
struct Tensor {
  uint32_t offset, bytes;
  std::unique_ptr<uint8_t[]> memory[2];

  Tensor(uint32_t offset, uint32_t bytes, std::minstd_rand& random) : offset(offset), bytes(bytes) {
    for (auto& its : memory) {
      its.reset(new uint8_t[offset + bytes]);
      memset(its.get(), 0x5A, offset);
    }
    for (uint32_t i = 0; i < bytes; ++i) memory[0][offset + i] = static_cast<uint8_t>(random() >> 8);
    memcpy(memory[1].get() + offset, memory[0].get() + offset, bytes);
  }
  uint64_t address(int which) const { return reinterpret_cast<uint64_t>(memory[which].get()) + offset; }
  bool same_bytes() const { return memcmp(memory[0].get(), memory[1].get(), offset + bytes) == 0; }
  bool begins_as_it_was() const {
    for (uint32_t i = 0; i < offset; ++i) {
      if (memory[0][i] != 0x5A || memory[1][i] != 0x5A) return false;
    }
    return true;
  }
  template <typename T>
  bool same_numbers() const {
    for (uint32_t at = offset; at < offset + bytes; at += sizeof(T)) {
      T one, other;
      memcpy(&one, memory[0].get() + at, sizeof(T));
      memcpy(&other, memory[1].get() + at, sizeof(T));
      const auto a = widen(one), b = widen(other);
      if (!(a == b || (a != a && b != b))) return false;
    }
    return true;
  }
};

struct Piece {
  uint16_t pair;
  uint32_t numel;
  Tensor student;
  std::vector<Tensor> teachers, copies;
};

enum Kernel { kPlain, kGeneral, kSwap };

void run_on_cpu(Kernel kernel, const Arguments& arguments, int64_t n_pieces) {
  if (kernel == kSwap) {
    swap_cpu(arguments.chunks, n_pieces, 1);
  } else {
    update_cpu(arguments, n_pieces, kernel == kGeneral, 1);
  }
}

void run_as_cuda(Kernel kernel, const Arguments& arguments, int64_t n_pieces) {
  for (blockIdx.x = 0; blockIdx.x < n_pieces; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < static_cast<unsigned>(kThreads); ++threadIdx.x) {
      if (kernel == kSwap) {
        eman_swap(arguments.chunks);
      } else if (kernel == kGeneral) {
        (arguments.n_teachers == 1 ? eman_update_general : eman_update_several)(arguments);
      } else {
        eman_update(arguments);
      }
    }
  }
}

void expect(bool holds, const char* what) {
  if (holds) return;
  fprintf(stderr, "%s\n", what);
  abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input{data, size};
  const Kernel kernel = static_cast<Kernel>(input.next(3));
  const int n_teachers = kernel == kGeneral ? 1 + static_cast<int>(input.next(kMaxTeachers)) : 1;
  const int n_pieces = static_cast<int>(input.next(5));
  std::minstd_rand random(1 + input.next(1 << 16));

  std::vector<Piece> pieces;
  std::vector<Chunk> tables[2];
  for (int i = 0; i < n_pieces; ++i) {
    const auto pair = static_cast<uint16_t>(kernel == kSwap ? 8 + input.next(4) : input.next(12));
    // Mostly small, which tests the ends of chunks; sometimes a full chunk.
    const uint32_t numel = input.next(16) == 0 ? kMostElements - input.next(3) : 1 + input.next(600);
    uint32_t teacher_bytes = 0, student_bytes = 0;
    bool casts = false;
    with_rule(pair, Weight(), [&](auto rule) {
      teacher_bytes = sizeof(typename decltype(rule)::Teacher);
      student_bytes = sizeof(typename decltype(rule)::Student);
      casts = decltype(rule)::kCasts && kernel == kGeneral;
    });
    casts = casts && input.next(2);
    const bool copied = pair < 8 && kernel == kGeneral && input.next(4) == 0, to_half = input.next(2);
    Piece piece{pair, numel, Tensor(student_bytes * input.next(9), numel * student_bytes, random), {}, {}};
    const uint32_t first = 8 * input.next(1 << 16);
    for (int k = 0; k < n_teachers; ++k) {
      piece.teachers.emplace_back(teacher_bytes * input.next(9), numel * teacher_bytes, random);
      piece.copies.emplace_back(casts ? 2 * input.next(9) : 0, casts ? numel * 2 : 0, random);
    }
    // The kernels read kVector16 from the first record of a piece only, so it must hold for all teachers of the piece.
    for (int which = 0; which < 2; ++which) {
      uint64_t addresses = piece.student.address(which);
      for (int k = 0; k < n_teachers; ++k) {
        addresses |= piece.teachers[k].address(which) | (casts ? piece.copies[k].address(which) : 0);
      }
      for (int k = 0; k < n_teachers; ++k) {
        Chunk chunk{};
        chunk.teacher = piece.teachers[k].address(which);
        chunk.student = piece.student.address(which);
        chunk.extra = casts ? piece.copies[k].address(which) : teacher_bytes == 2 ? first : 0;
        chunk.numel = numel;
        chunk.pair = pair;
        chunk.flags = static_cast<uint16_t>((addresses % 16 == 0 ? kVector16 : 0) | (copied ? kCopied : 0) |
                                            (to_half ? kCastToHalf : 0));
        tables[which].push_back(chunk);
      }
    }
    pieces.push_back(std::move(piece));
  }

  const double kMomenta[] = {0.0, 0.3, 0.5, 0.999, 1.0, 1.0 - 0x1p-53};
  double momenta[kMaxTeachers];
  for (double& momentum : momenta) momentum = kMomenta[input.next(6)];
  const float found_inf = input.next(8) == 0 ? 1.0f : 0.0f;
  const int64_t step = input.next(1 << 16);
  unsigned long long skipped[2] = {0, 0};
  Arguments arguments{};
  arguments.n_teachers = n_teachers;
  for (int k = 0; k < n_teachers; ++k) arguments.weights[k] = Weight(momenta[k]);
  if (input.next(2)) {
    arguments.momenta = momenta;
    arguments.momenta_are_double = true;
  }
  if (input.next(2)) arguments.found_inf = &found_inf;
  arguments.stochastic = input.next(2);
  arguments.skip_nonfinite = input.next(2);
  arguments.philox = {input.next(1 << 16), static_cast<uint32_t>(step)};
  if (input.next(2)) arguments.step = &step;
  const bool counts = input.next(2);

  for (int which = 0; which < 2; ++which) {
    arguments.chunks = tables[which].data();
    arguments.skipped = counts ? &skipped[which] : nullptr;
    (which == 0 ? run_on_cpu : run_as_cuda)(kernel, arguments, n_pieces);
  }

  expect(skipped[0] == skipped[1], "the kernels skipped different numbers of elements");
  for (const Piece& piece : pieces) {
    expect(piece.student.begins_as_it_was() && piece.student.same_bytes(), "the students differ");
    for (int k = 0; k < n_teachers; ++k) {
      const Tensor &teacher = piece.teachers[k], &copy = piece.copies[k];
      expect(teacher.begins_as_it_was() && copy.begins_as_it_was(), "a byte before a tensor was written");
      bool same = teacher.same_bytes();
      if (!same && kernel != kSwap) {
        with_rule(piece.pair, Weight(), [&](auto rule) {
          using T = typename decltype(rule)::Teacher;
          if constexpr (decltype(rule)::kReadsTeacher) same = teacher.same_numbers<T>();
        });
      }
      expect(same, "the teachers differ");
      expect(copy.same_bytes() || copy.same_numbers<BFloat16>() || copy.same_numbers<Half>(), "the copies differ");
    }
  }
  return 0;
}

#if defined(EMAN_DRIVER)
int main(int, char** argv) {
  std::minstd_rand random(1);
  const long n = atol(argv[1]);
  for (long i = 0; i < n; ++i) {
    std::vector<uint8_t> data(200);
    for (auto& byte : data) byte = static_cast<uint8_t>(random() >> 8);
    LLVMFuzzerTestOneInput(data.data(), data.size());
  }
  printf("%ld inputs\n", n);
}
#endif
