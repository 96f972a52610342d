// Merge the next-token distributions of K experts and draw a token, without sorting the vocabulary. The semantics, down
// to the last integer, are those of pcm_fast/sampling.py.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/thread_pool.h"

namespace pcm {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Status : int { kOk = 0, kNaN = 1, kAllExcluded = 2 };

constexpr int64_t kMaxVocabulary = int64_t{1} << 22;  // an id and a mass of 2^40 share 64 bits in a sort key

// A strided row of V numbers in memory.
struct RowView {
  const void* data;
  int64_t stride;  // in elements
  DType dtype;
};

struct SampleParams {
  bool greedy;
  float temperature;
  int64_t top_k;
  double top_p;
  double min_p;
  uint64_t seed;
  uint64_t sequence;
  uint64_t position;
};

struct MixSampleRow {
  // In: either the logits of K experts and their weights, or one row of log-probabilities (experts = 0).
  int experts = 0;
  RowView logits[kMaxExperts];
  float weights[kMaxExperts];
  RowView log_p;
  int64_t vocabulary = 0;
  Merge merge = Merge::kLinear;
  float exponent = 1;
  bool draw = true;
  SampleParams params;
  // Out. The pointers may be null.
  int64_t token = -1;
  float logprob = 0;
  float* expert_logprobs = nullptr;  // [experts]: log p_i(token); NaN for an expert of weight 0
  float* log_probs = nullptr;        // [vocabulary]
  Status status = Status::kOk;
};

// Tempered probabilities (multiples of 2^-40, the greatest 1) in buckets by exponent and five leading bits of the
// mantissa.
struct MassHistogram {
  static constexpr int kBuckets = 41 * 32;
  uint64_t mass[kBuckets];  // in units of 2^-40
  uint64_t count[kBuckets];
};

// A row's vocabulary in chunks of whole blocks, shared out among the threads of a pool if there is one.
struct BlockRange {
  ThreadPool* pool;
  int64_t blocks;

  static constexpr int kChunksPerThread = 8;
  int threads() const { return pool == nullptr ? 1 : pool->size(); }
  int chunks() const {
    if (pool == nullptr) return 1;
    const int64_t most = int64_t{kChunksPerThread} * threads();
    return static_cast<int>(blocks < most ? blocks : most);
  }
  // f(begin, end, chunk, worker) for every chunk.
  template <class F>
  void for_chunks(F&& f) const {
    const int count = chunks();
    const auto one = [&](int chunk, int worker) {
      f(blocks * chunk / count, blocks * (chunk + 1) / count, chunk, worker);
    };
    if (pool == nullptr) {
      one(0, 0);
    } else {
      pool->parallel_for(count, one);
    }
  }
};

// What a row needs while it is worked on. It grows to the largest vocabulary seen and is then reused.
struct MixSampleWorkspace {
  std::vector<float> exps;       // [active experts][blocks * kBlock]: exp(logit - greatest)
  std::vector<float> log_p;      // [blocks * kBlock]
  std::vector<float> tempered;   // exp(log p / temperature), 1 for the most likely, rounded to multiples of 2^-40
  std::vector<float> block_top;  // greatest log p of each block
  std::vector<uint64_t> block_mass;
  std::vector<int64_t> candidates;
  std::vector<MassHistogram> histograms;  // one per thread
  std::vector<float> scratch;             // per thread: kMaxExperts padded blocks
  struct alignas(64) Partial {
    float top[kMaxExperts];
    uint64_t mass[kMaxExperts];
    bool bad;
  };
  std::vector<Partial> partials;  // one per chunk of the vocabulary

  void reserve(int64_t vocabulary, int experts, int threads);
};

class MixSampler {
 public:
  MixSampler(const Isa& isa, std::shared_ptr<ThreadPool> pool)
      : isa_(isa), pool_(std::move(pool)), workspaces_(pool_->size()) {}

  // Fills the outputs of every row. Many rows are shared out among the threads; few are split over the vocabulary. What
  // a row gives does not depend on which.
  void run(MixSampleRow* rows, int64_t count);

  const Isa& isa() const { return isa_; }
  int threads() const { return pool_->size(); }

 private:
  const Isa& isa_;
  std::mutex turn_;  // the workspaces belong to one call at a time
  std::shared_ptr<ThreadPool> pool_;
  std::vector<MixSampleWorkspace> workspaces_;
};

// One row, split over the vocabulary among the threads of a pool, or by the caller alone if there is no pool.
void mix_sample_row(const MixSampleKernels& kernels, ThreadPool* pool, MixSampleWorkspace& ws, MixSampleRow& row);

}  // namespace pcm
