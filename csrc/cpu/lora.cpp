#include "cpu/lora.h"

#include <algorithm>
#include <bit>

namespace pcm {
namespace {

bool all_bfloat16(const float* values, int64_t count) {
  return std::all_of(values, values + count, [](float x) { return (std::bit_cast<uint32_t>(x) & 0xFFFF) == 0; });
}

void put(Format format, float value, int64_t index, uint8_t* to) {
  const auto bits = std::bit_cast<uint32_t>(value);
  if (format == Format::kFloat32) {
    reinterpret_cast<uint32_t*>(to)[index] = bits;
  } else {
    reinterpret_cast<uint16_t*>(to)[index] = static_cast<uint16_t>(bits >> 16);
  }
}

}  // namespace

LoraSite::LoraSite(int rank, int in, int out, const float* a, const float* b, Arena& arena) : rank_(rank) {
  const int64_t a_count = int64_t{rank} * in, b_count = int64_t{rank} * out;
  if (all_bfloat16(a, a_count) && all_bfloat16(b, b_count)) format_ = Format::kBFloat16;
  const int64_t panels = (out + kPanel - 1) / kPanel;
  a_bytes_ = a_count * item_bytes();
  b_bytes_ = panels * rank * kPanel * item_bytes();
  a_ = arena.take(a_bytes_);
  b_ = arena.take(b_bytes_);
  for (int64_t i = 0; i < a_count; ++i) put(format_, a[i], i, a_);
  for (int64_t j = 0; j < rank; ++j) {
    for (int64_t o = 0; o < out; ++o) {
      put(format_, b[j * out + o], (o / kPanel * rank + j) * kPanel + o % kPanel, b_);
    }
  }
}

}  // namespace pcm
