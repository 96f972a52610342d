#include "kv_cache.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace pcm {
namespace {

[[noreturn]] void bad_argument(const char* name, const std::string& expected, int64_t got) {
  throw std::invalid_argument(std::string("kv_cache: ") + name + ": expected " + expected + ", got " +
                              std::to_string(got));
}

void check_positive(const char* name, int32_t value) {
  if (value <= 0) bad_argument(name, "a positive number", value);
}

const KvCacheConfig& checked_config(const KvCacheConfig& config) {
  check_positive("num_blocks", config.num_blocks);
  check_positive("block_size", config.block_size);
  check_positive("max_rows", config.max_rows);
  check_positive("max_blocks_per_row", config.max_blocks_per_row);
  // Positions are int32.
  const int64_t longest = static_cast<int64_t>(config.max_blocks_per_row) * config.block_size;
  if (longest > std::numeric_limits<int32_t>::max()) {
    bad_argument("max_blocks_per_row * block_size", "less than 2^31 tokens", longest);
  }
  return config;
}

}  // namespace

KvCacheManager::KvCacheManager(const KvCacheConfig& config)
    : config_(checked_config(config)),
      rows_(config.max_rows),
      lengths_(config.max_rows, 0),
      tables_(static_cast<size_t>(config.max_rows) * config.max_blocks_per_row, kNoBlock),
      blocks_(config.num_blocks),
      prefixes_(config.num_blocks, config.block_size, config.hash_mask) {
  copies_.reserve(config.max_rows);
  dead_rows_.reserve(config.max_rows);
  for (int32_t row = config.max_rows - 1; row >= 0; --row) dead_rows_.push_back(row);
  for (int32_t block = config.num_blocks - 1; block >= 0; --block) push_free(block);
}

// --- Rows

KvPrefixMatch KvCacheManager::match_prefix(uint64_t namespace_id, const int32_t* prompt, int32_t count) const {
  check_prompt(count);
  KvPrefixMatch match{0, 0};
  int32_t block = kNoBlock;
  while (count - match.tokens > config_.block_size) {
    block = prefixes_.find(namespace_id, block, prompt + match.tokens);
    if (block == kNoBlock) break;
    match.tokens += config_.block_size;
    match.idle_blocks += blocks_[block].refcount == 0;
  }
  return match;
}

std::optional<RowId> KvCacheManager::create_row(uint64_t namespace_id, const int32_t* prompt, int32_t count) {
  check_prompt(count);
  const std::optional<RowId> id = take_row();
  if (!id) return std::nullopt;
  Row& row = rows_[*id];
  row.namespace_id = namespace_id;
  while (count - row.committed > config_.block_size) {
    const int32_t block = prefixes_.find(namespace_id, row.tip, prompt + row.committed);
    if (block == kNoBlock) break;
    retain(block);
    table(*id)[row.num_blocks++] = row.tip = block;
    row.tip_serial = prefixes_.serial(block);
    row.committed += config_.block_size;
  }
  row.num_registered = row.num_blocks;
  lengths_[*id] = row.committed;
  totals_.prompt_tokens += count;
  totals_.reused_tokens += row.committed;
  ++(row.committed > 0 ? totals_.hits : totals_.misses);
  return id;
}

std::optional<RowId> KvCacheManager::fork(RowId parent) {
  const size_t source = checked(parent);
  if (rows_[source].committed != lengths_[source]) {
    bad_argument("row to fork", "all of its slots committed; uncommitted", lengths_[source] - rows_[source].committed);
  }
  const std::optional<RowId> id = take_row();
  if (!id) return std::nullopt;
  rows_[*id] = rows_[source];
  lengths_[*id] = lengths_[source];
  std::copy_n(table(source), rows_[source].num_blocks, table(*id));
  for (int32_t i = 0; i < rows_[source].num_blocks; ++i) retain(table(source)[i]);
  return id;
}

