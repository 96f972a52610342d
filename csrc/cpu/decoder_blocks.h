// The inner loops of the decoder. Included once per instruction set, after its lanes.
#pragma once

#include "cpu/exp_log.h"
#include "cpu/isa.h"

namespace pcm::PCM_ISA {

constexpr int kVecs = 2;                // vectors of outputs worked on together
constexpr int kStrip = kVecs * kLanes;  // a panel is worked on in strips of so many outputs
static_assert(kPanel % kStrip == 0);

// Decodes the weights of a strip for one input after the other and hands them to use(input, weights).
template <Format kFormat, class Use>
static inline void for_each_input(const uint8_t* panel, int strip, int in, Use use) {
  Vec w[kVecs];
  if constexpr (kFormat == Format::kFloat32) {
    const float* p = reinterpret_cast<const float*>(panel) + strip * kStrip;
    for (int k = 0; k < in; ++k, p += kPanel) {
      for (int v = 0; v < kVecs; ++v) w[v] = load(p + v * kLanes);
      use(k, w);
    }
  } else if constexpr (kFormat == Format::kBFloat16) {
    const uint16_t* p = reinterpret_cast<const uint16_t*>(panel) + strip * kStrip;
    for (int k = 0; k < in; ++k, p += kPanel) {
      for (int v = 0; v < kVecs; ++v) w[v] = load_bf16(p + v * kLanes);
      use(k, w);
    }
  } else {
    // A group: kPanel float16 scales, for Q4_1 as many minima, then the numbers, input by input (Q8_0) or two inputs to
    // a byte.
    constexpr int kScales = kFormat == Format::kQ4_1 ? 2 : 1;
    constexpr int kBytes = kFormat == Format::kQ8_0 ? kGroup * kPanel : kGroup / 2 * kPanel;
    for (int k = 0; k < in; k += kGroup) {
      Vec scale[kVecs], least[kVecs];
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(panel) + strip * kStrip;
      for (int v = 0; v < kVecs; ++v) {
        scale[v] = load_f16(scales + v * kLanes);
        if constexpr (kFormat == Format::kQ4_1) least[v] = load_f16(scales + kPanel + v * kLanes);
        if constexpr (kFormat == Format::kQ4_0) least[v] = scale[v] * set1(-8.0f);
      }
      panel += kScales * kPanel * 2;
      const uint8_t* p = panel + strip * kStrip;
      panel += kBytes;
      if constexpr (kFormat == Format::kQ8_0) {
        for (int i = 0; i < kGroup; ++i, p += kPanel) {
          for (int v = 0; v < kVecs; ++v) w[v] = load_int8(p + v * kLanes) * scale[v];
          use(k + i, w);
        }
      } else {
        for (int i = 0; i < kGroup; i += 2, p += kPanel) {
          Vec low[kVecs], high[kVecs];
          for (int v = 0; v < kVecs; ++v) {
            load_nibbles(p + v * kLanes, &low[v], &high[v]);
            low[v] = multiply_add(low[v], scale[v], least[v]);
            high[v] = multiply_add(high[v], scale[v], least[v]);
          }
          use(k + i, low);
          use(k + i + 1, high);
        }
      }
    }
  }
}

template <Format kFormat, int kRows>
static void panel_rows(const uint8_t* panel, int in, const float* x, int64_t x_stride, float* out, int64_t out_stride) {
  for (int strip = 0; strip < kPanel / kStrip; ++strip) {
    Vec sums[kRows][kVecs];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) sums[r][v] = set1(0.0f);
    }
    for_each_input<kFormat>(panel, strip, in, [&](int k, const Vec* w) __attribute__((always_inline)) {
      for (int r = 0; r < kRows; ++r) {
        const Vec input = set1(x[r * x_stride + k]);
        for (int v = 0; v < kVecs; ++v) sums[r][v] = multiply_add(input, w[v], sums[r][v]);
      }
    });
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) store(out + r * out_stride + strip * kStrip + v * kLanes, sums[r][v]);
    }
  }
}

