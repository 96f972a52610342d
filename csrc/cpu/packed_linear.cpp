#include "cpu/packed_linear.h"

#include <cmath>
#include <cstring>

namespace pcm {
namespace {

float from_f16(uint16_t h) {
  const int exponent = h >> 10 & 31;
  const float mantissa = static_cast<float>(h & 1023);
  const float magnitude = exponent == 0    ? std::ldexp(mantissa, -24)
                          : exponent == 31 ? (mantissa == 0 ? INFINITY : NAN)
                                           : std::ldexp(mantissa + 1024, exponent - 25);
  return h & 0x8000 ? -magnitude : magnitude;
}

uint16_t read16(const uint8_t* p) {
  uint16_t x;
  std::memcpy(&x, p, 2);
  return x;
}

struct Layout {
  int scales;       // float16 numbers per block ahead of the values
  int value_bytes;  // of a block of kGroup
};

Layout layout_of(Format format) {
  switch (format) {
    case Format::kQ8_0:
      return {1, kGroup};
    case Format::kQ4_0:
      return {1, kGroup / 2};
    case Format::kQ4_1:
      return {2, kGroup / 2};
    default:
      return {0, 0};
  }
}

// Entry i of a GGUF 4-bit block: the low nibbles are the first half, the high ones the second.
int nibble(const uint8_t* values, int i) { return i < kGroup / 2 ? values[i] & 15 : values[i - kGroup / 2] >> 4; }

size_t item_bytes(Format format) { return format == Format::kFloat32 ? 4 : 2; }

}  // namespace

int64_t PackedLinear::row_bytes(Format format, int in) {
  const Layout layout = layout_of(format);
  if (layout.scales == 0) return static_cast<int64_t>(in) * static_cast<int64_t>(item_bytes(format));
  return in % kGroup == 0 ? static_cast<int64_t>(in) / kGroup * (2 * layout.scales + layout.value_bytes) : -1;
}

PackedLinear::PackedLinear(Format format, int out, int in, const uint8_t* rows, Arena& arena)
    : format_(format), out_(out), in_(in) {
  const int64_t stride = row_bytes(format, in);
  panel_bytes_ = static_cast<size_t>(stride) * kPanel;
  data_ = arena.take(panel_bytes_ * panels());
  const Layout layout = layout_of(format);
  const int64_t block = 2 * layout.scales + layout.value_bytes;
  for (int o = 0; o < out; ++o) {
    const uint8_t* row = rows + o * stride;
    uint8_t* panel = data_ + (o / kPanel) * panel_bytes_;
    const int lane = o % kPanel;
    if (layout.scales == 0) {
      const size_t item = item_bytes(format);
      for (int k = 0; k < in; ++k)
        std::memcpy(panel + (static_cast<size_t>(k) * kPanel + lane) * item, row + k * item, item);
      continue;
    }
    for (int g = 0; g < in / kGroup; ++g) {
      const uint8_t* stored = row + g * block;
      uint8_t* group = panel + g * block * kPanel;
      for (int s = 0; s < layout.scales; ++s) std::memcpy(group + (s * kPanel + lane) * 2, stored + 2 * s, 2);
      const uint8_t* values = stored + 2 * layout.scales;
      uint8_t* words = group + 2 * layout.scales * kPanel + lane * 4;
      for (int i = 0; i < layout.value_bytes; ++i) {
        words[i / 4 * 4 * kPanel + i % 4] =
            format == Format::kQ8_0 ? values[i] ^ 0x80
                                    : static_cast<uint8_t>(nibble(values, 2 * i) | nibble(values, 2 * i + 1) << 4);
      }
    }
  }
}

void PackedLinear::row(int index, float* values) const {
  const uint8_t* start = panel(index / kPanel);
  const int lane = index % kPanel;
  const Layout layout = layout_of(format_);
  for (int k = 0; k < in_; ++k) {
    if (format_ == Format::kFloat32) {
      std::memcpy(values + k, start + (static_cast<size_t>(k) * kPanel + lane) * 4, 4);
    } else if (format_ == Format::kBFloat16) {
      const uint32_t b = static_cast<uint32_t>(read16(start + (static_cast<size_t>(k) * kPanel + lane) * 2)) << 16;
      std::memcpy(values + k, &b, 4);
    } else {
      const uint8_t* group =
          start + static_cast<size_t>(k / kGroup) * (2 * layout.scales + layout.value_bytes) * kPanel;
      const float scale = from_f16(read16(group + lane * 2));
      const uint8_t* words = group + 2 * layout.scales * kPanel + lane * 4;
      const auto byte = [&](int i) { return words[i / 4 * 4 * kPanel + i % 4]; };
      const int i = k % kGroup;
      if (format_ == Format::kQ8_0) {
        values[k] = static_cast<float>(byte(i) - 128) * scale;
      } else {
        const auto q = static_cast<float>(i % 2 == 0 ? byte(i / 2) & 15 : byte(i / 2) >> 4);
        const float least = format_ == Format::kQ4_1 ? from_f16(read16(group + (kPanel + lane) * 2)) : -8 * scale;
        values[k] = q * scale + least;
      }
    }
  }
}

}  // namespace pcm
