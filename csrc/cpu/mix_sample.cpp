#include "cpu/mix_sample.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/select_tokens.h"

namespace pcm {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

inline float from_bf16(uint16_t x) {
  const uint32_t b = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &b, 4);
  return f;
}

// kBlock float32 entries from the given block of a row: the row's own memory where it can be read as it lies, otherwise
// a copy in `scratch`, padded with -inf.
const float* load_block(const MixSampleKernels& kernels, const RowView& row, int64_t vocabulary, int64_t block,
                        float* scratch) {
  const int64_t start = block * kBlock;
  const int n = static_cast<int>(std::min<int64_t>(kBlock, vocabulary - start));
  if (row.dtype == DType::kFloat32) {
    const float* x = static_cast<const float*>(row.data) + start * row.stride;
    if (row.stride == 1 && n == kBlock) return x;
    for (int i = 0; i < n; ++i) scratch[i] = x[i * row.stride];
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(row.data) + start * row.stride;
    uint16_t halves[kBlock] = {};
    if (row.stride != 1 || n != kBlock) {
      for (int i = 0; i < n; ++i) halves[i] = x[i * row.stride];
      x = halves;
    }
    if (row.dtype == DType::kFloat16) {
      kernels.convert_f16(x, scratch, kBlock);
    } else {
      for (int i = 0; i < kBlock; ++i) scratch[i] = from_bf16(x[i]);
    }
  }
  std::fill(scratch + n, scratch + kBlock, kMinusInf);
  return scratch;
}

// The work on one row, pass by pass. Floats are only reduced by maximum, sums are of whole numbers: the split into
// chunks leaves no trace in the result.
class RowPasses {
 public:
  RowPasses(const MixSampleKernels& kernels, ThreadPool* pool, MixSampleWorkspace& ws, MixSampleRow& row)
      : kernels_(kernels), ws_(ws), row_(row), range_{pool, (row.vocabulary + kBlock - 1) / kBlock} {
    for (int i = 0; i < row.experts; ++i) {
      if (row.weights[i] != 0) active_[experts_++] = i;
    }
  }

  void run() {
    if (row_.experts == 0) {
      if (!copy_log_p()) return;
    } else if (!find_tops() || !sum_masses() || !merge()) {
      return;
    }
    if (row_.log_probs != nullptr) std::memcpy(row_.log_probs, ws_.log_p.data(), row_.vocabulary * sizeof(float));
    if (row_.draw) report(row_.params.greedy ? most_likely() : draw());
  }

 private:
  using Partial = MixSampleWorkspace::Partial;

  bool fail(Status status) {
    row_.status = status;
    return false;
  }
  float* scratch(int worker, int i) { return ws_.scratch.data() + (int64_t{worker} * kMaxExperts + i) * kBlock; }
  const float* block_of(int i, int64_t b, int worker) {
    return load_block(kernels_, row_.logits[active_[i]], row_.vocabulary, b, scratch(worker, i));
  }
  float* exps_of(int i, int64_t b) { return ws_.exps.data() + (i * range_.blocks + b) * kBlock; }
  float* log_p_of(int64_t b) { return ws_.log_p.data() + b * kBlock; }

  bool find_tops() {
    range_.for_chunks([this](int64_t begin, int64_t end, int chunk, int worker) {
      Partial& part = ws_.partials[chunk];
      part.bad = false;
      for (int i = 0; i < experts_; ++i) {
        float top = kMinusInf;
        for (int64_t b = begin; b < end; ++b)
          top = std::max(top, kernels_.max_block(block_of(i, b, worker), &part.bad));
        part.top[i] = top;
      }
    });
    bool bad = false, excluded = false;
    for (int i = 0; i < experts_; ++i) {
      float top = kMinusInf;
      for (int chunk = 0; chunk < range_.chunks(); ++chunk) {
        top = std::max(top, ws_.partials[chunk].top[i]);
        bad |= ws_.partials[chunk].bad;
      }
      bad |= top == -kMinusInf;
      excluded |= top == kMinusInf;
      terms_[i].top = top;
    }
    return bad ? fail(Status::kNaN) : excluded ? fail(Status::kAllExcluded) : true;
  }

