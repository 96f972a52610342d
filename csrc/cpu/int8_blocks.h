// Linear layers of block-format weights with 8-bit activations: whole-number products, an opt-in that trades exactness
// for speed when there are many rows. Included once per instruction set, after its lanes.
//
// A group of kGroup inputs of a row becomes signed bytes and one scale (the greatest magnitude over 127). Sums of code
// times byte over a group fit 16 bits for 4-bit codes: 32 * 15 * 127 / 2 pairs = 30480. What a row gets does not depend
// on how many rows there are.
#pragma once

#include "cpu/isa.h"
#include "cpu/linear_blocks.h"

namespace pcm::PCM_ISA {

constexpr int kInt8Rows = 4;

// The bytes of a row lie as the codes do when a word is taken apart: for nibbles the even inputs of a word, then the
// odd ones.
static void quantize_inputs(Format format, const float* x, int groups, float* sums, float* scales, int8_t* bytes) {
  for (int g = 0; g < groups; ++g, x += kGroup, bytes += kGroup) {
    Vec sum = set1(0.0f), top = set1(0.0f);
    for (int i = 0; i < kGroup; i += kLanes) {
      const Vec v = load(x + i);
      sum = sum + v;
      top = max(top, max(v, set1(0.0f) - v));
    }
    sums[g] = sum_lanes(sum);
    const float scale = max_lane(top) / 127.0f, inverse = scale > 0 ? 1.0f / scale : 0.0f;
    scales[g] = scale;
    for (int i = 0; i < kGroup; ++i) {
      const int at = format == Format::kQ8_0 ? i : i / 8 * 8 + i % 2 * 4 + i % 8 / 2;
      bytes[at] = static_cast<int8_t>(__builtin_rintf(x[i] * inverse));
    }
  }
}

template <Format kFormat, int kRows>
static void int8_tile(const uint8_t* panel, int in, const Int8Input& input, float* out, int64_t out_stride) {
  using G = Group<kFormat>;
  constexpr int kVecs = kPanel / kLanes >= 2 ? 2 : 1;
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kPanel; i += kLanes) store(out + r * out_stride + i, set1(0.0f));
  }
  Fetcher fetcher(input.ahead, in / kGroup);
  for (int g = 0; g < in / kGroup; ++g, panel += G::kBytes) {
    for (int i = 0; i < G::kBytes; i += 64) __builtin_prefetch(panel + kPrefetch + i);
    fetcher.fetch();
    for (int start = 0; start < kPanel; start += kVecs * kLanes) {
      ByteSum sums[kRows][kVecs];
      const uint8_t* words = panel + G::kWords + start * 4;
      const int8_t* x = input.bytes + g * kGroup;
#pragma GCC unroll 8
      for (int i = 0; i < kGroup; i += G::kPerWord, words += kPanel * 4) {
#pragma GCC unroll 2
        for (int v = 0; v < kVecs; ++v) {
          const Words packed = load_words(words + v * kLanes * 4);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const int8_t* row = x + r * input.stride + i;
            if constexpr (kFormat == Format::kQ8_0) {
              sums[r][v].add_biased(packed, broadcast_bytes(row));
            } else {
              sums[r][v].add(even_nibbles(packed), broadcast_bytes(row));
              sums[r][v].add(odd_nibbles(packed), broadcast_bytes(row + 4));
            }
          }
        }
      }
      for (int v = 0; v < kVecs; ++v) {
        const Vec scale = G::scale(panel, start + v * kLanes), least = G::least(panel, start + v * kLanes);
        for (int r = 0; r < kRows; ++r) {
          float* total = out + r * out_stride + start + v * kLanes;
          const Vec factor = scale * set1(input.scales[r * input.groups_stride + g]);
          Vec sum = multiply_add(factor, sums[r][v].total(), load(total));
          if (kFormat != Format::kQ8_0) {
            sum = multiply_add(least, set1(input.group_sums[r * input.groups_stride + g]), sum);
          }
          store(total, sum);
        }
      }
    }
  }
}

template <Format kFormat>
static void int8_format(const uint8_t* panel, int in, Int8Input input, int rows, float* out, int64_t out_stride) {
  for (; rows > 0; rows -= kInt8Rows, out += kInt8Rows * out_stride) {
    switch (rows) {
      case 1:
        return int8_tile<kFormat, 1>(panel, in, input, out, out_stride);
      case 2:
        return int8_tile<kFormat, 2>(panel, in, input, out, out_stride);
      case 3:
        return int8_tile<kFormat, 3>(panel, in, input, out, out_stride);
      default:
        int8_tile<kFormat, kInt8Rows>(panel, in, input, out, out_stride);
    }
    input.ahead = {};
    input.bytes += kInt8Rows * input.stride;
    input.scales += kInt8Rows * input.groups_stride;
    input.group_sums += kInt8Rows * input.groups_stride;
  }
}

static void panel_int8(Format format, const uint8_t* panel, int in, const Int8Input& input, int rows, float* out,
                       int64_t out_stride) {
  if (format == Format::kQ8_0) return int8_format<Format::kQ8_0>(panel, in, input, rows, out, out_stride);
  if (format == Format::kQ4_0) return int8_format<Format::kQ4_0>(panel, in, input, rows, out, out_stride);
  int8_format<Format::kQ4_1>(panel, in, input, rows, out, out_stride);
}

}  // namespace pcm::PCM_ISA
