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

// How far ahead of their use weights are asked for, in bytes.
constexpr int kPrefetch = 2048;

// float32 or bfloat16: [in][kPanel]. Memory is what this waits for, so it goes through the panel once, from beginning
// to end, and keeps the sums of one strip of outputs in memory while it works on the other.
template <class Item, int kRows>
static void panel_plain(const Item* panel, int in, const LinearInput& input, float* out, int64_t out_stride) {
  constexpr int kVecs = vecs_for(kRows);
  for (int k = 0; k < in; k += kGroup) {
    const int count = in - k < kGroup ? in - k : kGroup;
    const Item* group = panel + static_cast<int64_t>(k) * kPanel;
    for (int i = 0; i < count * kPanel; i += 64 / static_cast<int>(sizeof(Item))) {
      __builtin_prefetch(group + kPrefetch / sizeof(Item) * 4 + i);
    }
    for (int start = 0; start < kPanel; start += kVecs * kLanes) {
      Vec sums[kRows][kVecs];
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
          sums[r][v] = k == 0 ? set1(0.0f) : load(out + r * out_stride + start + v * kLanes);
        }
      }
      const Item* p = group + start;
      for (int i = 0; i < count; ++i, p += kPanel) {
        Vec w[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) w[v] = load_weights(p + v * kLanes);
        add_outer<kRows>(input.x + k + i, input.stride, w, sums);
      }
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) store(out + r * out_stride + start + v * kLanes, sums[r][v]);
      }
    }
  }
}

// A group of a block format, see packed_linear.h: weight = scale * code + least.
template <Format kFormat>
struct Group {
  static constexpr int kPerWord = kFormat == Format::kQ8_0 ? 4 : 8;
  static constexpr int kScales = kFormat == Format::kQ4_1 ? 2 : 1;
  static constexpr int kWords = kScales * kPanel * 2;  // where the words start
  static constexpr int kBytes = kWords + kGroup / kPerWord * kPanel * 4;

  static inline Vec code(Words packed, int index) {
    return kFormat == Format::kQ8_0 ? byte(packed, index) : nibble(packed, index);
  }
  // What a code's input is multiplied by where codes are taken in place.
  static constexpr float place(int index) {
    if (!kCodesInPlace || index == kPerWord - 1) return 1.0f;
    return 1.0f / static_cast<float>(uint64_t{1} << (32 / kPerWord * index));
  }
  static inline Vec scale(const uint8_t* group, int output) {
    return load_f16(reinterpret_cast<const uint16_t*>(group) + output);
  }
  static inline Vec least(const uint8_t* group, int output) {
    if constexpr (kFormat == Format::kQ4_1) return load_f16(reinterpret_cast<const uint16_t*>(group) + kPanel + output);
    return scale(group, output) * set1(kFormat == Format::kQ8_0 ? -128.0f : -8.0f);
  }
};

// Asks for the memory ahead, some lines at each of `calls`.
class Fetcher {
 public:
  Fetcher(const Ahead& ahead, int calls) : run_(ahead.runs), end_(ahead.runs + ahead.count) {
    int lines = 0;
    for (const Run* run = run_; run != end_; ++run) lines += run->lines;
    const int a_call = (lines + calls - 1) / calls;
    a_call_ = a_call < kMost ? a_call : kMost;
  }
  inline void fetch() {
    for (int i = 0; i < a_call_ && run_ != end_; ++i) {
      __builtin_prefetch(run_->start + int64_t{line_} * 64, 0, 2);
      if (++line_ == run_->lines) {
        line_ = 0;
        ++run_;
      }
    }
  }

 private:
  static constexpr int kMost = 24;  // more than this and the product waits for memory
  const Run *run_, *end_;
  int a_call_, line_ = 0;
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
  const float *x = kCodesInPlace ? input.scaled : input.x, *group_sum = input.group_sums;
  Fetcher fetcher(input.ahead, in / kGroup);
  for (int k = 0; k < in; k += kGroup, group += G::kBytes, x += kGroup, ++group_sum) {
    for (int i = 0; i < G::kBytes; i += 64) __builtin_prefetch(group + kPrefetch + i);
    fetcher.fetch();
    for (int start = 0; start < kPanel; start += kVecs * kLanes) {
      Vec sums[kRows][kVecs];
      clear<kRows>(sums);
      const uint8_t* words = group + G::kWords + start * 4;
      for (int i = 0; i < kGroup; i += G::kPerWord, words += kPanel * 4) {
#pragma GCC unroll 8
        for (int j = 0; j < G::kPerWord; ++j) {
          Vec w[kVecs];
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) w[v] = G::code(load_words(words + v * kLanes * 4), j);
          add_outer<kRows>(x + i + j, input.stride, w, sums);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) {
        const Vec scale = G::scale(group, start + v * kLanes), least = G::least(group, start + v * kLanes);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          float* total = out + r * out_stride + start + v * kLanes;
          const Vec sum = multiply_add(scale, sums[r][v], load(total));
          store(total, multiply_add(least, set1(group_sum[r * input.sums_stride]), sum));
        }
      }
    }
  }
}

