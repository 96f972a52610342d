#include <algorithm>
#include <type_traits>

#include "device.h"
#include "kv_ops.h"

namespace pcm {
namespace {

constexpr int kThreads = 128;
constexpr int kWarp = 32;

// --- Numbers

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

template <class To, class From>
__device__ To converted(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_same_v<To, float>) {
    return to_float(x);
  } else if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16_rn(to_float(x));
  } else {
    return __float2half_rn(to_float(x));
  }
}

// --- store_kv

// Items that are read or written at once, 16 bytes at a time.
template <class T, int kWidth>
struct alignas(std::min<size_t>(sizeof(T) * kWidth, 16)) Pack {
  T items[kWidth];
};

constexpr int kPack = 8;

// The keys, or the values.
struct Stream {
  NewHeads from;
  LayerCache to;
  bool packed;  // whether kPack items lie side by side and aligned, here and there
};

template <class To, class From, int kWidth>
__device__ void store_token(const Stream& stream, const StoreShape& shape, int64_t token, int64_t slot) {
  const auto* from = static_cast<const From*>(stream.from.data) + token * stream.from.token_stride;
  auto* to = static_cast<To*>(stream.to.data) + slot / shape.block_size * stream.to.block_stride +
             slot % shape.block_size * stream.to.slot_stride;
  const int packs = shape.head_dim / kWidth;
  for (int i = threadIdx.x; i < shape.heads * packs; i += kThreads) {
    const int64_t head = i / packs, item = i % packs * kWidth;
    const auto in = *reinterpret_cast<const Pack<From, kWidth>*>(from + head * stream.from.head_stride + item);
    Pack<To, kWidth> out;
    for (int j = 0; j < kWidth; ++j) out.items[j] = converted<To>(in.items[j]);
    *reinterpret_cast<Pack<To, kWidth>*>(to + head * stream.to.head_stride + item * stream.to.item_stride) = out;
  }
}

// One block of threads for the keys of a token (blockIdx.y = 0), one for its values.
template <class To, class From>
__global__ void store_tokens(const __grid_constant__ Stream keys, const __grid_constant__ Stream values,
                             const int64_t* slots, const __grid_constant__ StoreShape shape) {
  const int64_t slot = slots[blockIdx.x];
  if (slot < 0) return;
  const Stream& stream = blockIdx.y == 0 ? keys : values;
  if (stream.packed) {
    store_token<To, From, kPack>(stream, shape, blockIdx.x, slot);
  } else {
    store_token<To, From, 1>(stream, shape, blockIdx.x, slot);
  }
}

bool can_be_packed(const NewHeads& from, const LayerCache& to, int32_t head_dim) {
  const auto whole = [](int64_t stride) { return stride % kPack == 0; };
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return to.item_stride == 1 && whole(head_dim) && whole(from.token_stride) && whole(from.head_stride) &&
         whole(to.block_stride) && whole(to.head_stride) && whole(to.slot_stride) && aligned(from.data) &&
         aligned(to.data);
}

// Calls function(T()) with the type that a dtype stands for.
template <class Function>
void with_type(DeviceDtype dtype, Function function) {
  switch (dtype) {
    case DeviceDtype::kFloat32:
      return function(float());
    case DeviceDtype::kBFloat16:
      return function(__nv_bfloat16());
    case DeviceDtype::kFloat16:
      return function(__half());
  }
}

// --- Moves of blocks

// Calls visit(from, to) for each move in order, in every thread of the block: all of them must come here. Threads fetch
// the moves together, one each, and then all look at all of them.
template <class Visit>
__device__ void for_each_move(const int64_t* moves, int32_t count, Visit visit) {
  __shared__ int64_t sources[kThreads];
  __shared__ int64_t targets[kThreads];
  for (int32_t start = 0; start < count; start += kThreads) {
    const int32_t size = count - start < kThreads ? count - start : kThreads;
    const auto mine = static_cast<int32_t>(threadIdx.x);
    if (mine < size) {
      sources[mine] = moves[2 * (start + mine)];
      targets[mine] = moves[2 * (start + mine) + 1];
    }
    __syncthreads();  // the moves are here
    for (int32_t i = 0; i < size; ++i) {
      if (sources[i] >= 0) visit(sources[i], targets[i]);
    }
    __syncthreads();  // nobody still needs these moves
  }
}

