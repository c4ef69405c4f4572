// Several plans at the same time on the CPU kernel, for ThreadSanitizer: threads that share only a student must not
// race. With an argument, two threads also share a teacher, to show that the sanitizer detects races. sanitize.py runs
// both.
#include <cstdio>
#include <thread>
#include <vector>

#include "eman_update.h"

int main(int argc, char**) {
  constexpr int kThreads = 4, kPieces = 5, kUpdates = 200;
  constexpr uint32_t kNumel = 1009;
  std::vector<float> student(kPieces * kNumel, 1.0f);
  std::vector<std::vector<float>> teachers(kThreads, std::vector<float>(kPieces * kNumel, 0.0f));
  std::vector<std::vector<eman::Chunk>> tables(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    auto& teacher = teachers[argc > 1 && t == 1 ? 0 : t];
    for (int piece = 0; piece < kPieces; ++piece) {
      eman::Chunk chunk{};
      chunk.teacher = reinterpret_cast<uint64_t>(&teacher[piece * kNumel]);
      chunk.student = reinterpret_cast<uint64_t>(&student[piece * kNumel]);
      chunk.numel = kNumel;
      tables[t].push_back(chunk);
    }
  }
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      unsigned long long skipped = 0;
      eman::Arguments arguments{};
      arguments.chunks = tables[t].data();
      arguments.n_teachers = 1;
      arguments.weights[0] = eman::Weight(0.5);
      arguments.skip_nonfinite = t % 2;
      arguments.skipped = &skipped;
      for (int i = 0; i < kUpdates; ++i) eman::update_cpu(arguments, kPieces, t % 2, 1);
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& teacher : teachers) {
    for (const float value : teacher) {
      if (argc == 1 && value != 1.0f) {
        fprintf(stderr, "%g\n", value);
        return 2;
      }
    }
  }
}
