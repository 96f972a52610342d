// Captured decode steps, kept for replay: one graph for each (batch bucket, draft length).
//
// A graph has fixed shapes, so a batch is padded to the smallest bucket that holds it. What a graph is, this store does
// not know: it is given a function that captures one and one that launches one. In Python these make and replay
// torch.cuda.CUDAGraph; stream_capture.h (csrc/cuda) makes them from the raw CUDA calls; tests give recorded stand-ins.
//
// The sizes of all graphs together stay within a budget: before a new one is taken in, those that have not been run for
// the longest time go. Nothing is taken in, and nothing goes, if the capture fails.
//
// Host only. Not thread-safe: the thread that runs the engine owns the store.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

namespace pcm {

struct CapturedGraph {
  std::shared_ptr<void> graph;  // whose deleter destroys it
  int64_t bytes;                // of device memory that it holds
};

struct GraphFunctions {
  // Captures the decode step for that many sequences without executing it. What it throws, run throws.
  std::function<CapturedGraph(int32_t batch_bucket, int32_t draft)> capture;
  std::function<void(void* graph)> launch;
};

struct GraphStoreStats {
  int32_t graphs;                        // now,
  int64_t bytes;                         //   and what they hold together
  int64_t captures, replays, evictions;  // since construction; a replay is a run that found its graph
};

class GraphStore {
 public:
  // buckets: batch sizes, ascending. Throws std::invalid_argument if they are not, or are not positive, and for a
  // negative budget.
  GraphStore(GraphFunctions functions, std::vector<int32_t> buckets, int64_t budget_bytes);

  // The smallest bucket >= batch. Throws std::invalid_argument if there is none or batch is not positive.
  int32_t bucket(int32_t batch) const;

  // Launches the graph of (bucket(batch), draft). True: it was there. False: it was captured first.
  // Throws std::invalid_argument for a bad batch or a negative draft length, std::length_error if the new graph alone
  // is larger than the budget, std::logic_error if called from within capture or launch, and whatever these throw. The
  // store is then as it was, save that a graph whose first launch failed stays.
  bool run(int32_t batch, int32_t draft);

  GraphStoreStats stats() const;

  // Destroys all graphs. They must not be running. Throws std::logic_error if called from within capture or launch.
  void clear();

  const std::vector<int32_t>& buckets() const { return buckets_; }
  int64_t budget_bytes() const { return budget_bytes_; }

 private:
  struct Entry {
    int32_t bucket, draft;
    CapturedGraph captured;
  };

  CapturedGraph capture(int32_t bucket, int32_t draft);
  void check_idle(const char* what) const;

  GraphFunctions functions_;
  std::vector<int32_t> buckets_;
  int64_t budget_bytes_;
  std::vector<Entry> entries_;  // in order of their last run; there are as many as buckets times draft lengths, a few
  int64_t bytes_ = 0, captures_ = 0, replays_ = 0, evictions_ = 0;
  bool busy_ = false;
};

}  // namespace pcm
