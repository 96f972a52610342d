// Linear layers: a panel of weights times some rows, and the two factors of an adapter. Included once per instruction
// set, after its lanes.
//
// A panel product is a sum of outer products: one input of every row times its weights, which lie side by side for the
// outputs of the panel. Weights are decoded in registers, once for all rows of a tile; the activations stay float32.
// The block formats sum whole numbers times inputs over a group of kGroup and scale the sum. Every row goes through the
// same operations in the same order however many rows there are, so what it gets does not depend on its batch.
#pragma once

#include "cpu/isa.h"

namespace pcm::PCM_ISA {

// Rows in a tile: as many as the registers hold next to two vectors of weights, or fewer.
constexpr int kWide = kLanes == 16 ? 12 : kLanes == 8 ? 6 : 4;
constexpr int kNarrow = kLanes == 16 ? 8 : kWide;  // every size up to this one is compiled, and kWide
static_assert(kRowTile % kWide == 0);

// Vectors of outputs in a tile: few rows need more of them to keep the multipliers busy.
constexpr int vecs_for(int rows) { return rows <= 2 && kPanel / kLanes >= 4 ? 4 : 2; }

template <int kRows, int kVecs>
static inline void add_outer(const float* x, int64_t x_stride, const Vec* w, Vec (*sums)[kVecs]) {
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    const Vec input = set1(x[r * x_stride]);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[r][v] = multiply_add(input, w[v], sums[r][v]);
  }
}

template <int kRows, int kVecs>
static inline void clear(Vec (*sums)[kVecs]) {
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[r][v] = set1(0.0f);
  }
}

static inline Vec load_weights(const float* p) { return load(p); }
static inline Vec load_weights(const uint16_t* p) { return load_bf16(p); }

// float32 or bfloat16: [in][kPanel].
template <class Item, int kRows>
static void panel_plain(const Item* panel, int in, const LinearInput& input, float* out, int64_t out_stride) {
  constexpr int kVecs = vecs_for(kRows);
  for (int start = 0; start < kPanel; start += kVecs * kLanes) {
    Vec sums[kRows][kVecs];
    clear<kRows>(sums);
    const Item* p = panel + start;
    for (int k = 0; k < in; ++k, p += kPanel) {
      Vec w[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) w[v] = load_weights(p + v * kLanes);
      add_outer<kRows>(input.x + k, input.stride, w, sums);
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVecs; ++v) store(out + r * out_stride + start + v * kLanes, sums[r][v]);
    }
  }
}

// How far ahead of their use weights are asked for, in bytes.
constexpr int kPrefetch = 2048;

// A group of a block format: kPanel float16 scales, for Q4_1 as many minima, then 32-bit words [kGroup / per word]
// [kPanel], each of 8 nibbles or 4 signed bytes: consecutive inputs of one output.
template <Format kFormat>
struct Group {
  static constexpr int kPerWord = kFormat == Format::kQ8_0 ? 4 : 8;
  static constexpr int kScales = kFormat == Format::kQ4_1 ? 2 : 1;
  static constexpr int kWords = kScales * kPanel * 2;  // where the words start
  static constexpr int kBytes = kWords + kGroup / kPerWord * kPanel * 4;

  static inline Vec weight(Words packed, int index) {
    return kFormat == Format::kQ8_0 ? signed_byte(packed, index) : nibble(packed, index);
  }
  static inline Vec scale(const uint8_t* group, int output) {
    return load_f16(reinterpret_cast<const uint16_t*>(group) + output);
  }
  static inline Vec least(const uint8_t* group, int output) {
    if constexpr (kFormat == Format::kQ4_1) return load_f16(reinterpret_cast<const uint16_t*>(group) + kPanel + output);
    return scale(group, output) * set1(-8.0f);
  }
};

// The totals of a tile live in memory: they are touched once a group, and registers are scarce.
template <Format kFormat, int kRows>
static void panel_blocks(const uint8_t* panel, int in, const LinearInput& input, float* out, int64_t out_stride) {
  using G = Group<kFormat>;
  constexpr int kVecs = vecs_for(kRows);
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kPanel; i += kLanes) store(out + r * out_stride + i, set1(0.0f));
  }
  const uint8_t* group = panel;
  const float *x = input.x, *group_sum = input.group_sums;
  for (int k = 0; k < in; k += kGroup, group += G::kBytes, x += kGroup, ++group_sum) {
    for (int i = 0; i < G::kBytes; i += 64) __builtin_prefetch(group + kPrefetch + i);
    for (int start = 0; start < kPanel; start += kVecs * kLanes) {
      Vec sums[kRows][kVecs];
      clear<kRows>(sums);
      const uint8_t* words = group + G::kWords + start * 4;
      for (int i = 0; i < kGroup; i += G::kPerWord, words += kPanel * 4) {
#pragma GCC unroll 8
        for (int j = 0; j < G::kPerWord; ++j) {
          Vec w[kVecs];
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) w[v] = G::weight(load_words(words + v * kLanes * 4), j);
          add_outer<kRows>(x + i + j, input.stride, w, sums);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const Vec scale = G::scale(group, start + v * kLanes), least = G::least(group, start + v * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          float* total = out + r * out_stride + start + v * kLanes;
          Vec sum = multiply_add(scale, sums[r][v], load(total));
          if (kFormat != Format::kQ8_0) sum = multiply_add(least, set1(group_sum[r * input.sums_stride]), sum);
          store(total, sum);
        }
      }
    }
  }
}

