// Which block of the KV cache holds which token of which row: allocation, sharing, prefix reuse. Host only, no tensors.
//
// A *block* has room for block_size tokens. A *row* is one sequence read by one expert (or by the PCM); it has a block
// table and a length, and position p lives in slot p % block_size of block table[p / block_size]. The keys and values
// themselves are elsewhere: in KvStorage (kv_storage.h) on the CPU, in device memory on a GPU. Both use these tables.
//
// A row's life: create_row (takes the cached blocks of its prompt's prefix), then per step append_slots, compute,
// commit, and at last free. Draft tokens that were refused are taken back by truncate.
//
//   committed <= length <= max_blocks_per_row * block_size
//   [0, committed)        tokens known, keys and values computed
//   [committed, length)   slots reserved by append_slots; their blocks belong to this row alone, so they may be written
//
// Every block is in exactly one of three states, and num_blocks = used + cached + free:
//   used    some row's table holds it (refcount >= 1); held by two or more rows it is never written
//   cached  no row holds it, but it is a registered prefix: a later row may take it up, or it is evicted when nothing
//           else is left, the least recently released first
//   free    no content
//
// Prefix reuse. commit registers each block that has become full under its namespace and the tokens up to its end
// (prefix_index.h; hits are verified against the tokens). A prefix is registered once: of two rows that compute it at
// the same time the first is registered, the other keeps its own blocks as they are. A block is unregistered, with all
// that follow it, when it is evicted or about to be overwritten; rows that hold one of them notice nothing.
//
// block_size: 16 by default. Only whole blocks are reused, and an expert's system prompt is often 20 to 40 tokens; a
// row wastes half a block on average, and there are K + 1 rows a sequence; 16 float32 scores fill one AVX-512 register,
// and 16 keys of 64 floats one 4 KiB page. Reading in blocks of 32 instead was about 5 % faster, shuffled or not.
//
// Not thread-safe: one thread (the engine's) owns a manager. Nothing is allocated after construction, save by
// defragment.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "prefix_index.h"

namespace pcm {

using RowId = int32_t;

struct KvCacheConfig {
  int32_t num_blocks = 0;
  int32_t block_size = 16;
  int32_t max_rows = 0;            // rows alive at once
  int32_t max_blocks_per_row = 0;  // longest row, in blocks
  uint64_t hash_mask = ~0ull;      // bits of a prefix hash that are kept; tests clear them to make hashes collide
};

// "Before this step writes anything, copy all of block src to block dst."
struct KvBlockCopy {
  int32_t src;
  int32_t dst;
};

struct KvPrefixMatch {
  int32_t tokens;       // tokens of the prompt that would not have to be computed
  int32_t idle_blocks;  // of their blocks, those no row holds now: taking them lowers num_free() by as much
};

struct KvCacheStats {
  int32_t used, cached, free, rows;  // now: blocks used + cached + free = num_blocks; live rows
  int64_t prompt_tokens;             // since construction: tokens of the prompts given to create_row,
  int64_t reused_tokens;             //   and how many of them were found in the cache
  int64_t hits, misses;              //   rows created with and without a reused block
  int64_t evictions;                 //   cached blocks that lost their content
  int64_t copies;                    //   blocks copied because they were shared
  int64_t refusals;                  //   calls of append_slots that did not fit
};

class KvCacheManager {
 public:
  // Throws std::invalid_argument for sizes that are not positive or too large.
  explicit KvCacheManager(const KvCacheConfig& config);

  // --- Rows. An id is valid until free(); a dead or unknown id throws std::invalid_argument, as does a bad count.

  // How much of a prompt is cached, without taking it. ceil(count / block_size) - tokens / block_size + idle_blocks,
  // compared with num_free(), tells whether the whole prompt fits now.
  KvPrefixMatch match_prefix(uint64_t namespace_id, const int32_t* prompt, int32_t count) const;

  // A row that starts with the longest cached prefix of the prompt; length() is the number of tokens reused, a multiple
  // of block_size and less than count, so that there is always a last token to compute logits from. The rest of the
  // prompt is for append_slots. namespace_id stands for everything but the tokens that keys and values depend on
  // (base, adapter, storage dtype). Nothing if max_rows rows are alive.
  [[nodiscard]] std::optional<RowId> create_row(uint64_t namespace_id, const int32_t* prompt, int32_t count);

  // A row with the same content, sharing all blocks; whoever appends first to a shared partial block gets a copy of it.
  // Slots not yet committed cannot be shared (std::invalid_argument). Nothing if max_rows rows are alive.
  [[nodiscard]] std::optional<RowId> fork(RowId row);

