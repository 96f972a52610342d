// csrc/cuda/stream_capture.cu and a GraphStore over a recorded stand-in for CUDA's graphs: the order of calls, and that
// every graph is destroyed once, whatever fails.
#include <cstdio>
#include <cstdlib>

#include "cuda/stream_capture.h"
#include "emulation.h"

namespace {

#define REQUIRE(condition) \
  if (!(condition)) throw std::logic_error("line " + std::to_string(__LINE__) + ": " #condition)

using emulation::graphs;
using pcm::GraphStore;

cudaStream_t stream() { return reinterpret_cast<cudaStream_t>(uintptr_t{7}); }

// A store whose steps launch their bucket and draft length; bucket 8 fails while it is recorded.
GraphStore make_store(int64_t budget) {
  const auto step = [](int32_t bucket, int32_t draft) {
    graphs().record(stream(), 10 * bucket + draft);
    if (bucket == 8) throw std::domain_error("the step failed");
  };
  return GraphStore(pcm::stream_capture(stream(), step), {1, 2, 4, 8}, budget);
}

template <class Error>
void require_error(const std::function<void()>& call, const std::string& words) {
  try {
    call();
  } catch (const Error& error) {
    if (std::string(error.what()).find(words) != std::string::npos) return;
    throw std::logic_error("expected '" + words + "', got '" + error.what() + "'");
  }
  throw std::logic_error("expected '" + words + "', got no error");
}

void test_capture_and_replay() {
  graphs() = {};
  {
    GraphStore store = make_store(300);
    REQUIRE(!store.run(1, 0) && !store.run(3, 2) && store.run(1, 0) && store.run(4, 2));
    REQUIRE((graphs().executed == std::vector<int>{10, 42, 10, 42}));
    REQUIRE(store.stats().bytes == 200 && graphs().executables == 2 && graphs().templates == 0);
    REQUIRE(!store.run(2, 0) && !store.run(2, 1));  // the fourth does not fit beside three others of 100 bytes
    REQUIRE(store.stats().evictions == 1 && store.stats().bytes == 300 && graphs().executables == 3);
  }
  REQUIRE(graphs().executables == 0 && graphs().capturing == nullptr);
}

void test_failures_leave_nothing() {
  graphs() = {};
  GraphStore store = make_store(300);
  (void)store.run(1, 0);
  require_error<std::domain_error>([&] { (void)store.run(8, 0); }, "the step failed");
  for (const char* call : {"cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate", "cudaGraphUpload",
                           "cudaMemGetInfo"}) {
    graphs().failing = call;
    require_error<std::runtime_error>([&] { (void)store.run(2, 0); }, std::string(call) + ": made to fail");
    graphs().failing.clear();
    REQUIRE(graphs().capturing == nullptr && graphs().templates == 0 && graphs().executables == 1);
    REQUIRE(store.stats().graphs == 1 && store.stats().captures == 1);
  }
  graphs().bytes_each = 301;
  require_error<std::length_error>([&] { (void)store.run(2, 0); }, "takes 301 bytes, the budget is 300");
  REQUIRE(graphs().executables == 1 && store.run(1, 0));
  graphs().failing = "cudaGraphLaunch";
  require_error<std::runtime_error>([&] { (void)store.run(1, 0); }, "cudaGraphLaunch: made to fail");
  graphs().failing.clear();
  REQUIRE(store.run(1, 0));
  store.clear();
  REQUIRE(graphs().executables == 0);
}

}  // namespace

int main() {
  try {
    test_capture_and_replay();
    test_failures_leave_nothing();
  } catch (const std::exception& e) {
    std::printf("FAILED: %s\n", e.what());
    return 1;
  }
  std::printf("passed: stream capture\n");
  return 0;
}
