// A recorded stand-in for CUDA's stream capture, for tests: a graph is the list of numbers that were "launched" on its
// stream while it was captured, and launching it appends them to what was executed. Any call can be made to fail.
#pragma once

#include <string>
#include <vector>

using cudaStream_t = struct EmulatedStream*;
using cudaGraph_t = std::vector<int>*;
using cudaGraphExec_t = std::vector<int>*;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };

struct cudaError_t {
  bool failed = false;
};

namespace emulation {

struct Graphs {
  cudaStream_t capturing = nullptr;
  std::vector<int> captured, executed;
  int templates = 0, executables = 0;  // alive
  size_t bytes_each = 100, held = 0;
  std::string failing;  // name of the call that fails

  void record(cudaStream_t stream, int launched) { (stream == capturing ? captured : executed).push_back(launched); }
  cudaError_t result(const char* call) const { return {failing == call}; }
};

inline Graphs& graphs() {
  static Graphs all;
  return all;
}

}  // namespace emulation

inline const char* cudaGetErrorString(cudaError_t) { return "made to fail"; }

inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *total = size_t{1} << 30;
  *free = *total - emulation::graphs().held;
  return emulation::graphs().result("cudaMemGetInfo");
}

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  auto& all = emulation::graphs();
  const cudaError_t result = all.result("cudaStreamBeginCapture");
  if (result.failed) return result;
  if (all.capturing != nullptr) return {true};
  all.capturing = stream;
  all.captured.clear();
  return result;
}

inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  auto& all = emulation::graphs();
  if (all.capturing != stream) return {true};
  all.capturing = nullptr;
  *graph = nullptr;  // a failed capture gives none
  const cudaError_t result = all.result("cudaStreamEndCapture");
  if (result.failed) return result;
  *graph = new std::vector<int>(all.captured);
  ++all.templates;
  return result;
}

inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  auto& all = emulation::graphs();
  const cudaError_t result = all.result("cudaGraphInstantiate");
  if (result.failed) return result;
  *exec = new std::vector<int>(*graph);
  ++all.executables;
  all.held += all.bytes_each;
  return result;
}

inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  --emulation::graphs().templates;
  delete graph;
  return {};
}

inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  auto& all = emulation::graphs();
  --all.executables;
  all.held -= all.bytes_each;
  delete exec;
  return {};
}

inline cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) {
  return emulation::graphs().result("cudaGraphUpload");
}

inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t) {
  auto& all = emulation::graphs();
  const cudaError_t result = all.result("cudaGraphLaunch");
  if (!result.failed) all.executed.insert(all.executed.end(), exec->begin(), exec->end());
  return result;
}

namespace pcm {

inline void check(const char* what, cudaError_t error) {
  if (error.failed) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace pcm
