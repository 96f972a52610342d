#include "cpu/decoder.h"

#include <algorithm>
#include <utility>

namespace pcm {
namespace {

constexpr int kChunksPerThread = 8;
constexpr int kInputBytes = 256 * 1024;  // of inputs that stay in the second-level cache while panels go by

constexpr int kRowsToLookAhead = 16;
constexpr size_t kRunBytes = 2048;

// Rows that meet a stretch of panels together.
int rows_together(int in) { return std::clamp(kInputBytes / 4 / in / 12 * 12, 12, kRowTile); }

bool has_groups(Format format) { return format != Format::kFloat32 && format != Format::kBFloat16; }

// Which of the two forms of the inputs a format wants: for nibbles or for bytes.
int codes_of(Format format) { return format == Format::kQ8_0 ? 1 : 0; }

const float* data_or_null(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

}  // namespace

Decoder::Decoder(const Isa& isa, std::shared_ptr<ThreadPool> pool, DecoderShape shape)
    : isa_(isa), pool_(std::move(pool)), shape_(std::move(shape)), layers_(shape_.layers) {}

// f(begin, end) for stretches that make up [0, count).
template <class F>
void Decoder::for_stretches(int count, const F& f) const {
  const int chunks = std::min(count, kChunksPerThread * pool_->size());
  pool_->parallel_for(chunks, [&](int chunk, int) {
    f(static_cast<int>(int64_t{count} * chunk / chunks), static_cast<int>(int64_t{count} * (chunk + 1) / chunks));
  });
}

template <class F>
void Decoder::for_rows(int count, const F& f) const {
  for_stretches(count, [&](int begin, int end) {
    for (int i = begin; i < end; ++i) f(i);
  });
}

void Decoder::reserve(int count, int longest) {
  const auto grow = [](std::vector<float>& buffer, size_t size) {
    if (buffer.size() < size) buffer.resize(size);
  };
  const size_t n = count;
  const int q_width = shape_.heads * shape_.head_dim;
  const int widest = std::max({shape_.hidden, q_width, shape_.intermediate});
  grow(x_, n * shape_.hidden);
  grow(normed_, n * shape_.hidden);
  grow(qkv_, n * (shape_.heads + 2 * shape_.kv_heads) * shape_.head_dim);
  grow(attended_, n * q_width);
  grow(gates_, n * shape_.intermediate);
  sums_stride_ = (widest + kGroup - 1) / kGroup;
  grow(sums_, n * sums_stride_);
  grow(scales_, n * sums_stride_);
  for (int codes = 0; codes < kCodes; ++codes) {
    grow(scaled_[codes], n * widest);
    if (int8_activations && bytes_[codes].size() < n * widest) bytes_[codes].resize(n * widest);
  }
  for (const auto& adapter : adapters) {
    for (const LoraSite& site : adapter->sites) rank_ = std::max(rank_, site.rank());
  }
  grow(shrunk_, n * 3 * rank_);
  scores_stride_ = std::max<int64_t>(scores_stride_, longest + 2 * kKvBlock);
  grow(scores_, static_cast<size_t>(scores_stride_) * pool_->size() * (shape_.heads / shape_.kv_heads));
}

void Decoder::forward(const DecoderBatch& batch, KvStorage& kv) {
  const int n = batch.count, hidden = shape_.hidden, inner = shape_.intermediate;
  const int q_width = shape_.heads * shape_.head_dim, kv_width = shape_.kv_heads * shape_.head_dim;
  const int qkv_width = q_width + 2 * kv_width;
  const int longest = 1 + *std::max_element(batch.positions, batch.positions + n);
  mark_ = std::chrono::steady_clock::now();
  reserve(n, longest);
  embed(batch);
  done(Part::kEmbed);
  const Inputs normed{normed_.data(), n, hidden, batch.adapters},
      attended{attended_.data(), n, q_width, batch.adapters}, gated{gates_.data(), n, inner, batch.adapters};
  float* qkv = qkv_.data();
  for (int l = 0; l < shape_.layers; ++l) {
    const DecoderLayer& layer = layers_[l];
    const Targets projections{target(l, kQ, qkv, qkv_width, false), target(l, kK, qkv + q_width, qkv_width, false),
                              target(l, kV, qkv + q_width + kv_width, qkv_width, false)};
    prepare(normed, projections, layer.input_norm.data(), normed_.data());
    multiply(normed, projections);
    done(Part::kQkv);
    rotate_and_store(batch, layer, l, kv);
    done(Part::kRotary);
    attend(batch, l, kv);
    done(Part::kAttention);
    look_ahead(batch, l + 1, kv);
    const Targets output{target(l, kO, x_.data(), hidden, true)};
    prepare(attended, output, nullptr, nullptr);
    multiply(attended, output);
    done(Part::kOutput);
    const Targets gates{target(l, kGate, gates_.data(), inner, false), target(l, kUp, gates_.data(), inner, false)};
    prepare(normed, gates, layer.post_norm.data(), normed_.data());
    multiply_gated(normed, gates[0], gates[1]);
    done(Part::kGateUp);
    const Targets down{target(l, kDown, x_.data(), hidden, true)};
    prepare(gated, down, nullptr, nullptr);
    multiply(gated, down);
    done(Part::kDown);
  }
}

void Decoder::final_hidden(const int32_t* entries, int count, float* out) {
  const int hidden = shape_.hidden;
  for (int i = 0; i < count; ++i) {
    isa_.decoder.rms_norm(x_.data() + static_cast<int64_t>(entries[i]) * hidden, final_norm.data(), shape_.norm_eps,
                          hidden, out + static_cast<int64_t>(i) * hidden);
  }
}

void Decoder::logits(const float* hidden, int count, const int32_t* row_adapters, float* out) {
  mark_ = std::chrono::steady_clock::now();
  reserve(count, 0);
  const Inputs inputs{hidden, count, shape_.hidden, row_adapters};
  const Targets targets{
      {head.empty() ? &embedding : &head, nullptr, shape_.layers * kSites, out, shape_.vocabulary, false}};
  prepare(inputs, targets, nullptr, nullptr);
  multiply(inputs, targets);
  done(Part::kHead);
}

void Decoder::done(Part part) {
  const auto now = std::chrono::steady_clock::now();
  seconds_[static_cast<size_t>(part)] += std::chrono::duration<double>(now - mark_).count();
  mark_ = now;
}

void Decoder::embed(const DecoderBatch& batch) {
  for_rows(batch.count,
           [&](int i) { embedding.row(batch.tokens[i], x_.data() + static_cast<int64_t>(i) * shape_.hidden); });
}

Decoder::Target Decoder::target(int layer, Site site, float* out, int64_t stride, bool add) const {
  return {&layers_[layer].weights[site],
          data_or_null(layers_[layer].biases[site]),
          layer * kSites + site,
          out,
          stride,
          add};
}

const LoraSite* Decoder::lora(const Inputs& inputs, int site, int row) const {
  if (inputs.adapters == nullptr || inputs.adapters[row] < 0) return nullptr;
  const LoraSite& found = adapters[inputs.adapters[row]]->sites[site];
  return found.rank() == 0 ? nullptr : &found;
}

// What the targets need of each row before their panels: its norm if one is given (of x_, into the row), sums by group,
// and its product with the first factor of its adapter.
void Decoder::prepare(const Inputs& inputs, const Targets& targets, const float* norm, float* normed) {
  const DecoderKernels& kernels = isa_.decoder;
  for_rows(inputs.count, [&](int row) {
    const float* x = inputs.x + static_cast<int64_t>(row) * inputs.width;
    if (norm != nullptr) {
      const int64_t at = static_cast<int64_t>(row) * inputs.width;
      kernels.rms_norm(x_.data() + at, norm, shape_.norm_eps, inputs.width, normed + at);
    }
    const int groups = inputs.width / kGroup;
    float* sums = sums_.data() + static_cast<int64_t>(row) * sums_stride_;
    const int64_t at = static_cast<int64_t>(row) * inputs.width;
    bool prepared[kCodes] = {};
    for (const Target& target : targets) {
      const Format format = target.weights->format();
      if (!has_groups(format) || prepared[codes_of(format)]) continue;
      prepared[codes_of(format)] = true;
      if (int8_activations) {
        float* scales = scales_.data() + static_cast<int64_t>(row) * sums_stride_;
        kernels.quantize_inputs(format, x, groups, sums, scales, bytes_[codes_of(format)].data() + at);
      } else {
        kernels.scale_inputs(format, x, groups, sums, scaled_[codes_of(format)].data() + at);
      }
    }
    for (size_t t = 0; t < targets.size(); ++t) {
      const LoraSite* site = lora(inputs, targets[t].site, row);
      if (site == nullptr) continue;
      float* factors = shrunk_.data() + (t * inputs.count + row) * rank_;
      kernels.shrink(site->format(), site->a(), site->rank(), x, inputs.width, factors);
    }
  });
  done(Part::kPrepare);
}

// out (+)= weights x + bias + adapter, for every target: all read the same rows.
void Decoder::multiply(const Inputs& inputs, const Targets& targets) {
  int panels = 0;
  for (const Target& target : targets) panels += target.weights->panels();
  const auto ahead = next_ahead(panels, inputs.width);
  for_stretches(panels, [&](int begin, int end) {
    alignas(64) float values[kRowTile * kPanel];
    const int together = rows_together(inputs.width);
    for (int first = 0; first < inputs.count; first += together) {
      const int rows = std::min(together, inputs.count - first);
      for (int i = begin; i < end; ++i) {
        int t = 0, panel = i;
        while (panel >= targets[t].weights->panels()) panel -= targets[t++].weights->panels();
        tile(inputs, targets[t], t, panel, first, rows, values, ahead(i));
        write_tile(targets[t], panel, first, rows, values);
      }
    }
  });
}

// gates_ = silu(gate x) * up x.
void Decoder::multiply_gated(const Inputs& inputs, const Target& gate, const Target& up) {
  const auto ahead = next_ahead(2 * gate.weights->panels(), inputs.width);
  for_stretches(gate.weights->panels(), [&](int begin, int end) {
    alignas(64) float gates[kRowTile * kPanel], ups[kRowTile * kPanel];
    const int together = rows_together(inputs.width);
    for (int first = 0; first < inputs.count; first += together) {
      const int rows = std::min(together, inputs.count - first);
      for (int panel = begin; panel < end; ++panel) {
        tile(inputs, gate, 0, panel, first, rows, gates, ahead(panel));
        tile(inputs, up, 1, panel, first, rows, ups, ahead(gate.weights->panels() + panel));
        isa_.decoder.gate(ups, gates, rows * kPanel);
        write_tile(gate, panel, first, rows, gates);
      }
    }
  });
}

// Notes what the next layer will read before its products: keys, values and the first factors of the adapters. With few
// rows these would wait for memory, while the products before them leave memory idle: so they ask for it on the way,
// each for a share in proportion to its arithmetic. With many rows arithmetic is all that counts.
void Decoder::look_ahead(const DecoderBatch& batch, int layer, const KvStorage& kv) {
  ahead_.clear();
  ahead_taken_ = 0;
  if (layer == shape_.layers || batch.count > kRowsToLookAhead) return;
  const auto add = [&](const void* start, size_t bytes) {
    for (size_t at = 0; at < bytes; at += kRunBytes) {
      const size_t lines = (std::min(kRunBytes, bytes - at) + 63) / 64;
      ahead_.push_back({static_cast<const char*>(start) + at, static_cast<int>(lines)});
    }
  };
  const char* base = static_cast<const char*>(kv.layer(layer));
  const size_t block_bytes = kv.block_stride() * kv.item_bytes(), layer_bytes = kv.layer_stride() * kv.item_bytes();
  for (int i = 0; i < batch.count; ++i) {
    for (int s = kQ; s <= kO && batch.adapters[i] >= 0; ++s) {
      const LoraSite& site = adapters[batch.adapters[i]]->sites[layer * kSites + s];
      add(site.a(), site.a_bytes());
    }
    const int end = batch.positions[i] + 1, window = shape_.windows[layer];
    const int first = window > 0 ? std::max(0, end - window) / kKvBlock : 0;
    const int32_t* table = batch.block_tables + batch.rows[i] * batch.blocks_per_row;
    for (int block = first; block * kKvBlock < end; ++block) add(base + table[block] * block_bytes, layer_bytes);
  }
}

// What each of some panels is to ask for, of what look_ahead noted.
Decoder::AheadShares Decoder::next_ahead(int panels, int in) {
  const int layer_work = shape_.heads * shape_.head_dim * ((shape_.hidden + kPanel - 1) / kPanel) +
                         2 * shape_.hidden * ((shape_.intermediate + kPanel - 1) / kPanel) +
                         shape_.intermediate * ((shape_.hidden + kPanel - 1) / kPanel);
  const auto total = static_cast<int64_t>(ahead_.size());
  const int64_t begin = ahead_taken_ * total / layer_work;
  ahead_taken_ = std::min<int64_t>(ahead_taken_ + int64_t{panels} * in, layer_work);
  return {ahead_.data() + begin, ahead_taken_ * total / layer_work - begin, panels};
}

// weights x + bias + adapter for a panel of outputs and some rows, [rows][kPanel]. index: of the target in prepare.
void Decoder::tile(const Inputs& inputs, const Target& target, int index, int panel, int first, int rows, float* out,
                   const Ahead& ahead) const {
  const PackedLinear& w = *target.weights;
  const int64_t at = static_cast<int64_t>(first) * inputs.width;
  const int64_t groups_at = static_cast<int64_t>(first) * sums_stride_;
  const int codes = codes_of(w.format());
  if (int8_activations && has_groups(w.format())) {
    const Int8Input input{bytes_[codes].data() + at, inputs.width, scales_.data() + groups_at,
                          sums_.data() + groups_at,  sums_stride_, ahead};
    isa_.decoder.panel_int8(w.format(), w.panel(panel), inputs.width, input, rows, out, kPanel);
  } else {
    const LinearInput input{
        inputs.x + at, scaled_[codes].data() + at, inputs.width, sums_.data() + groups_at, sums_stride_, ahead};
    isa_.decoder.panel(w.format(), w.panel(panel), inputs.width, input, rows, out, kPanel);
  }
  const int start = panel * kPanel, width = std::min(kPanel, w.out() - start);
  for (int r = 0; r < rows; ++r, out += kPanel) {
    const LoraSite* site = lora(inputs, target.site, first + r);
    if (site != nullptr) {
      const float* factors = shrunk_.data() + (static_cast<int64_t>(index) * inputs.count + first + r) * rank_;
      isa_.decoder.expand(site->format(), site->b(panel), site->rank(), factors, out);
    }
    if (target.bias != nullptr) {
      for (int i = 0; i < width; ++i) out[i] += target.bias[start + i];
    }
  }
}

void Decoder::write_tile(const Target& target, int panel, int first, int rows, const float* values) const {
  const int start = panel * kPanel, width = std::min(kPanel, target.weights->out() - start);
  for (int r = 0; r < rows; ++r, values += kPanel) {
    float* out = target.out + (first + r) * target.out_stride + start;
    if (target.add) {
      for (int i = 0; i < width; ++i) out[i] += values[i];
    } else {
      std::copy_n(values, width, out);
    }
  }
}

// Rotary embedding (Su et al. 2021) in the half-split form, after the norm of queries and keys if there is one.
void Decoder::rotate(float* x, int heads, const std::vector<float>& norm, const float* cos, const float* sin) const {
  const int dim = shape_.head_dim, half = dim / 2;
  for (int h = 0; h < heads; ++h, x += dim) {
    if (!norm.empty()) isa_.decoder.rms_norm(x, norm.data(), shape_.norm_eps, dim, x);
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
    rotate(q, shape_.heads, layer.q_norm, &rope_cos[at], &rope_sin[at]);
    rotate(k, shape_.kv_heads, layer.k_norm, &rope_cos[at], &rope_sin[at]);
    kv.write(index, batch.block_tables + batch.rows[i] * batch.blocks_per_row, batch.positions[i], 1, k, v, 0);
  });
}

// Tasks go head by head: those of one thread then see the same keys and values over and over.
void Decoder::attend(const DecoderBatch& batch, int index, const KvStorage& kv) {
  const int tasks = batch.count * shape_.kv_heads;
  const int chunks = std::min(tasks, kChunksPerThread * pool_->size());
  const int64_t scores_of_worker = scores_stride_ * (shape_.heads / shape_.kv_heads);
  pool_->parallel_for(chunks, [&](int chunk, int worker) {
    for (int i = tasks * chunk / chunks; i < tasks * (chunk + 1) / chunks; ++i) {
      attend_head(batch, i % batch.count, i / batch.count, index, kv, scores_.data() + worker * scores_of_worker);
    }
  });
}

// The query heads that share one key/value head, for one token.
void Decoder::attend_head(const DecoderBatch& batch, int entry, int kv_head, int index, const KvStorage& kv,
                          float* scores) {
  const int dim = shape_.head_dim, group = shape_.heads / shape_.kv_heads;
  const int width = (shape_.heads + 2 * shape_.kv_heads) * dim;
  const int end = batch.positions[entry] + 1, window = shape_.windows[index];
  AttentionInput in;
  in.q = qkv_.data() + static_cast<int64_t>(entry) * width + kv_head * group * dim;
  in.group = group;
  in.head_dim = dim;
  in.block_table = batch.block_tables + batch.rows[entry] * batch.blocks_per_row;
  in.begin = window > 0 ? std::max(0, end - window) : 0;
  in.end = end;
  in.keys = static_cast<const char*>(kv.layer(index)) + kv_head * kv.head_stride() * kv.item_bytes();
  in.value_offset = static_cast<int64_t>(kv.value_stride());
  in.block_stride = static_cast<int64_t>(kv.block_stride());
  in.bf16 = kv.shape().dtype == KvDtype::kBFloat16;
  isa_.decoder.attend(in, scores, scores_stride_,
                      attended_.data() + (static_cast<int64_t>(entry) * shape_.heads + kv_head * group) * dim);
}

size_t Decoder::bytes() const {
  size_t total = embedding.bytes() + head.bytes();
  for (const DecoderLayer& layer : layers_) {
    for (const PackedLinear& w : layer.weights) total += w.bytes();
  }
  for (const auto& adapter : adapters) {
    for (const LoraSite& site : adapter->sites) total += site.bytes();
  }
  return total;
}

}  // namespace pcm