template <class Word>
__global__ void copy_all(BlockPool pool, const int64_t* moves) {
  const int64_t source = moves[2 * blockIdx.x], target = moves[2 * blockIdx.x + 1];
  if (source < 0) return;
  char* part = static_cast<char*>(pool.data) + blockIdx.y * pool.part_stride;
  const auto* from = reinterpret_cast<const Word*>(part + source * pool.block_stride);
  auto* to = reinterpret_cast<Word*>(part + target * pool.block_stride);
  const int64_t words = pool.part_bytes / static_cast<int64_t>(sizeof(Word));
  for (int64_t w = blockIdx.z * kThreads + threadIdx.x; w < words; w += gridDim.z * kThreads) to[w] = from[w];
}

// One word of every block for each thread. Nobody else touches it, so its moves come one after the other.
template <class Word>
__global__ void move_words(BlockPool pool, const int64_t* moves, int32_t count) {
  const int64_t place = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * sizeof(Word);
  char* words = static_cast<char*>(pool.data) + blockIdx.y * pool.part_stride + place;
  const bool inside = place < pool.part_bytes;
  for_each_move(moves, count, [&](int64_t source, int64_t target) {
    if (!inside) return;
    *reinterpret_cast<Word*>(words + target * pool.block_stride) =
        *reinterpret_cast<const Word*>(words + source * pool.block_stride);
  });
}

// One entry of the tables for each thread: a block's content has moved, and then perhaps moved again.
__global__ void move_entries(BlockTables tables, const int64_t* moves, int32_t count) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool inside = index < static_cast<int64_t>(tables.rows) * tables.width;
  int32_t* entry = inside ? tables.data + index / tables.width * tables.stride + index % tables.width : nullptr;
  int32_t block = inside ? *entry : -1;
  for_each_move(moves, count, [&](int64_t source, int64_t target) {
    if (block == source) block = static_cast<int32_t>(target);
  });
  if (inside) *entry = block;
}

constexpr unsigned kMostChunks = 64;  // blocks of threads that share out a part of one block of the cache

unsigned blocks_for(int64_t items) { return static_cast<unsigned>((items + kThreads - 1) / kThreads); }

// Calls function(Word()) with the widest words that a pool can be moved in.
template <class Function>
void with_word(const BlockPool& pool, Function function) {
  const auto bits = reinterpret_cast<uintptr_t>(pool.data) | static_cast<uintptr_t>(pool.part_bytes) |
                    static_cast<uintptr_t>(pool.part_stride) | static_cast<uintptr_t>(pool.block_stride);
  if (bits % sizeof(uint4) == 0) {
    function(uint4());
  } else {
    function(uint16_t());
  }
}

// --- advance

// The sum over the block of threads, in all of them.
__device__ int32_t block_sum(int32_t value) {
  __shared__ int32_t of_warp[kThreads / kWarp];
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  int32_t total = 0;
  for (const int32_t part : of_warp) total += part;
  return total;
}

constexpr auto kGoing = static_cast<int32_t>(SequenceState::kGoing);
constexpr auto kStopped = static_cast<int32_t>(SequenceState::kStopped);
constexpr auto kNoRoom = static_cast<int32_t>(SequenceState::kNoRoom);
constexpr auto kFailed = static_cast<int32_t>(SequenceState::kFailed);

__device__ int32_t state_after(const StepBuffers& step, int32_t sequence) {
  const int64_t token = step.drawn[sequence];
  if (token < 0) return kFailed;
  for (int32_t i = 0; i < step.stop_width; ++i) {
    if (token == step.stop_tokens[static_cast<int64_t>(sequence) * step.stop_width + i]) return kStopped;
  }
  return kGoing;
}

