// A persistent team of threads that share out the chunks of a loop.
//
// Each thread starts on its own stretch of chunks, so that a loop after a loop over the same data finds it in the same
// caches, and then helps with the others' stretches. Nobody waits for a thread, only for chunks already begun: when
// another process has taken a core, the rest do its work, and the loop slows down in proportion instead of stalling at
// a barrier. Waiting threads spin for some microseconds and then sleep, so that a decode loop pays no wake-up and an
// idle process nothing.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace pcm {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls f(chunk, worker) for every chunk in [0, chunks), on any thread of the pool or the caller's (worker 0), and
  // returns when all are done. f must not throw and must not call back into the pool. Calls from several threads take
  // turns.
  template <class F>
  void parallel_for(int chunks, const F& f) {
    if (chunks <= 1 || workers_.empty()) {
      for (int chunk = 0; chunk < chunks; ++chunk) f(chunk, 0);
      return;
    }
    std::lock_guard<std::mutex> turn(turn_);
    share_out(
        chunks, [](const void* body, int chunk, int worker) { (*static_cast<const F*>(body))(chunk, worker); }, &f);
  }

 private:
  using Job = void (*)(const void* body, int chunk, int worker);

  // The next chunk of one thread's stretch, with the number of the loop in the upper half: a thread that comes late,
  // with an old number, takes nothing.
  struct alignas(64) Ticket {
    std::atomic<uint64_t> next{0};
  };

  void share_out(int chunks, Job job, const void* body);
  void take_chunks(uint32_t loop, int worker);
  void work(int worker);
  int stretch_begin(int worker, int chunks) const {
    return static_cast<int>(static_cast<int64_t>(chunks) * worker / size());
  }

  std::vector<std::thread> workers_;
  std::unique_ptr<Ticket[]> tickets_;
  std::mutex turn_;
  // What the current loop is. Atomic since a late thread may read them while the next loop is set up; it then takes
  // nothing.
  std::atomic<Job> job_{nullptr};
  std::atomic<const void*> body_{nullptr};
  std::atomic<int> chunks_{0};
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<uint32_t> loop_{0};
  alignas(64) std::atomic<int> done_{0};
};

}  // namespace pcm
