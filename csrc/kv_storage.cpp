#include "kv_storage.h"

#include <sys/mman.h>

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

void store(float* to, const float* from, int32_t count) { std::memcpy(to, from, count * sizeof(float)); }

void store(uint16_t* to, const float* from, int32_t count) {
  for (int32_t i = 0; i < count; ++i) to[i] = to_bfloat16(from[i]);
}

void load(float* to, const float* from, int32_t count) { std::memcpy(to, from, count * sizeof(float)); }

void load(float* to, const uint16_t* from, int32_t count) {
  for (int32_t i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

// Calls visit(offset in storage, offset in the caller's array) for each head of each token: head_dim items both sides.
template <typename Visit>
void for_each_head(const KvStorage& storage, const int32_t* block_table, int32_t start, int32_t count,
                   size_t token_stride, Visit visit) {
  const KvStorageShape& shape = storage.shape();
  for (int32_t i = 0; i < count; ++i) {
    const int32_t position = start + i;
    const size_t slot = block_table[position / shape.block_size] * storage.block_stride() +
                        static_cast<size_t>(position % shape.block_size) * shape.head_dim;
    for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
      visit(slot + head * storage.head_stride(), i * token_stride + static_cast<size_t>(head) * shape.head_dim);
    }
  }
}

template <typename Item>
void write_items(const KvStorage& storage, Item* layer, const int32_t* block_table, int32_t start, int32_t count,
                 const float* keys, const float* values, size_t token_stride) {
  const int32_t head_dim = storage.shape().head_dim;
  for_each_head(storage, block_table, start, count, token_stride, [&](size_t in_storage, size_t in_array) {
    store(layer + in_storage, keys + in_array, head_dim);
    store(layer + in_storage + storage.value_stride(), values + in_array, head_dim);
  });
}

template <typename Item>
void read_items(const KvStorage& storage, const Item* layer, const int32_t* block_table, int32_t start, int32_t count,
                float* keys, float* values, size_t token_stride) {
  const int32_t head_dim = storage.shape().head_dim;
  for_each_head(storage, block_table, start, count, token_stride, [&](size_t in_storage, size_t in_array) {
    load(keys + in_array, layer + in_storage, head_dim);
    load(values + in_array, layer + in_storage + storage.value_stride(), head_dim);
  });
}

}  // namespace

KvStorage::KvStorage(const KvStorageShape& shape) : shape_(checked_shape(shape)) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
  flags |= MAP_NORESERVE;  // a pool may be larger than the memory it will ever use
#endif
  data_ = mmap(nullptr, num_bytes(), PROT_READ | PROT_WRITE, flags, -1, 0);
  if (data_ == MAP_FAILED) throw std::bad_alloc();
}

KvStorage::~KvStorage() { munmap(data_, num_bytes()); }

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
  for (int32_t index = 0; index < shape_.num_layers; ++index) {
    char* base = static_cast<char*>(layer(index));
    std::memcpy(base + dst * bytes, base + src * bytes, bytes);
  }
}

}  // namespace pcm
