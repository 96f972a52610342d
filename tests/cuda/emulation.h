// Kernels on the CPU, for tests: the little of CUDA that csrc/cuda uses, made of real threads.
//
// The threads of a block are threads of the machine, __syncthreads is a barrier among them, and what is __shared__ is
// static. So a race between threads of a block is a race that ThreadSanitizer sees, and a bad address one that
// AddressSanitizer sees. Blocks come one after the other, in a random order that seed() chooses, as soon as a kernel
// has a barrier; without one every thread goes through the blocks on its own, and races between blocks are seen too.
//
// A warp's shuffle goes through a table, and all 32 threads have to take part. Launches return when all is done.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "emulated_graphs.h"

#define __CUDA_ARCH_LIST__ 0
#define __global__
#define __device__
#define __grid_constant__
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace emulation {

constexpr unsigned kWarp = 32;

class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

// Threads that stay from launch to launch: run(n, task) calls task(0) to task(n - 1), each in a thread of its own.
class Crew {
 public:
  ~Crew() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(unsigned size, const std::function<void(unsigned)>& task) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (threads_.size() < size) {
      threads_.emplace_back([this, index = threads_.size(), seen = round_] { work(index, seen); });
    }
    task_ = &task;
    size_ = size;
    left_ = threads_.size();
    ++round_;
    wake_.notify_all();
    done_.wait(lock, [this] { return left_ == 0; });
  }

 private:
  void work(size_t index, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [&] { return stop_ || round_ != seen; });
      if (stop_) return;
      seen = round_;
      lock.unlock();
      if (index < size_) (*task_)(static_cast<unsigned>(index));
      lock.lock();
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(unsigned)>* task_ = nullptr;
  unsigned size_ = 0;
  size_t left_ = 0;
  uint64_t round_ = 0;
  bool stop_ = false;
};

inline Crew& crew() {
  static Crew all;
  return all;
}

struct Warp {
  Barrier barrier{kWarp};
  uint64_t values[kWarp];
};

struct Launch {
  explicit Launch(unsigned threads) : barrier(threads) {
    for (unsigned i = 0; i < threads; i += kWarp) warps.push_back(std::make_unique<Warp>());
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Launch* current = nullptr;
inline thread_local bool has_met = false;  // whether this thread has waited for others in this block

inline std::mt19937_64& order() {
  static std::mt19937_64 random;
  return random;
}
inline void seed(uint64_t value) { order().seed(value); }

}  // namespace emulation

inline thread_local dim3 threadIdx, blockIdx, gridDim;

inline void __syncthreads() {
  emulation::has_met = true;
  emulation::current->barrier.wait();
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  if (mask != ~0u) throw std::logic_error("a shuffle without the whole warp");
  emulation::has_met = true;
  emulation::Warp& warp = *emulation::current->warps[threadIdx.x / emulation::kWarp];
  const unsigned lane = threadIdx.x % emulation::kWarp;
  std::memcpy(&warp.values[lane], &value, sizeof value);
  warp.barrier.wait();
  if (lane + offset < emulation::kWarp) std::memcpy(&value, &warp.values[lane + offset], sizeof value);
  warp.barrier.wait();
  return value;
}

inline int32_t atomicCAS(int32_t* address, int32_t expected, int32_t desired) {
  std::atomic_ref<int32_t>(*address).compare_exchange_strong(expected, desired);
  return expected;
}

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
  _Float16 value;
};

inline float __half2float(__half x) { return x.value; }
inline __half __float2half_rn(float x) { return {static_cast<_Float16>(x)}; }

namespace pcm {

constexpr const char* kDeviceType = "cpu";

template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), dim3 grid, unsigned threads, void*,
            const Arguments&... arguments) {
  if (threads % emulation::kWarp != 0 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 ||
      grid.z > 65535) {
    throw std::runtime_error(std::string(what) + ": invalid configuration");
  }
  std::vector<unsigned> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), emulation::order());
  emulation::Launch one(threads);
  emulation::crew().run(threads, [&](unsigned i) {
    emulation::current = &one;
    gridDim = grid;
    threadIdx = dim3(i, 0, 0);
    for (const unsigned block : blocks) {
      blockIdx = dim3(block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y);
      emulation::has_met = false;
      kernel(arguments...);
      if (emulation::has_met) one.barrier.wait();  // what is shared goes on to the next block
    }
  });
}

}  // namespace pcm
