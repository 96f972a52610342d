#include "cpu/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

namespace pcm {
namespace {

constexpr int kChunksPerThread = 8;

}  // namespace

Decoder::Decoder(const Isa& isa, std::shared_ptr<ThreadPool> pool, DecoderShape shape)
    : isa_(isa), pool_(std::move(pool)), shape_(std::move(shape)), layers_(shape_.layers) {}

template <class F>
void Decoder::for_rows(int count, const F& f) const {
  const int chunks = std::min(count, kChunksPerThread * pool_->size());
  pool_->parallel_for(chunks, [&](int chunk, int) {
    for (int i = count * chunk / chunks; i < count * (chunk + 1) / chunks; ++i) f(i);
  });
}

void Decoder::reserve(int count, int longest) {
  const auto grow = [](std::vector<float>& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
  };
  const size_t n = count;
  const size_t wide = std::max({shape_.hidden, shape_.heads * shape_.head_dim, shape_.intermediate});
  grow(x_, n * shape_.hidden);
  grow(normed_, n * wide);
  grow(qkv_, n * (shape_.heads + 2 * shape_.kv_heads) * shape_.head_dim);
  grow(attended_, n * shape_.heads * shape_.head_dim);
  grow(gates_, n * 2 * shape_.intermediate);
  for (const auto& adapter : adapters) {
    for (const LoraSite& site : adapter->sites) rank_ = std::max(rank_, site.rank);
  }
  grow(shrunk_, n * 3 * rank_);
  scores_stride_ = std::max(scores_stride_, longest + 16);
  grow(scores_, static_cast<size_t>(scores_stride_) * pool_->size() * (shape_.heads / shape_.kv_heads));
}

void Decoder::forward(const DecoderBatch& batch, KvStorage& kv) {
  const int n = batch.count, hidden = shape_.hidden, inner = shape_.intermediate;
  const int q_width = shape_.heads * shape_.head_dim, kv_width = shape_.kv_heads * shape_.head_dim;
  const int qkv_width = q_width + 2 * kv_width;
  int longest = 0;
  for (int i = 0; i < n; ++i) longest = std::max(longest, batch.positions[i] + 1);
  reserve(n, longest);
  embed(batch);
  for (int l = 0; l < shape_.layers; ++l) {
    const DecoderLayer& layer = layers_[l];
    const auto target = [&](Site site, float* out, int64_t stride, bool add) {
      const auto& bias = layer.biases[site];
      return Target{&layer.weights[site], bias.empty() ? nullptr : bias.data(), out, stride, l * kSites + site, add};
    };
    normalize(x_.data(), layer.input_norm, hidden, n, normed_.data());
    float* qkv = qkv_.data();
    apply({target(kQ, qkv, qkv_width, false), target(kK, qkv + q_width, qkv_width, false),
           target(kV, qkv + q_width + kv_width, qkv_width, false)},
          normed_.data(), n, batch.adapters);
    rotate_and_store(batch, layer, l, kv);
    attend(batch, l, kv);
    apply({target(kO, x_.data(), hidden, true)}, attended_.data(), n, batch.adapters);
    normalize(x_.data(), layer.post_norm, hidden, n, normed_.data());
    float *gates = gates_.data(), *ups = gates + static_cast<size_t>(n) * inner;
    apply({target(kGate, gates, inner, false), target(kUp, ups, inner, false)}, normed_.data(), n, batch.adapters);
    for_rows(n, [&](int i) {
      isa_.decoder.gate(ups + static_cast<int64_t>(i) * inner, gates + static_cast<int64_t>(i) * inner, inner);
    });
    apply({target(kDown, x_.data(), hidden, true)}, gates, n, batch.adapters);
  }
}

void Decoder::final_hidden(const int32_t* entries, int count, float* out) {
  for_rows(count, [&](int i) {
    normalize(x_.data() + static_cast<int64_t>(entries[i]) * shape_.hidden, final_norm, shape_.hidden, 1,
              out + static_cast<int64_t>(i) * shape_.hidden);
  });
}

void Decoder::logits(const float* hidden, int count, float* out) {
  apply({Target{head.empty() ? &embedding : &head, nullptr, out, shape_.vocabulary, -1, false}}, hidden, count,
        nullptr);
}

void Decoder::embed(const DecoderBatch& batch) {
  for_rows(batch.count,
           [&](int i) { embedding.row(batch.tokens[i], x_.data() + static_cast<int64_t>(i) * shape_.hidden); });
}

// RMSNorm (Zhang and Sennrich 2019) of count rows.
void Decoder::normalize(const float* x, const std::vector<float>& weight, int width, int count, float* out) const {
  for (int r = 0; r < count; ++r, x += width, out += width) {
    const float mean = isa_.decoder.dot(x, x, width) / static_cast<float>(width);
    const float scale = 1.0f / std::sqrt(mean + shape_.norm_eps);
    for (int i = 0; i < width; ++i) out[i] = x[i] * scale * weight[i];
  }
}

// out (+)= weights x + bias + adapter, for every target: all read the same rows x.
void Decoder::apply(const std::vector<Target>& targets, const float* x, int count, const int32_t* entry_adapters) {
  const int in = targets[0].weights->in();
  const auto site_of = [&](const Target& target, int entry) -> const LoraSite* {
    if (entry_adapters == nullptr || entry_adapters[entry] < 0) return nullptr;
    const LoraSite& site = adapters[entry_adapters[entry]]->sites[target.site];
    return site.rank == 0 ? nullptr : &site;
  };
  const auto shrunk = [&](size_t target) { return shrunk_.data() + target * count * rank_; };
  if (entry_adapters != nullptr && rank_ > 0) {
    for_rows(static_cast<int>(targets.size()) * count, [&](int i) {
      const size_t t = i / count;
      const LoraSite* site = site_of(targets[t], i % count);
      if (site == nullptr) return;
      const float* row = x + static_cast<int64_t>(i % count) * in;
      for (int j = 0; j < site->rank; ++j) {
        shrunk(t)[(i % count) * rank_ + j] = isa_.decoder.dot(site->a.data() + static_cast<int64_t>(j) * in, row, in);
      }
    });
  }
  int panels = 0;
  for (const Target& target : targets) panels += target.weights->panels();
  for_rows(panels, [&](int panel) {
    size_t t = 0;
    while (panel >= targets[t].weights->panels()) panel -= targets[t++].weights->panels();
    const Target& target = targets[t];
    const PackedLinear& w = *target.weights;
    alignas(64) float tile[kRowTile * kPanel];
    for (int first = 0; first < count; first += kRowTile) {
      const int rows = std::min(kRowTile, count - first);
      isa_.decoder.panel(w.format(), w.panel(panel), in, x + static_cast<int64_t>(first) * in, in, rows, tile, kPanel);
      for (int r = 0; r < rows; ++r) {
        const LoraSite* site = target.site < 0 ? nullptr : site_of(target, first + r);
        if (site == nullptr) continue;
        const float* factors = shrunk(t) + (first + r) * rank_;
        const int64_t padded = static_cast<int64_t>(w.panels()) * kPanel;
        for (int j = 0; j < site->rank; ++j) {
          isa_.decoder.add_scaled(site->b.data() + j * padded + panel * kPanel, factors[j], tile + r * kPanel, kPanel);
        }
      }
      write_tile(target, panel, first, rows, tile);
    }
  });
}

void Decoder::write_tile(const Target& target, int panel, int first, int rows, const float* tile) const {
  const int start = panel * kPanel, width = std::min(kPanel, target.weights->out() - start);
  for (int r = 0; r < rows; ++r, tile += kPanel) {
    float* out = target.out + (first + r) * target.out_stride + start;
    for (int i = 0; i < width; ++i) {
      const float value = target.bias == nullptr ? tile[i] : tile[i] + target.bias[start + i];
      out[i] = target.add ? out[i] + value : value;
    }
  }
}

// Rotary embedding (Su et al. 2021) in the half-split form, after the norm of queries and keys if there is one.
void Decoder::rotate(float* x, int heads, const float* norm, const float* cos, const float* sin) const {
  const int dim = shape_.head_dim, half = dim / 2;
  for (int h = 0; h < heads; ++h, x += dim) {
    if (norm != nullptr) {
      const float scale = 1.0f / std::sqrt(isa_.decoder.dot(x, x, dim) / static_cast<float>(dim) + shape_.norm_eps);
      for (int i = 0; i < dim; ++i) x[i] = x[i] * scale * norm[i];
    }
    for (int i = 0; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      x[i] = a * cos[i] - b * sin[i];
      x[i + half] = b * cos[i] + a * sin[i];
    }
  }
}

void Decoder::rotate_and_store(const DecoderBatch& batch, const DecoderLayer& layer, int index, KvStorage& kv) {
  const int dim = shape_.head_dim, width = (shape_.heads + 2 * shape_.kv_heads) * dim;
  for_rows(batch.count, [&](int i) {
    float* q = qkv_.data() + static_cast<int64_t>(i) * width;
    float *k = q + shape_.heads * dim, *v = k + shape_.kv_heads * dim;
    const int64_t at = static_cast<int64_t>(batch.positions[i]) * (dim / 2);
    rotate(q, shape_.heads, layer.q_norm.empty() ? nullptr : layer.q_norm.data(), &rope_cos[at], &rope_sin[at]);
    rotate(k, shape_.kv_heads, layer.k_norm.empty() ? nullptr : layer.k_norm.data(), &rope_cos[at], &rope_sin[at]);
    kv.write(index, batch.block_tables + batch.rows[i] * batch.blocks_per_row, batch.positions[i], 1, k, v, 0);
  });
}

void Decoder::attend(const DecoderBatch& batch, int index, const KvStorage& kv) {
  const int tasks = batch.count * shape_.kv_heads;
  const int chunks = std::min(tasks, kChunksPerThread * pool_->size());
  const int64_t scores_of_worker = static_cast<int64_t>(scores_stride_) * (shape_.heads / shape_.kv_heads);
  pool_->parallel_for(chunks, [&](int chunk, int worker) {
    for (int i = tasks * chunk / chunks; i < tasks * (chunk + 1) / chunks; ++i) {
      attend_head(batch, i / shape_.kv_heads, i % shape_.kv_heads, index, kv,
                  scores_.data() + worker * scores_of_worker);
    }
  });
}

// The query heads that share one key/value head, for one token.
void Decoder::attend_head(const DecoderBatch& batch, int entry, int kv_head, int index, const KvStorage& kv,
                          float* scores) {
  const int dim = shape_.head_dim, group = shape_.heads / shape_.kv_heads, block_size = kv.shape().block_size;
  const int width = (shape_.heads + 2 * shape_.kv_heads) * dim;
  const int end = batch.positions[entry] + 1, window = shape_.windows[index];
  const int begin = window > 0 ? std::max(0, end - window) : 0;
  const int32_t* table = batch.block_tables + batch.rows[entry] * batch.blocks_per_row;
  const float* layer = static_cast<const float*>(kv.layer(index));
  const auto keys_at = [&](int t) {
    return layer + table[t / block_size] * kv.block_stride() + kv_head * kv.head_stride() +
           static_cast<size_t>(t % block_size) * dim;
  };
  const float* q = qkv_.data() + static_cast<int64_t>(entry) * width + kv_head * group * dim;
  float* out = attended_.data() + (static_cast<int64_t>(entry) * shape_.heads + kv_head * group) * dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  for (int t = begin; t < end; ++t) {
    const float* key = keys_at(t);
    for (int g = 0; g < group; ++g)
      scores[g * scores_stride_ + t - begin] = isa_.decoder.dot(q + g * dim, key, dim) * scale;
  }
  for (int g = 0; g < group; ++g) isa_.decoder.softmax(scores + g * scores_stride_, end - begin);
  std::fill_n(out, group * dim, 0.0f);
  for (int t = begin; t < end; ++t) {
    const float* value = keys_at(t) + kv.value_stride();
    for (int g = 0; g < group; ++g)
      isa_.decoder.add_scaled(value, scores[g * scores_stride_ + t - begin], out + g * dim, dim);
  }
}

size_t Decoder::bytes() const {
  size_t total = embedding.bytes() + head.bytes();
  for (const DecoderLayer& layer : layers_) {
    for (const PackedLinear& w : layer.weights) total += w.bytes();
  }
  for (const auto& adapter : adapters) {
    for (const LoraSite& site : adapter->sites) total += (site.a.size() + site.b.size()) * sizeof(float);
  }
  return total;
}

}  // namespace pcm