// One block of threads: rows look at what became of their sequence, and sequences at what became of their rows.
__global__ void advance_step(StepBuffers step, BlockTables tables, int32_t block_size) {
  const auto first = static_cast<int32_t>(threadIdx.x);
  for (int32_t s = first; s < step.sequences; s += kThreads) {
    const int32_t state = step.state[s];
    if (state == kGoing || state == kNoRoom) step.state[s] = state_after(step, s);
  }
  __syncthreads();  // who failed or stopped
  for (int32_t r = first; r < step.rows; r += kThreads) {
    const int32_t sequence = step.sequence_of[r];
    if (sequence >= 0 && step.positions[r] + 1 >= step.capacities[r]) {
      atomicCAS(&step.state[sequence], kGoing, kNoRoom);
    }
  }
  __syncthreads();  // who has no room
  int32_t going = 0;
  for (int32_t s = first; s < step.sequences; s += kThreads) {
    if (step.state[s] != kGoing) continue;
    ++going;
    ++step.draw_positions[s];
  }
  for (int32_t r = first; r < step.rows; r += kThreads) {
    const int32_t sequence = step.sequence_of[r];
    int64_t slot = -1;
    if (sequence >= 0 && step.state[sequence] == kGoing) {
      const int64_t position = ++step.positions[r];
      ++step.lengths[r];
      step.input_ids[r] = step.drawn[sequence];
      const int64_t block = tables.data[r * tables.stride + position / block_size];
      slot = block * block_size + position % block_size;
    }
    step.slots[r] = slot;
  }
  going = block_sum(going);
  if (threadIdx.x == 0) *step.going = going;
}

}  // namespace

const char* device_type() { return kDeviceType; }

std::vector<int> architectures() {
  std::vector<int> capabilities{__CUDA_ARCH_LIST__};  // in tens, like 800
  for (int& capability : capabilities) capability /= 10;
  return capabilities;
}

void store_kv(const NewHeads& keys, const NewHeads& values, const int64_t* slots, const StoreShape& shape,
              const LayerCache& key_cache, const LayerCache& value_cache, void* stream) {
  if (shape.tokens == 0) return;
  const Stream key_stream{keys, key_cache, can_be_packed(keys, key_cache, shape.head_dim)};
  const Stream value_stream{values, value_cache, can_be_packed(values, value_cache, shape.head_dim)};
  const dim3 grid(static_cast<unsigned>(shape.tokens), 2);
  with_type(keys.dtype, [&](auto from) {
    with_type(key_cache.dtype, [&](auto to) {
      launch("store_kv", store_tokens<decltype(to), decltype(from)>, grid, kThreads, stream, key_stream, value_stream,
             slots, shape);
    });
  });
}

void copy_blocks(const BlockPool& pool, const int64_t* moves, int32_t count, void* stream) {
  if (count == 0) return;
  with_word(pool, [&](auto word) {
    const unsigned chunks = std::min(kMostChunks, blocks_for(pool.part_bytes / sizeof(word)));
    const dim3 grid(static_cast<unsigned>(count), static_cast<unsigned>(pool.parts), chunks);
    launch("copy_blocks", copy_all<decltype(word)>, grid, kThreads, stream, pool, moves);
  });
}

void gather_blocks(const BlockPool& pool, const int64_t* moves, int32_t count, const BlockTables& tables,
                   void* stream) {
  if (count == 0) return;
  with_word(pool, [&](auto word) {
    const dim3 grid(blocks_for(pool.part_bytes / sizeof(word)), static_cast<unsigned>(pool.parts));
    launch("gather_blocks", move_words<decltype(word)>, grid, kThreads, stream, pool, moves, count);
  });
  const int64_t entries = static_cast<int64_t>(tables.rows) * tables.width;
  if (entries == 0) return;
  launch("gather_blocks", move_entries, dim3(blocks_for(entries)), kThreads, stream, tables, moves, count);
}

void advance(const StepBuffers& step, const BlockTables& tables, int32_t block_size, void* stream) {
  launch("advance", advance_step, dim3(1), kThreads, stream, step, tables, block_size);
}

}  // namespace pcm
