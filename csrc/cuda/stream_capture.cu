#include <algorithm>
#include <memory>
#include <utility>

#include "device.h"
#include "stream_capture.h"

namespace pcm {
namespace {

size_t free_bytes() {
  size_t free = 0, total = 0;
  check("cudaMemGetInfo", cudaMemGetInfo(&free, &total));
  return free;
}

// What a stream is given to do between construction and finish() is recorded.
class Recording {
 public:
  explicit Recording(cudaStream_t stream) : stream_(stream) {
    // Of this thread alone: what others do to the device meanwhile is not forbidden.
    check("cudaStreamBeginCapture", cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  }

  ~Recording() {
    // Fails if the capture did; the stream is free all the same.
    if (!finished_) cudaStreamEndCapture(stream_, &graph_);
    if (graph_ != nullptr) cudaGraphDestroy(graph_);
  }

  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;

  cudaGraph_t finish() {
    finished_ = true;
    check("cudaStreamEndCapture", cudaStreamEndCapture(stream_, &graph_));
    return graph_;
  }

 private:
  cudaStream_t stream_;
  cudaGraph_t graph_ = nullptr;
  bool finished_ = false;
};

}  // namespace

GraphFunctions stream_capture(void* stream_address, std::function<void(int32_t, int32_t)> step) {
  const auto stream = static_cast<cudaStream_t>(stream_address);
  const auto capture = [stream, step = std::move(step)](int32_t batch_bucket, int32_t draft) -> CapturedGraph {
    const size_t before = free_bytes();
    Recording recording(stream);
    step(batch_bucket, draft);
    cudaGraphExec_t exec = nullptr;
    check("cudaGraphInstantiate", cudaGraphInstantiate(&exec, recording.finish(), 0));
    const std::shared_ptr<void> graph(exec,
                                      [](void* dead) { cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(dead)); });
    check("cudaGraphUpload", cudaGraphUpload(exec, stream));  // now, and not in the first launch: its memory counts too
    const size_t after = free_bytes();
    return {graph, static_cast<int64_t>(before - std::min(before, after))};
  };
  const auto launch = [stream](void* graph) {
    check("cudaGraphLaunch", cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), stream));
  };
  return {capture, launch};
}

}  // namespace pcm
