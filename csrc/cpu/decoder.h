// One forward pass of a Llama-like model over many rows at once: the base weights are read once, whatever the number of
// rows, and each row may have a LoRA adapter of its own. A row of the pass is one token of one (sequence x expert), so
// a prompt and the next token of another sequence are the same thing here.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/isa.h"
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

// The low-rank difference of one linear layer, B scaled: out += (x A^T) B.
struct LoraSite {
  int rank = 0;
  std::vector<float> a;  // [rank][in]
  std::vector<float> b;  // [rank][out, padded to whole panels]
};

struct LoraAdapter {
  std::vector<LoraSite> sites;  // [layers * kSites]
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

class Decoder {
 public:
  Decoder(const Isa& isa, std::shared_ptr<ThreadPool> pool, DecoderShape shape);

  const DecoderShape& shape() const { return shape_; }
  DecoderLayer& layer(int index) { return layers_[index]; }
  PackedLinear embedding, head;  // an empty head is the embedding
  std::vector<float> final_norm;
  std::vector<float> rope_cos, rope_sin;  // [positions][head_dim / 2]
  std::vector<std::unique_ptr<LoraAdapter>> adapters;

  // Reads the batch, appends its keys and values to the cache and leaves the last hidden states in hidden().
  void forward(const DecoderBatch& batch, KvStorage& kv);
  // After forward: normalised hidden states [count][hidden] of some entries of the batch.
  void final_hidden(const int32_t* entries, int count, float* out);
  // Logits [count][vocabulary] of normalised hidden states.
  void logits(const float* hidden, int count, float* out);

  size_t bytes() const;

 private:
  struct Target {
    const PackedLinear* weights;
    const float* bias;
    float* out;
    int64_t out_stride;
    int site;  // index into LoraAdapter::sites, -1 for none
    bool add;  // to what out holds
  };

  void reserve(int count, int longest);
  void embed(const DecoderBatch& batch);
  void normalize(const float* x, const std::vector<float>& weight, int width, int count, float* out) const;
  void apply(const std::vector<Target>& targets, const float* x, int count, const int32_t* entry_adapters);
  void write_tile(const Target& target, int panel, int first, int rows, const float* tile) const;
  void rotate_and_store(const DecoderBatch& batch, const DecoderLayer& layer, int index, KvStorage& kv);
  void rotate(float* x, int heads, const float* norm, const float* cos, const float* sin) const;
  void attend(const DecoderBatch& batch, int index, const KvStorage& kv);
  void attend_head(const DecoderBatch& batch, int entry, int kv_head, int index, const KvStorage& kv, float* scores);
  // f(i) for i in [0, count), in chunks.
  template <class F>
  void for_rows(int count, const F& f) const;

  const Isa& isa_;
  std::shared_ptr<ThreadPool> pool_;
  DecoderShape shape_;
  std::vector<DecoderLayer> layers_;
  // Buffers, [count] rows each; they grow to the largest batch and stay.
  std::vector<float> x_, normed_, qkv_, attended_, gates_, shrunk_, scores_;
  int scores_stride_ = 0, rank_ = 0;  // rank_: the greatest among the adapters
};

}  // namespace pcm