bool KvCacheManager::append_slots(const RowId* rows, const int32_t* counts, int32_t num_rows) {
  copies_.clear();
  ++last_call_;
  int64_t needed = 0;
  for (int32_t i = 0; i < num_rows; ++i) {
    const size_t id = checked(rows[i]);
    check_count(id, counts[i]);
    Row& row = rows_[id];
    if (row.call == last_call_) bad_argument("rows", "each row once; twice", rows[i]);
    row.call = last_call_;
    needed += blocks_for(lengths_[id] + counts[i]) - row.num_blocks;
    if (counts[i] == 0 || !ends_in_partial_block(id)) continue;
    // Rows that share their partial block copy it one after the other; the last of them then has it to itself.
    Block& tail = blocks_[table(id)[row.num_blocks - 1]];
    if (tail.call != last_call_) {
      tail.call = last_call_;
      tail.copies = 0;
    }
    if (tail.refcount - tail.copies > 1) {
      ++tail.copies;
      ++needed;
    }
  }
  if (needed > num_free()) {
    ++totals_.refusals;
    return false;
  }
  for (int32_t i = 0; i < num_rows; ++i) {
    const size_t id = rows[i];
    if (counts[i] == 0) continue;
    if (ends_in_partial_block(id)) make_tail_writable(id);
    lengths_[id] += counts[i];
    Row& row = rows_[id];
    while (row.num_blocks < blocks_for(lengths_[id])) table(id)[row.num_blocks++] = take_block();
  }
  return true;
}

void KvCacheManager::commit(RowId id, const int32_t* new_tokens, int32_t count) {
  Row& row = rows_[checked(id)];
  if (count < 0 || count > lengths_[id] - row.committed) {
    bad_argument("count", "0 to " + std::to_string(lengths_[id] - row.committed) + " slots reserved and not committed",
                 count);
  }
  for (int32_t i = 0; i < count; ++i, ++row.committed) {
    const int32_t block = table(id)[row.committed / config_.block_size];
    prefixes_.tokens(block)[row.committed % config_.block_size] = new_tokens[i];
  }
  register_full_blocks(id);
}

void KvCacheManager::truncate(RowId id, int32_t length) {
  Row& row = rows_[checked(id)];
  if (length < 0 || length > lengths_[id]) {
    bad_argument("length", "0 to " + std::to_string(lengths_[id]) + ", the row's length", length);
  }
  release_from(id, blocks_for(length));
  lengths_[id] = length;
  row.committed = std::min(row.committed, length);
  if (row.committed / config_.block_size < row.num_registered) {
    row.num_registered = 0;  // the next commit of a full block finds the way again
    row.tip = kNoBlock;
  }
}

void KvCacheManager::free(RowId id) {
  const size_t row = checked(id);
  release_from(row, 0);
  lengths_[row] = 0;
  rows_[row] = Row{};
  dead_rows_.push_back(id);
}

std::vector<KvBlockCopy> KvCacheManager::defragment() {
  const auto is_free = [this](int32_t block) { return blocks_[block].refcount == 0 && !prefixes_.contains(block); };
  const int32_t kept = config_.num_blocks - num_blocks_free_;
  std::vector<KvBlockCopy> moves;
  std::vector<int32_t> moved_to(config_.num_blocks, kNoBlock);
  int32_t hole = 0;
  for (int32_t block = kept; block < config_.num_blocks; ++block) {
    if (is_free(block)) continue;
    while (!is_free(hole)) ++hole;
    moves.push_back({block, hole});
    moved_to[block] = hole;
    move_block(block, hole);
  }
  for (size_t id = 0; id < rows_.size(); ++id) {
    Row& row = rows_[id];
    for (int32_t i = 0; i < row.num_blocks; ++i) {
      int32_t& block = table(id)[i];
      if (moved_to[block] != kNoBlock) block = moved_to[block];
    }
    if (row.tip != kNoBlock && moved_to[row.tip] != kNoBlock) row.tip = moved_to[row.tip];
  }
  first_free_ = kNoBlock;
  num_blocks_free_ = 0;
  for (int32_t block = config_.num_blocks - 1; block >= kept; --block) push_free(block);
  return moves;
}

// --- Questions