template <template <Format, int> class Tile, Format kFormat, class... Args>
static inline void with_rows(int rows, Args... args) {
  switch (rows) {
    case 1:
      return Tile<kFormat, 1>::run(args...);
    case 2:
      return Tile<kFormat, 2>::run(args...);
    case 3:
      return Tile<kFormat, 3>::run(args...);
    case 4:
      return Tile<kFormat, 4>::run(args...);
    case 5:
      return Tile < kFormat, kNarrow >= 5 ? 5 : 1 > ::run(args...);
    case 6:
      return Tile < kFormat, kNarrow >= 6 ? 6 : 1 > ::run(args...);
    case 7:
      return Tile < kFormat, kNarrow >= 7 ? 7 : 1 > ::run(args...);
    case 8:
      return Tile < kFormat, kNarrow >= 8 ? 8 : 1 > ::run(args...);
    default:
      return Tile<kFormat, kWide>::run(args...);
  }
}

static inline int tile_rows(int rows) { return rows >= kWide ? kWide : rows <= kNarrow ? rows : (rows + 1) / 2; }

// Few rows: weights are decoded on the way.
template <Format kFormat, int kRows>
struct DirectTile {
  static void run(const uint8_t* panel, int in, LinearInput input, float* out, int64_t out_stride) {
    if constexpr (kFormat == Format::kFloat32) {
      panel_plain<float, kRows>(reinterpret_cast<const float*>(panel), in, input, out, out_stride);
    } else if constexpr (kFormat == Format::kBFloat16) {
      panel_plain<uint16_t, kRows>(reinterpret_cast<const uint16_t*>(panel), in, input, out, out_stride);
    } else {
      panel_blocks<kFormat, kRows>(panel, in, input, out, out_stride);
    }
  }
};

// Many rows: kDepth inputs of a panel are decoded once and then meet all rows, from the first-level cache. The
// operations on a row are those of the direct tile.
constexpr int kDepth = 128;
struct DecodedPanel {
  alignas(64) float weights[kDepth * kPanel];
  alignas(64) float scale[kDepth / kGroup][kPanel], least[kDepth / kGroup][kPanel];
  int depth;
  bool first;  // of the panel
};

template <Format kFormat>
static void decode(const uint8_t* panel, int start, DecodedPanel& to) {
  float* w = to.weights;
  if constexpr (kFormat == Format::kFloat32 || kFormat == Format::kBFloat16) {
    constexpr int kBytes = kFormat == Format::kFloat32 ? 4 : 2;
    const uint8_t* p = panel + static_cast<int64_t>(start) * kPanel * kBytes;
    for (int i = 0; i < to.depth * kPanel; i += kLanes) {
      if constexpr (kFormat == Format::kFloat32) store(w + i, load(reinterpret_cast<const float*>(p) + i));
      if constexpr (kFormat == Format::kBFloat16) store(w + i, load_bf16(reinterpret_cast<const uint16_t*>(p) + i));
    }
  } else {
    using G = Group<kFormat>;
    const uint8_t* group = panel + static_cast<int64_t>(start) / kGroup * G::kBytes;
    for (int g = 0; g < to.depth / kGroup; ++g, group += G::kBytes) {
      for (int o = 0; o < kPanel; o += kLanes) {
        store(to.scale[g] + o, G::scale(group, o));
        store(to.least[g] + o, G::least(group, o));
      }
      const uint8_t* words = group + G::kWords;
      for (int i = 0; i < kGroup; i += G::kPerWord, words += kPanel * 4, w += G::kPerWord * kPanel) {
        for (int o = 0; o < kPanel; o += kLanes) {
          const Words packed = load_words(words + o * 4);
#pragma GCC unroll 8
          for (int j = 0; j < G::kPerWord; ++j) store(w + j * kPanel + o, G::code(packed, j) * set1(G::place(j)));
        }
      }
    }
  }
}