template <Format kFormat, int kRows>
static void panel_tile(const uint8_t* panel, int in, const LinearInput& input, float* out, int64_t out_stride) {
  if constexpr (kFormat == Format::kFloat32) {
    panel_plain<float, kRows>(reinterpret_cast<const float*>(panel), in, input, out, out_stride);
  } else if constexpr (kFormat == Format::kBFloat16) {
    panel_plain<uint16_t, kRows>(reinterpret_cast<const uint16_t*>(panel), in, input, out, out_stride);
  } else {
    panel_blocks<kFormat, kRows>(panel, in, input, out, out_stride);
  }
}

using PanelTile = void (*)(const uint8_t*, int, const LinearInput&, float*, int64_t);

template <Format kFormat>
static PanelTile panel_tile_of(int rows) {
  switch (rows) {
    case 1:
      return panel_tile<kFormat, 1>;
    case 2:
      return panel_tile<kFormat, 2>;
    case 3:
      return panel_tile<kFormat, 3>;
    case 4:
      return panel_tile<kFormat, 4>;
    case 5:
      return panel_tile < kFormat, kNarrow >= 5 ? 5 : 1 > ;
    case 6:
      return panel_tile < kFormat, kNarrow >= 6 ? 6 : 1 > ;
    case 7:
      return panel_tile < kFormat, kNarrow >= 7 ? 7 : 1 > ;
    case 8:
      return panel_tile < kFormat, kNarrow >= 8 ? 8 : 1 > ;
    default:
      return panel_tile<kFormat, kWide>;
  }
}

template <Format kFormat>
static void panel_format(const uint8_t* panel, int in, LinearInput input, int rows, float* out, int64_t out_stride) {
  while (rows > 0) {
    const int tile = rows >= kWide ? kWide : rows <= kNarrow ? rows : (rows + 1) / 2;
    panel_tile_of<kFormat>(tile)(panel, in, input, out, out_stride);
    rows -= tile;
    out += tile * out_stride;
    input.x += tile * input.stride;
    input.group_sums += tile * input.sums_stride;
  }
}

static void panel_any(Format format, const uint8_t* panel, int in, const LinearInput& input, int rows, float* out,
                      int64_t out_stride) {
  switch (format) {
    case Format::kFloat32:
      return panel_format<Format::kFloat32>(panel, in, input, rows, out, out_stride);
    case Format::kBFloat16:
      return panel_format<Format::kBFloat16>(panel, in, input, rows, out, out_stride);
    case Format::kQ8_0:
      return panel_format<Format::kQ8_0>(panel, in, input, rows, out, out_stride);
    case Format::kQ4_0:
      return panel_format<Format::kQ4_0>(panel, in, input, rows, out, out_stride);
    case Format::kQ4_1:
      return panel_format<Format::kQ4_1>(panel, in, input, rows, out, out_stride);
  }
}

static void group_sums(const float* x, int groups, float* sums) {
  for (int g = 0; g < groups; ++g, x += kGroup) {
    Vec sum = load(x);
    for (int i = kLanes; i < kGroup; i += kLanes) sum = sum + load(x + i);
    sums[g] = sum_lanes(sum);
  }
}

template <class Item, int kCount>
static inline void shrink_rows(const Item* a, const float* x, int in, float* out) {
  Vec sums[kCount];
#pragma GCC unroll 8
  for (int j = 0; j < kCount; ++j) sums[j] = set1(0.0f);
  for (int i = 0; i < in; i += kLanes) {
    const Vec input = load(x + i);
#pragma GCC unroll 8
    for (int j = 0; j < kCount; ++j) {
      sums[j] = multiply_add(load_weights(a + static_cast<int64_t>(j) * in + i), input, sums[j]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < kCount; ++j) out[j] = sum_lanes(sums[j]);
}

template <class Item>
static void shrink(const Item* a, int rank, const float* x, int in, float* out) {
  int j = 0;
  for (; j + 8 <= rank; j += 8) shrink_rows<Item, 8>(a + static_cast<int64_t>(j) * in, x, in, out + j);
  for (; j + 4 <= rank; j += 4) shrink_rows<Item, 4>(a + static_cast<int64_t>(j) * in, x, in, out + j);
  for (; j < rank; ++j) shrink_rows<Item, 1>(a + static_cast<int64_t>(j) * in, x, in, out + j);
}

static void shrink_any(Format format, const void* a, int rank, const float* x, int in, float* out) {
  if (format == Format::kFloat32) return shrink(static_cast<const float*>(a), rank, x, in, out);
  shrink(static_cast<const uint16_t*>(a), rank, x, in, out);
}

template <class Item>
static void expand(const Item* b, int rank, const float* factors, float* out) {
  constexpr int kVecs = kPanel / kLanes;
  Vec sums[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) sums[v] = load(out + v * kLanes);
  for (int j = 0; j < rank; ++j, b += kPanel) {
    const Vec factor = set1(factors[j]);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[v] = multiply_add(factor, load_weights(b + v * kLanes), sums[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) store(out + v * kLanes, sums[v]);
}

static void expand_any(Format format, const void* b, int rank, const float* factors, float* out) {
  if (format == Format::kFloat32) return expand(static_cast<const float*>(b), rank, factors, out);
  expand(static_cast<const uint16_t*>(b), rank, factors, out);
}

}  // namespace pcm::PCM_ISA