// As many rows at a time as the registers hold.
template <Format kFormat>
static void panel_format(const uint8_t* panel, int in, const float* x, int64_t x_stride, int rows, float* out,
                         int64_t out_stride) {
  constexpr int kMost = kLanes == 16 ? 8 : 4;
  for (; rows > 0; rows -= kMost, x += kMost * x_stride, out += kMost * out_stride) {
    switch (rows) {
      case 1:
        panel_rows<kFormat, 1>(panel, in, x, x_stride, out, out_stride);
        break;
      case 2:
        panel_rows<kFormat, 2>(panel, in, x, x_stride, out, out_stride);
        break;
      case 3:
        panel_rows<kFormat, 3>(panel, in, x, x_stride, out, out_stride);
        break;
      case 4:
        panel_rows<kFormat, 4>(panel, in, x, x_stride, out, out_stride);
        break;
      default:
        if constexpr (kMost == 4) {
          panel_rows<kFormat, 4>(panel, in, x, x_stride, out, out_stride);
        } else {
          switch (rows) {
            case 5:
              panel_rows<kFormat, 5>(panel, in, x, x_stride, out, out_stride);
              break;
            case 6:
              panel_rows<kFormat, 6>(panel, in, x, x_stride, out, out_stride);
              break;
            case 7:
              panel_rows<kFormat, 7>(panel, in, x, x_stride, out, out_stride);
              break;
            default:
              panel_rows<kFormat, 8>(panel, in, x, x_stride, out, out_stride);
              break;
          }
        }
    }
  }
}

static void panel_any(Format format, const uint8_t* panel, int in, const float* x, int64_t x_stride, int rows,
                      float* out, int64_t out_stride) {
  switch (format) {
    case Format::kFloat32:
      return panel_format<Format::kFloat32>(panel, in, x, x_stride, rows, out, out_stride);
    case Format::kBFloat16:
      return panel_format<Format::kBFloat16>(panel, in, x, x_stride, rows, out, out_stride);
    case Format::kQ8_0:
      return panel_format<Format::kQ8_0>(panel, in, x, x_stride, rows, out, out_stride);
    case Format::kQ4_0:
      return panel_format<Format::kQ4_0>(panel, in, x, x_stride, rows, out, out_stride);
    case Format::kQ4_1:
      return panel_format<Format::kQ4_1>(panel, in, x, x_stride, rows, out, out_stride);
  }
}

static float dot(const float* a, const float* b, int n) {
  Vec sum = set1(0.0f);
  for (int i = 0; i < n; i += kLanes) sum = multiply_add(load(a + i), load(b + i), sum);
  return sum_lanes(sum);
}

static void add_scaled(const float* x, float scale, float* out, int n) {
  const Vec factor = set1(scale);
  for (int i = 0; i < n; i += kLanes) store(out + i, multiply_add(load(x + i), factor, load(out + i)));
}

static void softmax(float* x, int n) {
  for (int i = n; i % kLanes != 0; ++i) x[i] = -__builtin_inff();
  Vec top = load(x);
  for (int i = kLanes; i < n; i += kLanes) top = max(top, load(x + i));
  const Vec greatest = set1(max_lane(top));
  Vec sum = set1(0.0f);
  for (int i = 0; i < n; i += kLanes) {
    const Vec e = exp32(load(x + i) - greatest);
    sum = sum + e;
    store(x + i, e);
  }
  const Vec factor = set1(1.0f / sum_lanes(sum));
  for (int i = 0; i < n; i += kLanes) store(x + i, load(x + i) * factor);
}

static void gate(const float* up, float* gate, int n) {
  const Vec zero = set1(0.0f), one = set1(1.0f);
  for (int i = 0; i < n; i += kLanes) {
    const Vec g = load(gate + i), negated = zero - g;
    const Vec e = exp32(zero - max(g, negated));
    const Vec silu = select(g < zero, g * e, g) / (one + e);
    store(gate + i, silu * load(up + i));
  }
}

static DecoderKernels decoder_kernels() { return {panel_any, dot, add_scaled, softmax, gate}; }

}  // namespace pcm::PCM_ISA
