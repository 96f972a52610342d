// A weight matrix [out, in] in panels of kPanel outputs, so that one pass over it serves every row of a batch: for each
// input the weights of a panel lie side by side, in the checkpoint's own precision and, for the block formats, its own
// numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/isa.h"

namespace pcm {

class PackedLinear {
 public:
  PackedLinear() = default;
  // rows: out rows of the stored form (row_bytes each): float32, bfloat16, or GGUF blocks of 32 along the inputs.
  PackedLinear(Format format, int out, int in, const uint8_t* rows);

  static int64_t row_bytes(Format format, int in);

  Format format() const { return format_; }
  int out() const { return out_; }
  int in() const { return in_; }
  int panels() const { return (out_ + kPanel - 1) / kPanel; }
  const uint8_t* panel(int index) const { return data_.data() + index * panel_bytes_; }
  size_t bytes() const { return data_.size(); }
  bool empty() const { return data_.empty(); }

  // One row of weights as float32[in].
  void row(int index, float* values) const;

 private:
  Format format_ = Format::kFloat32;
  int out_ = 0, in_ = 0;
  size_t panel_bytes_ = 0;
  std::vector<uint8_t> data_;
};

}  // namespace pcm