  bool sum_masses() {
    range_.for_chunks([this](int64_t begin, int64_t end, int chunk, int worker) {
      for (int i = 0; i < experts_; ++i) {
        uint64_t mass = 0;
        for (int64_t b = begin; b < end; ++b)
          mass += kernels_.exp_block(block_of(i, b, worker), terms_[i].top, exps_of(i, b));
        ws_.partials[chunk].mass[i] = mass;
      }
    });
    for (int i = 0; i < experts_; ++i) {
      const float total = reduce_mass(i);
      ExpertTerm& term = terms_[i];
      term.weight = row_.weights[active_[i]];
      term.log_total = kernels_.log(total);
      term.scale = term.weight / total;
      term.log_weight = row_.merge == Merge::kLogLinear ? 0 : kernels_.log(term.weight);
    }
    return true;
  }

  float reduce_mass(int i) const {
    uint64_t mass = 0;
    for (int chunk = 0; chunk < range_.chunks(); ++chunk) mass += ws_.partials[chunk].mass[i];
    return static_cast<float>(mass) * 0x1p-40f;
  }

  bool merge() {
    range_.for_chunks([this](int64_t begin, int64_t end, int chunk, int worker) {
      Partial& part = ws_.partials[chunk];
      part.bad = false;
      part.top[0] = kMinusInf;
      for (int64_t b = begin; b < end; ++b) {
        const float *x[kMaxExperts], *exps[kMaxExperts];
        for (int i = 0; i < experts_; ++i) {
          x[i] = block_of(i, b, worker);
          exps[i] = exps_of(i, b);
        }
        ws_.block_top[b] =
            kernels_.merge_block(x, exps, terms_, experts_, row_.merge, row_.exponent, log_p_of(b), &part.bad);
        part.top[0] = std::max(part.top[0], ws_.block_top[b]);
      }
    });
    if (!reduce_top(Status::kAllExcluded)) return false;
    if (row_.merge != Merge::kLinear) normalize();
    return true;
  }

  void normalize() {
    range_.for_chunks([this](int64_t begin, int64_t end, int chunk, int) {
      uint64_t mass = 0;
      for (int64_t b = begin; b < end; ++b) mass += kernels_.exp_block(log_p_of(b), top_, exps_of(0, b));
      ws_.partials[chunk].mass[0] = mass;
    });
    const float log_total = kernels_.log(reduce_mass(0));
    range_.for_chunks([&](int64_t begin, int64_t end, int, int) {
      for (int64_t b = begin; b < end; ++b) {
        kernels_.normalize_block(log_p_of(b), top_, log_total, log_p_of(b));
        ws_.block_top[b] = (ws_.block_top[b] - top_) - log_total;
      }
    });
    top_ = (top_ - top_) - log_total;
  }

  bool copy_log_p() {
    range_.for_chunks([this](int64_t begin, int64_t end, int chunk, int worker) {
      Partial& part = ws_.partials[chunk];
      part.bad = false;
      part.top[0] = kMinusInf;
      for (int64_t b = begin; b < end; ++b) {
        const float* x = load_block(kernels_, row_.log_p, row_.vocabulary, b, scratch(worker, 0));
        std::memcpy(log_p_of(b), x, kBlock * sizeof(float));
        ws_.block_top[b] = kernels_.max_block(x, &part.bad);
        part.top[0] = std::max(part.top[0], ws_.block_top[b]);
      }
    });
    return reduce_top(Status::kNaN);
  }

  // `infinite` is what an entry of +inf means here.
  bool reduce_top(Status infinite) {
    bool bad = false;
    top_ = kMinusInf;
    for (int chunk = 0; chunk < range_.chunks(); ++chunk) {
      bad |= ws_.partials[chunk].bad;
      top_ = std::max(top_, ws_.partials[chunk].top[0]);
    }
    if (bad || top_ == -kMinusInf) return fail(infinite);
    return top_ == kMinusInf ? fail(Status::kAllExcluded) : true;
  }

