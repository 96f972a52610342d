// Graphs for a GraphStore (graph_store.h) by CUDA's own stream capture, for those who launch their steps from C++.
// Python has torch.cuda.CUDAGraph for this, which also gives the graph a memory pool.
#pragma once

#include <cstdint>
#include <functional>

#include "graph_store.h"

namespace pcm {

// capture records what `step` launches on the stream instead of executing it; launch replays it there. The bytes of a
// graph are what the free memory of the device went down by. If step or CUDA fails, the capture is ended, nothing is
// left, and the error is thrown on: what step threw, or std::runtime_error with CUDA's words.
//   stream: not the default stream, which cannot be captured.
//   step(batch_bucket, draft): allocates nothing, waits for nothing; every buffer must outlive the graph.
GraphFunctions stream_capture(void* stream, std::function<void(int32_t batch_bucket, int32_t draft)> step);

}  // namespace pcm
