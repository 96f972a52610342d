// Loops of all sizes on a thread pool, one right after the other: every chunk must be done exactly once, however late a
// thread comes to a loop that the others have ended.
//
//   thread_pool_driver LOOPS
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "cpu/thread_pool.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: thread_pool_driver LOOPS\n");
    return 2;
  }
  const long loops = std::atol(argv[1]);
  constexpr int kMost = 64;
  pcm::ThreadPool pool(3);
  std::atomic<long> wrong{0};
  const auto drive = [&](unsigned seed) {
    // Outlives the loops: a chunk done twice may come late.
    const auto done = std::make_unique<std::atomic<int>[]>(kMost);
    for (long i = 0; i < loops; ++i) {
      seed = seed * 1664525u + 1013904223u;
      const int chunks = 2 + static_cast<int>(seed >> 16) % (kMost - 1);
      for (int c = 0; c < kMost; ++c) done[c].store(0);
      pool.parallel_for(chunks, [&](int chunk, int) { done[chunk].fetch_add(1); });
      for (int c = 0; c < kMost; ++c) wrong += done[c].load() != (c < chunks ? 1 : 0);
    }
  };
  std::thread other(drive, 2);
  drive(1);
  other.join();
  std::printf("thread_pool_driver: %ld loops, %ld chunks not done exactly once\n", 2 * loops, wrong.load());
  return wrong == 0 ? 0 : 1;
}
