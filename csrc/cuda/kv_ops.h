// The device side of the KV cache manager (kv_cache.h): what is done to keys, values and tables where they lie.
//
// Every function launches kernels on a stream and waits for nothing, so all of them can be captured in a CUDA graph. It
// takes addresses in device memory, sizes, and strides; it allocates nothing. Arguments are trusted (the Python shim
// checks them); a launch that fails throws std::runtime_error with CUDA's own words.
//
// A *block* holds block_size tokens, a *slot* is block * block_size + place in the block. A *sequence* is one answer in
// the making; each of its *rows* is that sequence read by one expert, or by the PCM. Nothing here includes a header of
// CUDA's, so host code without a toolkit can be compiled against it.
#pragma once

#include <cstdint>
#include <vector>

namespace pcm {

// "cuda"; "cpu" where tests run the kernels without a device.
const char* device_type();

// Compute capabilities that the kernels were compiled for, like 80 and 90.
std::vector<int> architectures();

enum class DeviceDtype : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// New keys or values, [tokens][heads][head_dim]; the items of a head lie side by side. Strides in items.
struct NewHeads {
  const void* data;
  DeviceDtype dtype;
  int64_t token_stride, head_stride;
};

// The keys or the values of one layer, [blocks][heads][block_size][head_dim] as strides in items put them.
struct LayerCache {
  void* data;
  DeviceDtype dtype;
  int64_t block_stride, head_stride, slot_stride, item_stride;
};

struct StoreShape {
  int32_t tokens, heads, head_dim, block_size;
};

// Writes token t's keys and values into slot slots[t], rounded to nearest even where the cache's type is narrower.
//   keys and values have one dtype, the caches have one; any of the three to any of the three.
//   slots: [tokens] int64. A negative slot writes nothing. No slot is named twice.
// Items move 16 bytes at a time where addresses and strides allow, else one by one.
void store_kv(const NewHeads& keys, const NewHeads& values, const int64_t* slots, const StoreShape& shape,
              const LayerCache& key_cache, const LayerCache& value_cache, void* stream);

// All that belongs to the blocks of a cache: block b is `parts` runs of part_bytes bytes, run p of them at
// data + p * part_stride + b * block_stride. One tensor [blocks, ...] is one part; [layers, 2, blocks, ...] is
// 2 * layers parts. Sizes and strides in bytes, all of them even.
struct BlockPool {
  void* data;
  int64_t part_bytes, part_stride, block_stride;
  int32_t parts;
};

// Copy-on-write: copies block moves[i][0] to block moves[i][1], all parts in one launch, all moves at the same time.
//   moves: [count][2] int64. A negative source copies nothing. No target is a source or another's target, which
//   KvCacheManager::copies() promises.
void copy_blocks(const BlockPool& pool, const int64_t* moves, int32_t count, void* stream);

// Block tables as kernels read them: [rows][width] int32, rows `stride` items apart. Negative entries are no block.
struct BlockTables {
  int32_t* data;
  int32_t rows, width;
  int64_t stride;
};

// Defragmentation: makes the moves one after the other, in place, and has every table entry follow its content.
//   moves: [count][2] int64, from one block to another; the effect is that of doing them in this order, so a later move
//   may read what an earlier one wrote and overwrite what an earlier one read. Any permutation of blocks is such a list
//   if one block is spare: kv_moves.h orders it. A negative source is skipped.
// No scratch: a thread owns the same few bytes of every block, and takes them through all moves.
void gather_blocks(const BlockPool& pool, const int64_t* moves, int32_t count, const BlockTables& tables, void* stream);

enum class SequenceState : int32_t {
  kGoing = 0,
  kStopped = 1,  // drew one of its stop tokens; also what the sequences that fill up a batch bucket are
  kNoRoom = 2,   // a row's table is full: this step counts for nothing, and is done again
  kFailed = 3,   // the sampler gave token -1
};

// What a captured decode step reads and writes beside the model: the static buffers of one batch bucket. They are what
// the *next* step reads, and `advance` is the last kernel of a step.
struct StepBuffers {
  int32_t sequences, rows, stop_width;

  // One a sequence.
  const int64_t* drawn;        // [sequences]: token from the sampler, -1 if it failed
  const int64_t* stop_tokens;  // [sequences][stop_width], filled up with -1
  int32_t* state;              // [sequences]: SequenceState
  int64_t* draw_positions;     // [sequences]: the position that keys the next draw (Philox)

  // One a row.
  const int32_t* sequence_of;  // [rows]: which sequence a row reads for; -1 for rows that fill up a batch bucket
  const int32_t* capacities;   // [rows]: tokens for which its table has slots that are the row's own
  int64_t* input_ids;          // [rows]: the token that the next step reads,
  int64_t* positions;          // [rows]:   at this position,
  int64_t* slots;              // [rows]:   and stores its keys and values there; -1 nowhere
  int32_t* lengths;            // [rows]: tokens that attention sees, this one included: positions + 1

  int32_t* going;  // [1]: how many sequences are going after this step
};

// Turns what the sampler drew into the inputs of the next step. For each sequence that is going or had no room:
//   its state becomes kFailed if drawn is -1, else kStopped if drawn is one of its stop tokens, else kNoRoom if
//   positions + 1 >= capacities for any of its rows, else kGoing.
//   If it is going: draw_positions += 1, and for each of its rows input_ids = drawn, positions += 1, lengths += 1,
//   slots = table[positions / block_size] * block_size + positions % block_size.
//   If it is not: its rows keep input_ids, positions and lengths, and slots = -1, so that further replays change
//   nothing. A stopped or failed sequence stays so until the host puts another in its place. One without room draws
//   from the same state again, and so the same token, at every replay, until capacities (and tables) say there is room:
//   the host takes a token from `drawn` only if the state is not kNoRoom.
// Rows that fill up a bucket (sequence_of < 0) get slots = -1. Then going = the number of sequences in state kGoing.
//   tables: at least StepBuffers::rows rows; entries below capacities / block_size, rounded up, are valid.
void advance(const StepBuffers& step, const BlockTables& tables, int32_t block_size, void* stream);

}  // namespace pcm
