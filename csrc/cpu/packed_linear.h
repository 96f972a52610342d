// A weight matrix [out, in] in panels of kPanel outputs, so that one pass over it serves every row of a batch: for each
// input the weights of a panel lie side by side, in the checkpoint's own precision and, for the block formats, its own
// numbers:
//
//   float32, bfloat16   [in][kPanel]
//   block formats       per group of kGroup inputs kPanel float16 scales, for Q4_1 as many minima, then 32-bit words
//                       [kGroup / codes per word][kPanel]: 8 nibbles or 4 bytes, consecutive inputs of one output.
//                       Q8_0's bytes are stored plus 128.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arena.h"
#include "cpu/isa.h"

namespace pcm {

class PackedLinear {
 public:
  PackedLinear() = default;
  // rows: out rows of the stored form (row_bytes each): float32, bfloat16, or GGUF blocks of 32 along the inputs. The
  // panels lie in the arena.
  PackedLinear(Format format, int out, int in, const uint8_t* rows, Arena& arena);

  static int64_t row_bytes(Format format, int in);

  Format format() const { return format_; }
  int out() const { return out_; }
  int in() const { return in_; }
  int panels() const { return (out_ + kPanel - 1) / kPanel; }
  const uint8_t* panel(int index) const { return data_ + index * panel_bytes_; }
  size_t bytes() const { return panel_bytes_ * panels(); }
  bool empty() const { return data_ == nullptr; }

  // One row of weights as float32[in].
  void row(int index, float* values) const;

 private:
  Format format_ = Format::kFloat32;
  int out_ = 0, in_ = 0;
  size_t panel_bytes_ = 0;
  uint8_t* data_ = nullptr;
};

}  // namespace pcm
