// The memory behind the block tables on the CPU: keys and values of every layer, float32 or bfloat16.
//
//   [num_blocks][num_layers][2: keys, values][num_kv_heads][tile], C order
//
// with tiles [head_dim][block_size] of keys and [block_size][head_dim] of values. Decode attention takes one row and
// one key/value head at a time and walks the row's blocks: for each it reads one contiguous tile of keys, whose scores
// come out side by side in vectors, and later one of values. A block comes first: what is resident follows the blocks
// used, huge pages or not, and copying a block is one memcpy.
//
// The memory starts at a page and each tile at a multiple of 64 bytes whenever block_size * head_dim * item size is
// one. Pages are zero and take no memory until they are written, whatever the size of the pool.
//
// Thread-safe as plain memory is: different slots may be written at the same time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "arena.h"

namespace pcm {

enum class KvDtype { kFloat32, kBFloat16 };

struct KvStorageShape {
  int32_t num_layers;
  int32_t num_blocks;
  int32_t num_kv_heads;
  int32_t block_size;
  int32_t head_dim;
  KvDtype dtype;
};

class KvStorage {
 public:
  // Throws std::invalid_argument for sizes that are not positive, std::bad_alloc if the address space is refused.
  explicit KvStorage(const KvStorageShape& shape);

  const KvStorageShape& shape() const { return shape_; }
  size_t item_bytes() const { return shape_.dtype == KvDtype::kFloat32 ? 4 : 2; }
  size_t num_bytes() const { return shape_.num_blocks * block_stride() * item_bytes(); }

  // Strides in items. Those of a slot and of an item in a slot are 1 and block_size for keys, head_dim and 1 for
  // values.
  size_t head_stride() const { return static_cast<size_t>(shape_.block_size) * shape_.head_dim; }
  size_t value_stride() const { return shape_.num_kv_heads * head_stride(); }  // from the keys of a block to its values
  size_t layer_stride() const { return 2 * value_stride(); }
  size_t block_stride() const { return shape_.num_layers * layer_stride(); }

  void* data() { return pages_.data(); }
  const void* data() const { return pages_.data(); }
  // A layer of block 0.
  void* layer(int32_t index) { return static_cast<char*>(data()) + index * layer_stride() * item_bytes(); }
  const void* layer(int32_t index) const { return const_cast<KvStorage*>(this)->layer(index); }

  // The functions below trust their arguments (they run once a layer and a row); the Python bindings check them.

  // Writes `count` consecutive tokens of a row, from position `start` on, rounding to the storage type (to nearest,
  // ties to even). keys, values: float32 [count][num_kv_heads][head_dim], the tokens token_stride floats apart.
  void write(int32_t layer, const int32_t* block_table, int32_t start, int32_t count, const float* keys,
             const float* values, size_t token_stride);

  // The inverse of write, exact.
  void read(int32_t layer, const int32_t* block_table, int32_t start, int32_t count, float* keys, float* values,
            size_t token_stride) const;

  // All layers, keys and values.
  void copy_block(int32_t src, int32_t dst);

 private:
  KvStorageShape shape_;
  Pages pages_;
};

}  // namespace pcm