template <Format kFormat, int kRows>
struct DecodedTile {
  static void run(const DecodedPanel* panel, LinearInput input, float* out, int64_t out_stride) {
    constexpr bool kGrouped = kFormat != Format::kFloat32 && kFormat != Format::kBFloat16;
    constexpr int kVecs = vecs_for(kRows);
    for (int start = 0; start < kPanel; start += kVecs * kLanes) {
      Vec sums[kRows][kVecs];
      const float* w = panel->weights + start;
      const int step = kGrouped ? kGroup : panel->depth;
      for (int k = 0; k < panel->depth; k += step) {
        const bool fresh = panel->first && k == 0;
        if (kGrouped || fresh) {
          clear<kRows>(sums);
        } else {
          for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < kVecs; ++v) sums[r][v] = load(out + r * out_stride + start + v * kLanes);
          }
        }
        for (int i = 0; i < step; ++i, w += kPanel) {
          Vec weights[kVecs];
#pragma GCC unroll 4
          for (int v = 0; v < kVecs; ++v) weights[v] = load(w + v * kLanes);
          add_outer<kRows>(input.x + k + i, input.stride, weights, sums);
        }
        for (int v = 0; v < kVecs; ++v) {
          const int o = start + v * kLanes, g = k / kGroup;
          for (int r = 0; r < kRows; ++r) {
            float* total = out + r * out_stride + o;
            Vec sum = sums[r][v];
            if constexpr (kGrouped) {
              sum = multiply_add(load(panel->scale[g] + o), sum, fresh ? set1(0.0f) : load(total));
              sum = multiply_add(load(panel->least[g] + o), set1(input.group_sums[r * input.sums_stride + g]), sum);
            }
            store(total, sum);
          }
        }
      }
    }
  }
};

template <Format kFormat>
static void panel_format(const uint8_t* panel, int in, LinearInput input, int rows, float* out, int64_t out_stride) {
  const auto for_tiles = [&](auto&& run) {
    for (int r = 0; r < rows;) {
      const int tile = tile_rows(rows - r);
      run(tile,
          LinearInput{input.x + r * input.stride, input.scaled + r * input.stride, input.stride,
                      input.group_sums + r * input.sums_stride, input.sums_stride, r == 0 ? input.ahead : Ahead{}},
          out + r * out_stride);
      r += tile;
    }
  };
  if (rows < 3 * kWide) {
    for_tiles([&](int tile, const LinearInput& tile_input, float* to) {
      with_rows<DirectTile, kFormat>(tile, panel, in, tile_input, to, out_stride);
    });
    return;
  }
  DecodedPanel decoded;
  for (int k = 0; k < in; k += kDepth, input.x += kDepth, input.group_sums += kDepth / kGroup) {
    decoded.depth = in - k < kDepth ? in - k : kDepth;
    decoded.first = k == 0;
    decode<kFormat>(panel, k, decoded);
    for_tiles([&](int tile, const LinearInput& tile_input, float* to) {
      with_rows<DecodedTile, kFormat>(tile, static_cast<const DecodedPanel*>(&decoded), tile_input, to, out_stride);
    });
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

// What the block formats need to know of a row of inputs: the sum of each group, and the inputs scaled for codes taken
// in place.
template <Format kFormat>
static void scale_inputs(const float* x, int groups, float* sums, float* scaled) {
  using G = Group<kFormat>;
  alignas(64) float places[kGroup];
  for (int i = 0; i < kGroup; ++i) places[i] = G::place(i % G::kPerWord);
  for (int g = 0; g < groups; ++g, x += kGroup, scaled += kGroup) {
    Vec sum = set1(0.0f);
    for (int i = 0; i < kGroup; i += kLanes) {
      sum = sum + load(x + i);
      if (kCodesInPlace) store(scaled + i, load(x + i) * load(places + i));
    }
    sums[g] = sum_lanes(sum);
  }
}

static void scale_inputs_any(Format format, const float* x, int groups, float* sums, float* scaled) {
  if (format == Format::kQ8_0) return scale_inputs<Format::kQ8_0>(x, groups, sums, scaled);
  scale_inputs<Format::kQ4_1>(x, groups, sums, scaled);  // and Q4_0
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
