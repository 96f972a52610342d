// LoRA adapters as the decoder reads them: out += (x A^T) B for any mix of ranks and sites.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "arena.h"
#include "cpu/isa.h"

namespace pcm {

// The low-rank difference of one linear layer. Factors whose numbers all are bfloat16 numbers are kept in 16 bits: that
// loses nothing and halves what a token reads.
class LoraSite {
 public:
  LoraSite() = default;
  // a: [rank][in]; b: [rank][out], scaled.
  LoraSite(int rank, int in, int out, const float* a, const float* b, Arena& arena);

  int rank() const { return rank_; }
  Format format() const { return format_; }
  const void* a() const { return a_; }
  size_t a_bytes() const { return a_bytes_; }
  const void* b(int panel) const { return b_ + static_cast<int64_t>(panel) * rank_ * kPanel * item_bytes(); }
  size_t bytes() const { return a_bytes_ + b_bytes_; }

 private:
  int item_bytes() const { return format_ == Format::kFloat32 ? 4 : 2; }

  int rank_ = 0;
  Format format_ = Format::kFloat32;
  size_t a_bytes_ = 0, b_bytes_ = 0;
  uint8_t *a_ = nullptr, *b_ = nullptr;  // [rank][in], [panels][rank][kPanel]
};

struct LoraAdapter {
  std::vector<LoraSite> sites;  // [layers * kSites + 1], the head last; rank 0 where there is none
};

}  // namespace pcm