  int64_t most_likely() {
    int64_t b = 0;
    while (ws_.block_top[b] != top_) ++b;
    int64_t id = b * kBlock;
    while (ws_.log_p[id] != top_) ++id;
    return id;
  }

  int64_t draw() {
    const float temperature = std::max(row_.params.temperature, std::numeric_limits<float>::min());
    range_.for_chunks([&](int64_t begin, int64_t end, int, int) {
      for (int64_t b = begin; b < end; ++b) {
        float* out = ws_.tempered.data() + b * kBlock;
        ws_.block_mass[b] = kernels_.temper_block(log_p_of(b), top_, temperature, out, &ws_.block_top[b]);
      }
    });
    return draw_token(kernels_, range_, ws_, row_.params);
  }

  void report(int64_t token) {
    row_.token = token;
    row_.logprob = ws_.log_p[token];
    if (row_.expert_logprobs == nullptr) return;
    std::fill_n(row_.expert_logprobs, row_.experts, std::numeric_limits<float>::quiet_NaN());
    for (int i = 0; i < experts_; ++i) {
      const float logit = block_of(i, token / kBlock, 0)[token % kBlock];
      row_.expert_logprobs[active_[i]] = (logit - terms_[i].top) - terms_[i].log_total;
    }
  }

  const MixSampleKernels& kernels_;
  MixSampleWorkspace& ws_;
  MixSampleRow& row_;
  const BlockRange range_;
  int experts_ = 0;  // active ones, from here on
  int active_[kMaxExperts];
  ExpertTerm terms_[kMaxExperts];
  float top_ = 0;
};

}  // namespace

void MixSampleWorkspace::reserve(int64_t vocabulary, int experts, int threads) {
  const auto blocks = static_cast<size_t>((vocabulary + kBlock - 1) / kBlock);
  if (block_top.size() < blocks) {
    log_p.resize(blocks * kBlock);
    tempered.resize(blocks * kBlock);
    block_top.resize(blocks);
    block_mass.resize(blocks);
    candidates.resize(blocks * kBlock);
  }
  exps.resize(std::max(exps.size(), blocks * kBlock * static_cast<size_t>(std::max(experts, 1))));
  if (histograms.size() < static_cast<size_t>(threads)) {
    histograms.resize(threads);
    scratch.resize(static_cast<size_t>(threads) * kMaxExperts * kBlock);
    partials.resize(static_cast<size_t>(threads) * BlockRange::kChunksPerThread);
  }
}

void mix_sample_row(const MixSampleKernels& kernels, ThreadPool* pool, MixSampleWorkspace& ws, MixSampleRow& row) {
  RowPasses(kernels, pool, ws, row).run();
}

void MixSampler::run(MixSampleRow* rows, int64_t count) {
  std::lock_guard<std::mutex> turn(turn_);
  int64_t vocabulary = 0;
  int experts = 0;
  for (int64_t i = 0; i < count; ++i) {
    vocabulary = std::max(vocabulary, rows[i].vocabulary);
    experts = std::max(experts, rows[i].experts);
  }
  constexpr int64_t kWorthSplitting = 16384;
  if (count >= pool_->size()) {
    for (auto& ws : workspaces_) ws.reserve(vocabulary, experts, 1);
    pool_->parallel_for(static_cast<int>(count), [&](int i, int worker) {
      mix_sample_row(isa_.mix_sample, nullptr, workspaces_[worker], rows[i]);
    });
    return;
  }
  ThreadPool* pool = vocabulary * std::max(1, experts) >= kWorthSplitting ? pool_.get() : nullptr;
  workspaces_[0].reserve(vocabulary, experts, pool_->size());
  for (int64_t i = 0; i < count; ++i) mix_sample_row(isa_.mix_sample, pool, workspaces_[0], rows[i]);
}

}  // namespace pcm