int32_t KvCacheManager::blocks_needed(RowId id, int32_t count) const {
  const size_t row = checked(id);
  check_count(row, count);
  const int32_t num_blocks = rows_[row].num_blocks;
  const bool copy = count > 0 && ends_in_partial_block(row) && blocks_[table(row)[num_blocks - 1]].refcount > 1;
  return blocks_for(lengths_[row] + count) - num_blocks + copy;
}

int32_t KvCacheManager::refcount(int32_t block) const {
  if (block < 0 || block >= config_.num_blocks) bad_argument("block", "0 to num_blocks - 1", block);
  return blocks_[block].refcount;
}

KvCacheStats KvCacheManager::stats() const {
  KvCacheStats stats = totals_;
  stats.free = num_blocks_free_;
  stats.cached = num_blocks_cached_;
  stats.used = config_.num_blocks - num_blocks_free_ - num_blocks_cached_;
  stats.rows = config_.max_rows - static_cast<int32_t>(dead_rows_.size());
  return stats;
}

size_t KvCacheManager::checked(RowId row) const {
  if (row < 0 || row >= config_.max_rows || !rows_[row].live) bad_argument("row", "the id of a live row", row);
  return row;
}

void KvCacheManager::check_count(size_t row, int32_t count) const {
  const int32_t room = config_.max_blocks_per_row * config_.block_size - lengths_[row];
  if (count < 0 || count > room) {
    bad_argument("count", "0 to " + std::to_string(room) + ", the room left in max_blocks_per_row", count);
  }
}

void KvCacheManager::check_prompt(int32_t count) const {
  const int32_t longest = config_.max_blocks_per_row * config_.block_size;
  if (count < 0 || count > longest) bad_argument("prompt tokens", "0 to " + std::to_string(longest), count);
}

// --- Holding blocks

std::optional<RowId> KvCacheManager::take_row() {
  if (dead_rows_.empty()) return std::nullopt;
  const RowId id = dead_rows_.back();
  dead_rows_.pop_back();
  rows_[id].live = true;
  return id;
}

int32_t KvCacheManager::take_block() {
  if (first_free_ == kNoBlock) unregister(oldest_cached_);
  const int32_t block = first_free_;
  first_free_ = blocks_[block].next;
  --num_blocks_free_;
  blocks_[block].refcount = 1;
  return block;
}

void KvCacheManager::retain(int32_t block) {
  if (blocks_[block].refcount++ == 0) remove_cached(block);
}

void KvCacheManager::release(int32_t block) {
  if (--blocks_[block].refcount > 0) return;
  if (prefixes_.contains(block)) {
    push_cached(block);
  } else {
    push_free(block);
  }
}

void KvCacheManager::release_from(size_t id, int32_t first_block) {
  Row& row = rows_[id];
  // From the end: what follows a prefix is evicted before the prefix.
  while (row.num_blocks > first_block) release(table(id)[--row.num_blocks]);
}

// The row is about to write into its last block, which holds tokens already.
void KvCacheManager::make_tail_writable(size_t id) {
  int32_t& tail = table(id)[rows_[id].num_blocks - 1];
  if (blocks_[tail].refcount > 1) {
    const int32_t copy = take_block();
    std::copy_n(prefixes_.tokens(tail), lengths_[id] % config_.block_size, prefixes_.tokens(copy));
    copies_.push_back({tail, copy});
    ++totals_.copies;
    release(tail);
    tail = copy;
  } else if (prefixes_.contains(tail)) {
    unregister(tail);  // full once and cut short by truncate
  }
}

// A block that is free becomes what another was, save for those who name it.
void KvCacheManager::move_block(int32_t from, int32_t to) {
  const bool cached = blocks_[from].refcount == 0;
  prefixes_.move(from, to);
  blocks_[to] = blocks_[from];
  blocks_[from] = Block{};
  if (!cached) return;
  const Block& block = blocks_[to];
  (block.prev == kNoBlock ? oldest_cached_ : blocks_[block.prev].next) = to;
  (block.next == kNoBlock ? newest_cached_ : blocks_[block.next].prev) = to;
}

// --- Prefixes

