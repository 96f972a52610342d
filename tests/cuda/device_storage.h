// The KV cache in emulated device memory, under the names of KvStorage, so that tests/cpp/kv_cache_driver.cpp can put
// the kernels of csrc/cuda to the same use as the memory on the CPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/kv_ops.h"
#include "kv_cache.h"
#include "kv_storage.h"

class DeviceStorage {
 public:
  // Layers first where items are float32, blocks first where they are bfloat16: both occur.
  explicit DeviceStorage(const pcm::KvStorageShape& shape)
      : shape_(shape),
        bytes_(shape.dtype == pcm::KvDtype::kFloat32 ? 4 : 2),
        tile_(int64_t{shape.num_kv_heads} * shape.block_size * shape.head_dim),
        memory_(2 * shape.num_layers * shape.num_blocks * tile_ * bytes_) {
    const int32_t parts = 2 * shape.num_layers;
    const bool layers_first = bytes_ == 4;
    pool_ = {memory_.data(), tile_ * bytes_, tile_ * bytes_ * (layers_first ? shape.num_blocks : 1),
             tile_ * bytes_ * (layers_first ? 1 : parts), parts};
  }

  void write(int32_t layer, const int32_t* block_table, int32_t start, int32_t count, const float* keys,
             const float* values, size_t token_stride) {
    std::vector<int64_t> slots;
    for (int32_t p = start; p < start + count; ++p) {
      slots.push_back(int64_t{block_table[p / shape_.block_size]} * shape_.block_size + p % shape_.block_size);
    }
    const auto news = [&](const float* data) -> pcm::NewHeads {
      return {data, pcm::DeviceDtype::kFloat32, static_cast<int64_t>(token_stride), shape_.head_dim};
    };
    pcm::store_kv(news(keys), news(values), slots.data(),
                  {count, shape_.num_kv_heads, shape_.head_dim, shape_.block_size}, cache(2 * layer),
                  cache(2 * layer + 1), nullptr);
  }

  void read(int32_t layer, const int32_t* block_table, int32_t start, int32_t count, float* keys, float* values,
            size_t token_stride) const {
    for (int32_t p = start; p < start + count; ++p) {
      const int32_t block = block_table[p / shape_.block_size];
      for (int64_t i = 0; i < int64_t{shape_.num_kv_heads} * shape_.head_dim; ++i) {
        const int64_t item =
            (i / shape_.head_dim * shape_.block_size + p % shape_.block_size) * shape_.head_dim + i % shape_.head_dim;
        keys[(p - start) * token_stride + i] = at(2 * layer, block, item);
        values[(p - start) * token_stride + i] = at(2 * layer + 1, block, item);
      }
    }
  }

  void copy_block(int32_t src, int32_t dst) {
    const int64_t moves[] = {src, dst};
    pcm::copy_blocks(pool_, moves, 1, nullptr);
  }

  void move_blocks(const std::vector<pcm::KvBlockCopy>& moves, std::vector<int32_t>& tables, int32_t rows) {
    std::vector<int64_t> pairs;
    for (const pcm::KvBlockCopy& move : moves) pairs.insert(pairs.end(), {move.src, move.dst});
    const auto width = static_cast<int32_t>(tables.size()) / rows;
    pcm::gather_blocks(pool_, pairs.data(), static_cast<int32_t>(moves.size()), {tables.data(), rows, width, width},
                       nullptr);
  }

 private:
  pcm::LayerCache cache(int32_t part) {
    const auto dtype = bytes_ == 4 ? pcm::DeviceDtype::kFloat32 : pcm::DeviceDtype::kBFloat16;
    return {memory_.data() + part * pool_.part_stride,    dtype,           pool_.block_stride / bytes_,
            int64_t{shape_.block_size} * shape_.head_dim, shape_.head_dim, 1};
  }

  float at(int32_t part, int32_t block, int64_t item) const {
    const unsigned char* bytes = memory_.data() + part * pool_.part_stride + block * pool_.block_stride + item * bytes_;
    uint32_t bits = 0;
    std::memcpy(reinterpret_cast<unsigned char*>(&bits) + 4 - bytes_, bytes, bytes_);  // bfloat16 is the upper half
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  pcm::KvStorageShape shape_;
  int64_t bytes_, tile_;
  std::vector<unsigned char> memory_;
  pcm::BlockPool pool_;
};

inline void move_blocks(DeviceStorage& storage, const std::vector<pcm::KvBlockCopy>& moves,
                        std::vector<int32_t>& tables, int32_t rows) {
  storage.move_blocks(moves, tables, rows);
}
