// One forward pass of a Llama-like model over many rows at once: the base weights are read once, whatever the number of
// rows, and each row may have a LoRA adapter of its own. A row of the pass is one token of one (sequence x expert), so
// a prompt and the next token of another sequence are the same thing here.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/isa.h"
#include "cpu/lora.h"
#include "cpu/packed_linear.h"
#include "cpu/thread_pool.h"
#include "kv_storage.h"

namespace pcm {

enum Site : int { kQ, kK, kV, kO, kGate, kUp, kDown, kSites };

struct DecoderShape {
  int layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary;
  float norm_eps;
  std::vector<int> windows;  // per layer: how many last positions are seen, 0 for all
};

struct DecoderLayer {
  PackedLinear weights[kSites];
  std::vector<float> biases[kSites];  // empty for none
  std::vector<float> input_norm, post_norm;
  std::vector<float> q_norm, k_norm;  // empty for none
};

// The tokens of one pass. KV blocks for all positions must have been reserved; tokens of one row come in order of
// position.
struct DecoderBatch {
  int count = 0;
  const int32_t* tokens = nullptr;
  const int32_t* rows = nullptr;  // of the block tables
  const int32_t* positions = nullptr;
  const int32_t* adapters = nullptr;  // -1 for none
  const int32_t* block_tables = nullptr;
  int64_t blocks_per_row = 0;
};

// The parts of a pass whose time is told apart.
enum class Part : int { kEmbed, kPrepare, kQkv, kRotary, kAttention, kOutput, kGateUp, kDown, kHead, kParts };

class Decoder {
 public:
  Decoder(const Isa& isa, std::shared_ptr<ThreadPool> pool, DecoderShape shape);

  const DecoderShape& shape() const { return shape_; }
  const Isa& isa() const { return isa_; }
  DecoderLayer& layer(int index) { return layers_[index]; }
  Arena& arena() { return arena_; }
  PackedLinear embedding, head;  // an empty head is the embedding
  std::vector<float> final_norm;
  bool int8_activations = false;          // for weights in block formats
  std::vector<float> rope_cos, rope_sin;  // [positions][head_dim / 2]
  std::vector<std::unique_ptr<LoraAdapter>> adapters;

  // Reads the batch, appends its keys and values to the cache and keeps the last hidden states for final_hidden.
  void forward(const DecoderBatch& batch, KvStorage& kv);
  // After forward: normalised hidden states [count][hidden] of some entries of the batch.
  void final_hidden(const int32_t* entries, int count, float* out);
  // Logits [count][vocabulary] of normalised hidden states; adapters: of the head, [count] or null for none.
  void logits(const float* hidden, int count, const int32_t* row_adapters, float* out);

  size_t bytes() const;
  // Seconds spent in each part since construction.
  const std::array<double, static_cast<size_t>(Part::kParts)>& seconds() const { return seconds_; }

 private:
  struct Target {
    const PackedLinear* weights;
    const float* bias;
    int site;  // index into LoraAdapter::sites
    float* out;
    int64_t out_stride;
    bool add;  // to what out holds
  };
  using Targets = std::vector<Target>;
  struct AheadShares {
    const Run* runs;
    int64_t count;
    int panels;
    Ahead operator()(int panel) const {
      const int64_t begin = count * panel / panels, end = count * (panel + 1) / panels;
      return {runs + begin, static_cast<int>(end - begin)};
    }
  };
  // Rows of inputs that have been prepared for some targets.
  struct Inputs {
    const float* x;
    int count, width;
    const int32_t* adapters;  // null for none
  };

  template <class F>
  void for_stretches(int count, const F& f) const;
  template <class F>
  void for_rows(int count, const F& f) const;
  void reserve(int count, int longest);
  void embed(const DecoderBatch& batch);
  Target target(int layer, Site site, float* out, int64_t stride, bool add) const;
  const LoraSite* lora(const Inputs& inputs, int site, int row) const;
  void prepare(const Inputs& inputs, const Targets& targets, const float* norm, float* normed);
  void multiply(const Inputs& inputs, const Targets& targets);
  void multiply_gated(const Inputs& inputs, const Target& gate, const Target& up);
  void tile(const Inputs& inputs, const Target& target, int index, int panel, int first, int rows, float* out,
            const Ahead& ahead = {}) const;
  void look_ahead(const DecoderBatch& batch, int layer, const KvStorage& kv);
  AheadShares next_ahead(int panels, int in);
  void write_tile(const Target& target, int panel, int first, int rows, const float* values) const;
  void rotate_and_store(const DecoderBatch& batch, const DecoderLayer& layer, int index, KvStorage& kv);
  void rotate(float* x, int heads, const std::vector<float>& norm, const float* cos, const float* sin) const;
  void attend(const DecoderBatch& batch, int index, const KvStorage& kv);
  void attend_head(const DecoderBatch& batch, int entry, int kv_head, int index, const KvStorage& kv, float* scores);
  void done(Part part);

  const Isa& isa_;
  std::shared_ptr<ThreadPool> pool_;
  DecoderShape shape_;
  Arena arena_;  // of all weights and adapters
  std::vector<DecoderLayer> layers_;
  std::array<double, static_cast<size_t>(Part::kParts)> seconds_{};
  std::chrono::steady_clock::time_point mark_;
  // What a pass works on; it grows to the largest pass seen and is then reused.
  std::vector<float> x_, normed_, qkv_, attended_, gates_, sums_, scales_, shrunk_, scores_;
  static constexpr int kCodes = 2;  // nibbles and bytes
  std::vector<float> scaled_[kCodes];
  std::vector<int8_t> bytes_[kCodes];
  std::vector<Run> ahead_;
  int64_t ahead_taken_ = 0;  // work of the layer that has taken its share of ahead_
  int64_t scores_stride_ = 0;
  int rank_ = 0, sums_stride_ = 0;
};

}  // namespace pcm
