// Attention of one token over the paged KV cache. Included once per instruction set, after its lanes.
//
// Keys lie [head_dim][slot] in a block, so that the scores of its 16 slots are sums of vectors; values lie
// [slot][head_dim]. The query heads that share a key/value head go together and read each key and value once.
#pragma once

#include "cpu/exp_log.h"
#include "cpu/isa.h"

namespace pcm::PCM_ISA {

constexpr int kHeadTile = kLanes == 16 ? 4 : 3;   // query heads worked on together
constexpr int kValueVecs = kLanes == 16 ? 2 : 4;  // vectors of the output worked on together
constexpr int kBlocksAhead = 2;
constexpr int kSlotVecs = kKvBlock / kLanes;  // vectors of scores in a block

static inline Vec load_item(const float* p) { return load(p); }
static inline Vec load_item(const uint16_t* p) { return load_bf16(p); }

// q K^T of kHeads query heads, for whole blocks.
template <class Item, int kHeads>
static void score_blocks(const AttentionInput& in, const float* q, float scale, float* scores, int64_t stride) {
  const int first = in.begin / kKvBlock, last = (in.end - 1) / kKvBlock;
  for (int block = first; block <= last; ++block, scores += kKvBlock) {
    const Item* key = static_cast<const Item*>(in.keys) + in.block_table[block] * in.block_stride;
    // Blocks lie anywhere, so the hardware does not foresee them: ask for the keys of a later block, and for the values
    // of this one, a line at a time.
    const int later = block + kBlocksAhead < last ? block + kBlocksAhead : last;
    const Item* next = static_cast<const Item*>(in.keys) + in.block_table[later] * in.block_stride;
    const Item* value = key + in.value_offset;
    Vec sums[kHeads][kSlotVecs];
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kSlotVecs; ++v) sums[h][v] = set1(0.0f);
    }
    for (int d = 0; d < in.head_dim; ++d, key += kKvBlock) {
      if (d * sizeof(Item) % 4 == 0) {  // 64 bytes on
        __builtin_prefetch(next + d * kKvBlock);
        __builtin_prefetch(value + d * kKvBlock, 0, 2);
      }
      Vec k[kSlotVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kSlotVecs; ++v) k[v] = load_item(key + v * kLanes);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const Vec query = set1(q[h * in.head_dim + d]);
#pragma GCC unroll 2
        for (int v = 0; v < kSlotVecs; ++v) sums[h][v] = multiply_add(query, k[v], sums[h][v]);
      }
    }
    for (int h = 0; h < kHeads; ++h) {
      for (int v = 0; v < kSlotVecs; ++v) store(scores + h * stride + v * kLanes, sums[h][v] * set1(scale));
    }
  }
}

// Softmax of the entries [begin, end) of x, given as multiples of kKvBlock around them.
static inline void softmax(float* x, int begin, int end) {
  const int n = (end + kKvBlock - 1) / kKvBlock * kKvBlock;
  for (int i = 0; i < begin; ++i) x[i] = -__builtin_inff();
  for (int i = end; i < n; ++i) x[i] = -__builtin_inff();
  Vec top = load(x);
  for (int i = kLanes; i < n; i += kLanes) top = max(top, load(x + i));
  const Vec greatest = set1(max_lane(top));
  Vec sum = set1(0.0f);
  for (int i = 0; i < n; i += kAbreast * kLanes) {
    Vec e[kAbreast];
#pragma GCC unroll 4
    for (int a = 0; a < kAbreast; ++a) e[a] = load(x + i + a * kLanes) - greatest;
    exp32_all<kAbreast>(e);
#pragma GCC unroll 4
    for (int a = 0; a < kAbreast; ++a) {
      sum = sum + e[a];
      store(x + i + a * kLanes, e[a]);
    }
  }
  const Vec factor = set1(1.0f / sum_lanes(sum));
  for (int i = 0; i < n; i += kLanes) store(x + i, load(x + i) * factor);
}

// The values of [begin, end) weighed by the scores, kVecs vectors of the head from `d` on.
template <class Item, int kHeads, int kVecs>
static void weigh_values(const AttentionInput& in, const float* scores, int64_t stride, int d, float* out) {
  Vec sums[kHeads][kVecs];
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVecs; ++v) sums[h][v] = set1(0.0f);
  }
  const int first = in.begin / kKvBlock;
  for (int block = first, t = in.begin; t < in.end; ++block) {
    const int end = in.end < (block + 1) * kKvBlock ? in.end : (block + 1) * kKvBlock;
    const Item* value = static_cast<const Item*>(in.keys) + in.block_table[block] * in.block_stride + in.value_offset +
                        static_cast<int64_t>(t % kKvBlock) * in.head_dim + d;
    for (; t < end; ++t, value += in.head_dim) {
      Vec x[kVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) x[v] = load_item(value + v * kLanes);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const Vec weight = set1(scores[h * stride + t - first * kKvBlock]);
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) sums[h][v] = multiply_add(weight, x[v], sums[h][v]);
      }
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int v = 0; v < kVecs; ++v) store(out + h * in.head_dim + d + v * kLanes, sums[h][v]);
  }
}

template <class Item, int kHeads>
static void attend_heads(const AttentionInput& in, const float* q, float* scores, int64_t stride, float* out) {
  score_blocks<Item, kHeads>(in, q, 1.0f / __builtin_sqrtf(static_cast<float>(in.head_dim)), scores, stride);
  const int start = in.begin / kKvBlock * kKvBlock;
  for (int h = 0; h < kHeads; ++h) softmax(scores + h * stride, in.begin - start, in.end - start);
  int d = 0;
  for (; d + kValueVecs * kLanes <= in.head_dim; d += kValueVecs * kLanes) {
    weigh_values<Item, kHeads, kValueVecs>(in, scores, stride, d, out);
  }
  for (; d < in.head_dim; d += kLanes) weigh_values<Item, kHeads, 1>(in, scores, stride, d, out);
}

template <class Item>
static void attend_group(const AttentionInput& in, float* scores, int64_t stride, float* out) {
  for (int done = 0; done < in.group;) {
    const int left = in.group - done, tile = left <= kHeadTile      ? left
                                             : left < 2 * kHeadTile ? (left + 1) / 2
                                                                    : kHeadTile;
    const float* q = in.q + static_cast<int64_t>(done) * in.head_dim;
    float* to = out + static_cast<int64_t>(done) * in.head_dim;
    switch (tile) {
      case 1:
        attend_heads<Item, 1>(in, q, scores, stride, to);
        break;
      case 2:
        attend_heads<Item, 2>(in, q, scores, stride, to);
        break;
      case 3:
        attend_heads<Item, 3>(in, q, scores, stride, to);
        break;
      default:
        attend_heads<Item, kHeadTile>(in, q, scores, stride, to);
        break;
    }
    done += tile;
  }
}

static void attend(const AttentionInput& in, float* scores, int64_t stride, float* out) {
  if (in.bf16) return attend_group<uint16_t>(in, scores, stride, out);
  attend_group<float>(in, scores, stride, out);
}

}  // namespace pcm::PCM_ISA