  // Reserves counts[i] more slots for rows[i], for all of the rows or for none of them: false, with nothing changed, if
  // the blocks do not suffice (wait, or free a row and recompute it later). Afterwards copies() lists the blocks to
  // copy before anything is written. Copies of one call, or of several calls of append_slots with no other call in
  // between, do not depend on each other: no dst is a src or another's dst.
  // Throws std::invalid_argument, with nothing changed, if a row is named twice or would outgrow max_blocks_per_row.
  [[nodiscard]] bool append_slots(const RowId* rows, const int32_t* counts, int32_t num_rows);
  [[nodiscard]] bool append_slots(RowId row, int32_t count) { return append_slots(&row, &count, 1); }
  const std::vector<KvBlockCopy>& copies() const { return copies_; }

  // The keys and values of the next `count` reserved slots have been computed, for these tokens.
  void commit(RowId row, const int32_t* tokens, int32_t count);

  // Forgets everything from position `length` on, committed or not, and lets go of the blocks beyond it.
  void truncate(RowId row, int32_t length);

  void free(RowId row);

  // Brings the content of all blocks that are not free into the blocks [0, used + cached), with as few moves as there
  // are, and rewrites the block tables. Gives the moves: before anything else is written, copy each src to its dst, in
  // any order (no dst is a src). The only call that allocates.
  [[nodiscard]] std::vector<KvBlockCopy> defragment();

  // --- Questions.

  // Blocks that append_slots(row, count) would take from num_free(), a copy of a shared block included. Rows that share
  // a block may together need fewer than the sum; append_slots counts exactly.
  int32_t blocks_needed(RowId row, int32_t count) const;
  int32_t num_free() const { return num_blocks_free_ + num_blocks_cached_; }
  int32_t length(RowId row) const { return lengths_[checked(row)]; }
  int32_t committed(RowId row) const { return rows_[checked(row)].committed; }
  int32_t num_blocks(RowId row) const { return rows_[checked(row)].num_blocks; }
  int32_t refcount(int32_t block) const;
  KvCacheStats stats() const;
  const KvCacheConfig& config() const { return config_; }

  // --- For kernels: addresses that never change. Entries past a row's blocks are stale or kNoBlock; lengths of dead
  // rows are 0.
  const int32_t* block_tables() const { return tables_.data(); }  // [max_rows, max_blocks_per_row]
  const int32_t* block_table(RowId row) const { return table(checked(row)); }
  const int32_t* lengths() const { return lengths_.data(); }  // [max_rows]

  // Recounts everything from scratch, in time proportional to the pool. Throws std::logic_error naming what is wrong.
  void check() const;

 private:
  struct Row {
    uint64_t namespace_id = 0;
    int32_t committed = 0;
    int32_t num_blocks = 0;
    // The first num_registered full blocks of this row are registered prefixes, through this row's own blocks or equal
    // ones; the last of them is `tip`, as long as its serial is still tip_serial.
    int32_t num_registered = 0;
    int32_t tip = kNoBlock;
    uint64_t tip_serial = 0;
    uint64_t call = 0;  // the last call of append_slots that named this row
    bool live = false;
  };

  struct Block {
    int32_t refcount = 0;
    int32_t prev = kNoBlock, next = kNoBlock;  // neighbours among the cached blocks; `next` also among the free ones
    uint64_t call = 0;                         // the last call of append_slots that looked at this block,
    int32_t copies = 0;                        //   and how often it will copy it
  };

  size_t checked(RowId row) const;
  const int32_t* table(size_t row) const { return &tables_[row * config_.max_blocks_per_row]; }
  int32_t* table(size_t row) { return &tables_[row * config_.max_blocks_per_row]; }
  int32_t blocks_for(int32_t count) const { return count / config_.block_size + (count % config_.block_size != 0); }
  bool ends_in_partial_block(size_t row) const { return lengths_[row] % config_.block_size != 0; }
  void check_count(size_t row, int32_t count) const;
  void check_prompt(int32_t count) const;

  std::optional<RowId> take_row();
  int32_t take_block();
  void retain(int32_t block);
  void release(int32_t block);
  void release_from(size_t row, int32_t first_block);
  void make_tail_writable(size_t row);
  void move_block(int32_t from, int32_t to);

  void register_full_blocks(size_t row);
  void unregister(int32_t block);

  void push_free(int32_t block);
  void push_cached(int32_t block);
  void remove_cached(int32_t block);

  KvCacheConfig config_;
  std::vector<Row> rows_;
  std::vector<int32_t> lengths_;
  std::vector<int32_t> tables_;
  std::vector<RowId> dead_rows_;
  std::vector<Block> blocks_;
  PrefixIndex prefixes_;
  std::vector<KvBlockCopy> copies_;
  int32_t first_free_ = kNoBlock;  // last freed, first taken: touched memory is used again
  int32_t oldest_cached_ = kNoBlock, newest_cached_ = kNoBlock;
  int32_t num_blocks_free_ = 0, num_blocks_cached_ = 0;
  uint64_t last_call_ = 0;
  KvCacheStats totals_{};
};

}  // namespace pcm
