#include "cpu/thread_pool.h"

#ifdef PCM_FAST_X86
#include <immintrin.h>
#endif

namespace pcm {
namespace {

constexpr int kSpinsBeforeSleep =
    10000;  // tens of microseconds: longer than the gap between two loops of a decode step
constexpr int kSpinsBeforeYield = 1000;

void pause() {
#ifdef PCM_FAST_X86
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) : tickets_(std::make_unique<Ticket[]>(threads > 1 ? threads : 1)) {
  // All threads exist before the first one looks at size().
  std::lock_guard<std::mutex> turn(turn_);
  workers_.reserve(threads > 1 ? threads - 1 : 0);
  for (int worker = 1; worker < threads; ++worker) workers_.emplace_back([this, worker] { work(worker); });
}

ThreadPool::~ThreadPool() {
  stop_.store(true, std::memory_order_relaxed);
  loop_.fetch_add(1, std::memory_order_release);
  loop_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::share_out(int chunks, Job job, const void* body) {
  const uint32_t loop = loop_.load(std::memory_order_relaxed) + 1;
  // A thread that is late for the loop before may read what follows, and must then find no ticket of that loop: it
  // would take a chunk of this one by it.
  for (int worker = 0; worker < size(); ++worker) {
    tickets_[worker].next.store(uint64_t{loop} << 32 | 0xFFFFFFFFu, std::memory_order_relaxed);
  }
  job_.store(job, std::memory_order_release);
  body_.store(body, std::memory_order_release);
  chunks_.store(chunks, std::memory_order_release);
  done_.store(0, std::memory_order_relaxed);
  for (int worker = 0; worker < size(); ++worker) {
    const auto begin = static_cast<uint64_t>(stretch_begin(worker, chunks));
    tickets_[worker].next.store(uint64_t{loop} << 32 | begin, std::memory_order_release);
  }
  loop_.store(loop, std::memory_order_release);
  loop_.notify_all();
  take_chunks(loop, 0);
  for (int spins = 0; done_.load(std::memory_order_acquire) != chunks; ++spins) {
    if (spins < kSpinsBeforeYield) {
      pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::take_chunks(uint32_t loop, int worker) {
  const Job job = job_.load(std::memory_order_acquire);
  const void* const body = body_.load(std::memory_order_acquire);
  const int chunks = chunks_.load(std::memory_order_acquire);
  for (int offset = 0; offset < size(); ++offset) {
    const int owner = (worker + offset) % size();
    std::atomic<uint64_t>& next = tickets_[owner].next;
    uint64_t ticket = next.load(std::memory_order_acquire);
    for (;;) {
      if (static_cast<uint32_t>(ticket >> 32) != loop) return;
      const auto chunk = static_cast<int64_t>(ticket & 0xFFFFFFFFu);
      if (chunk >= stretch_begin(owner + 1, chunks)) break;
      if (!next.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire))
        continue;
      job(body, static_cast<int>(chunk), worker);
      done_.fetch_add(1, std::memory_order_release);
      ticket = next.load(std::memory_order_acquire);
    }
  }
}

void ThreadPool::work(int worker) {
  {
    std::lock_guard<std::mutex> turn(turn_);
  }
  uint32_t seen = 0;
  for (;;) {
    for (int spins = 0; spins < kSpinsBeforeSleep && loop_.load(std::memory_order_acquire) == seen; ++spins) pause();
    loop_.wait(seen, std::memory_order_acquire);
    seen = loop_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_relaxed)) return;
    take_chunks(seen, worker);
  }
}

}  // namespace pcm
