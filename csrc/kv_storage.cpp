#include "kv_storage.h"

#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>

namespace pcm {
namespace {

const KvStorageShape& checked_shape(const KvStorageShape& shape) {
  const struct {
    const char* name;
    int32_t value;
  } sizes[] = {{"num_layers", shape.num_layers},
               {"num_blocks", shape.num_blocks},
               {"num_kv_heads", shape.num_kv_heads},
               {"block_size", shape.block_size},
               {"head_dim", shape.head_dim}};
  size_t items = 2;
  for (const auto& size : sizes) {
    if (size.value <= 0) {
      throw std::invalid_argument(std::string("kv_storage: ") + size.name + ": expected a positive number, got " +
                                  std::to_string(size.value));
    }
    if (items > std::numeric_limits<size_t>::max() / 8 / size.value) throw std::bad_alloc();
    items *= size.value;
  }
  return shape;
}

uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40;  // stays a NaN although the low bits go
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

float to_float(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

void convert(float value, float* to) { *to = value; }
void convert(float value, uint16_t* to) { *to = to_bfloat16(value); }
float convert(float value) { return value; }
float convert(uint16_t value) { return to_float(value); }

// Calls visit(item in storage, item in the caller's keys or values) for all of some tokens.
template <typename Visit>
void for_each_item(const KvStorage& storage, const int32_t* block_table, int32_t start, int32_t count,
                   size_t token_stride, bool keys, Visit visit) {
  const KvStorageShape& shape = storage.shape();
  const size_t slot_stride = keys ? 1 : shape.head_dim, item_stride = keys ? shape.block_size : 1;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t position = start + i;
    const size_t slot = block_table[position / shape.block_size] * storage.block_stride() +
                        (keys ? 0 : storage.value_stride()) + (position % shape.block_size) * slot_stride;
    for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
      const size_t tile = slot + head * storage.head_stride();
      const size_t given = i * token_stride + static_cast<size_t>(head) * shape.head_dim;
      for (int32_t d = 0; d < shape.head_dim; ++d) visit(tile + d * item_stride, given + d);
    }
  }
}

template <typename Item>
void write_items(const KvStorage& storage, Item* layer, const int32_t* block_table, int32_t start, int32_t count,
                 const float* keys, const float* values, size_t token_stride) {
  for_each_item(storage, block_table, start, count, token_stride, true,
                [&](size_t stored, size_t given) { convert(keys[given], layer + stored); });
  for_each_item(storage, block_table, start, count, token_stride, false,
                [&](size_t stored, size_t given) { convert(values[given], layer + stored); });
}

template <typename Item>
void read_items(const KvStorage& storage, const Item* layer, const int32_t* block_table, int32_t start, int32_t count,
                float* keys, float* values, size_t token_stride) {
  for_each_item(storage, block_table, start, count, token_stride, true,
                [&](size_t stored, size_t given) { keys[given] = convert(layer[stored]); });
  for_each_item(storage, block_table, start, count, token_stride, false,
                [&](size_t stored, size_t given) { values[given] = convert(layer[stored]); });
}

}  // namespace

KvStorage::KvStorage(const KvStorageShape& shape) : shape_(checked_shape(shape)), pages_(num_bytes()) {}

void KvStorage::write(int32_t index, const int32_t* block_table, int32_t start, int32_t count, const float* keys,
                      const float* values, size_t token_stride) {
  if (shape_.dtype == KvDtype::kFloat32) {
    write_items(*this, static_cast<float*>(layer(index)), block_table, start, count, keys, values, token_stride);
  } else {
    write_items(*this, static_cast<uint16_t*>(layer(index)), block_table, start, count, keys, values, token_stride);
  }
}

void KvStorage::read(int32_t index, const int32_t* block_table, int32_t start, int32_t count, float* keys,
                     float* values, size_t token_stride) const {
  if (shape_.dtype == KvDtype::kFloat32) {
    read_items(*this, static_cast<const float*>(layer(index)), block_table, start, count, keys, values, token_stride);
  } else {
    read_items(*this, static_cast<const uint16_t*>(layer(index)), block_table, start, count, keys, values,
               token_stride);
  }
}

void KvStorage::copy_block(int32_t src, int32_t dst) {
  const size_t bytes = block_stride() * item_bytes();
  auto* base = static_cast<char*>(data());
  std::memcpy(base + dst * bytes, base + src * bytes, bytes);
}

}  // namespace pcm