void KvCacheManager::register_full_blocks(size_t id) {
  Row& row = rows_[id];
  const int32_t full = row.committed / config_.block_size;
  if (row.num_registered == full) return;
  if (row.num_registered > 0 && prefixes_.serial(row.tip) != row.tip_serial) {
    row.num_registered = 0;  // the way here led through another row's block, now gone
    row.tip = kNoBlock;
  }
  while (row.num_registered < full) {
    row.tip = prefixes_.find_or_add(row.namespace_id, row.tip, table(id)[row.num_registered++]);
  }
  row.tip_serial = prefixes_.serial(row.tip);
}

void KvCacheManager::unregister(int32_t root) {
  prefixes_.remove_subtree(root, [this](int32_t block) {
    if (blocks_[block].refcount > 0) return;
    remove_cached(block);
    push_free(block);
    ++totals_.evictions;
  });
}

// --- Lists

void KvCacheManager::push_free(int32_t block) {
  blocks_[block].next = first_free_;
  first_free_ = block;
  ++num_blocks_free_;
}

void KvCacheManager::push_cached(int32_t id) {
  blocks_[id].prev = newest_cached_;
  blocks_[id].next = kNoBlock;
  (newest_cached_ == kNoBlock ? oldest_cached_ : blocks_[newest_cached_].next) = id;
  newest_cached_ = id;
  ++num_blocks_cached_;
}

void KvCacheManager::remove_cached(int32_t id) {
  const Block& block = blocks_[id];
  (block.prev == kNoBlock ? oldest_cached_ : blocks_[block.prev].next) = block.next;
  (block.next == kNoBlock ? newest_cached_ : blocks_[block.next].prev) = block.prev;
  --num_blocks_cached_;
}

// --- Audit

void KvCacheManager::check() const {
  const auto require = [](bool holds, const char* what) {
    if (!holds) throw std::logic_error(std::string("kv_cache: ") + what);
  };
  std::vector<int32_t> held(config_.num_blocks, 0), listed(config_.num_blocks, 0);
  int32_t live = 0;
  for (size_t id = 0; id < rows_.size(); ++id) {
    const Row& row = rows_[id];
    live += row.live;
    require(row.live || (lengths_[id] == 0 && row.num_blocks == 0), "a dead row holds blocks");
    require(row.num_blocks == blocks_for(lengths_[id]), "a row's blocks do not match its length");
    require(row.committed >= 0 && row.committed <= lengths_[id], "a row has more committed tokens than slots");
    for (int32_t i = 0; i < row.num_blocks; ++i) ++held.at(table(id)[i]);
  }
  require(live + dead_rows_.size() == rows_.size(), "live and dead rows do not add up");
  for (size_t id = 0; id < rows_.size(); ++id) {
    for (int32_t p = rows_[id].committed; p < lengths_[id]; ++p) {
      const int32_t block = table(id)[p / config_.block_size];
      require(blocks_[block].refcount == 1 && !prefixes_.contains(block),
              "a slot to be written lies in a shared or registered block");
    }
  }
  int32_t num_free = 0, num_cached = 0, num_used = 0;
  for (int32_t b = first_free_; b != kNoBlock && num_free <= config_.num_blocks; b = blocks_[b].next, ++num_free) {
    require(listed[b]++ == 0 && held[b] == 0 && !prefixes_.contains(b), "a free block is in use or registered");
  }
  for (int32_t b = oldest_cached_, prev = kNoBlock; b != kNoBlock; prev = b, b = blocks_[b].next, ++num_cached) {
    require(listed[b]++ == 0 && held[b] == 0 && prefixes_.contains(b), "a cached block is in use or unregistered");
    require(blocks_[b].prev == prev, "the list of cached blocks is broken");
  }
  for (int32_t b = 0; b < config_.num_blocks; ++b) {
    require(blocks_[b].refcount == held[b], "a refcount differs from the number of rows that hold the block");
    num_used += held[b] > 0;
  }
  require(num_free == num_blocks_free_ && num_cached == num_blocks_cached_, "a list and its counter differ");
  require(num_free + num_cached + num_used == config_.num_blocks, "used, cached and free blocks do not add up");
  prefixes_.check();
}

}  // namespace pcm
