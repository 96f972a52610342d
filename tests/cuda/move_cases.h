// copy_blocks and gather_blocks beside host code.
#pragma once

#include <cstring>

#include "cuda/kv_ops.h"
#include "kv_moves.h"
#include "random_case.h"

namespace {

using namespace pcm;

struct PoolCase {
  Memory memory;
  BlockPool pool;
  int64_t blocks;

  unsigned char* at(std::vector<unsigned char>& bytes, int64_t block, int64_t part) const {
    return bytes.data() + part * pool.part_stride + block * pool.block_stride;
  }
};

PoolCase make_pool(Random& random, int64_t blocks) {
  const int64_t unit = random.one_of({16, 16, 2}), parts = 1 + random.below(4);
  const int64_t size = unit * (1 + random.below(random.chance(4) ? 1500 : 40)), gap = unit * random.below(2);
  const bool parts_first = random.chance(2);
  const int64_t block_stride = (size + gap) * (parts_first ? 1 : parts);
  const int64_t part_stride = (size + gap) * (parts_first ? blocks : 1);
  Memory memory(random, blocks * parts * (size + gap), random.chance(4) ? 2 : 0);
  const BlockPool pool{memory.data(), size, part_stride, block_stride, static_cast<int32_t>(parts)};
  return {std::move(memory), pool, blocks};
}

// What all moves at the same time make of `before`.
std::vector<unsigned char> moved(const PoolCase& one, std::vector<unsigned char> before,
                                 const std::vector<KvBlockCopy>& moves) {
  std::vector<unsigned char> after = before;
  for (const KvBlockCopy& move : moves) {
    for (int32_t part = 0; part < one.pool.parts; ++part) {
      std::memcpy(one.at(after, move.dst, part), one.at(before, move.src, part), one.pool.part_bytes);
    }
  }
  return after;
}

// As kernels take them, with moves that move nothing in between.
std::vector<int64_t> pairs(Random& random, const std::vector<KvBlockCopy>& moves) {
  std::vector<int64_t> list;
  for (const KvBlockCopy& move : moves) {
    if (random.chance(6)) list.insert(list.end(), {-1, random.below(3) - 1});
    list.insert(list.end(), {move.src, move.dst});
  }
  return list;
}

void test_copy_blocks(Random& random) {
  PoolCase one = make_pool(random, 2 + random.below(20));
  const std::vector<int64_t> order = random.permutation(one.blocks);
  const int64_t targets = random.below(one.blocks / 2 + 1);  // a source may be copied more than once
  std::vector<KvBlockCopy> moves;
  for (int64_t i = 0; i < targets; ++i) {
    const int64_t source = order[targets + random.below(one.blocks - targets)];
    moves.push_back({static_cast<int32_t>(source), static_cast<int32_t>(order[i])});
  }
  const std::vector<int64_t> list = pairs(random, moves);
  const auto expected = moved(one, one.memory.copy(), moves);
  copy_blocks(one.pool, list.data(), static_cast<int32_t>(list.size() / 2), nullptr);
  REQUIRE(one.memory.copy() == expected);
}

void test_gather_blocks(Random& random) {
  PoolCase one = make_pool(random, 2 + random.below(random.chance(3) ? 400 : 12));
  const auto spare = static_cast<int32_t>(one.blocks - 1);
  const std::vector<int64_t> from = random.permutation(spare), to = random.permutation(spare);
  std::vector<KvBlockCopy> moves;
  std::vector<int32_t> new_of(one.blocks);
  std::iota(new_of.begin(), new_of.end(), 0);
  for (int64_t i = 0; i < spare; ++i) {
    if (one.blocks % 3 == 0 && random.chance(2)) continue;  // else a whole permutation
    moves.push_back({static_cast<int32_t>(from[i]), static_cast<int32_t>(to[i])});
    new_of[from[i]] = static_cast<int32_t>(to[i]);
  }
  const auto rows = static_cast<int32_t>(random.below(12)), width = static_cast<int32_t>(1 + random.below(20));
  const int64_t stride = width + random.below(3);
  std::vector<int32_t> table(rows * stride, 12345);
  for (int32_t r = 0; r < rows; ++r) {
    for (int32_t i = 0; i < width; ++i) {
      table[r * stride + i] = random.chance(5) ? kNoBlock : static_cast<int32_t>(random.below(spare));
    }
  }
  std::vector<int32_t> expected_table = table;
  for (int32_t& entry : expected_table) entry = entry >= 0 && entry < spare ? new_of[entry] : entry;
  auto expected = moved(one, one.memory.copy(), moves);
  const std::vector<int64_t> list = pairs(random, ordered_moves(moves, spare));
  gather_blocks(one.pool, list.data(), static_cast<int32_t>(list.size() / 2), {table.data(), rows, width, stride},
                nullptr);
  auto after = one.memory.copy();
  for (int32_t part = 0; part < one.pool.parts; ++part) {
    std::memcpy(one.at(expected, spare, part), one.at(after, spare, part), one.pool.part_bytes);
  }
  REQUIRE(after == expected);
  REQUIRE(table == expected_table);
}

}  // namespace
