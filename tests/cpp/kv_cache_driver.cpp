// Drives KvCacheManager and KvStorage through random operations beside a model that knows each row only as the list of
// its tokens. Stands alone, so that it can be built with sanitizers:
//
//   c++ -std=c++17 -O1 -g -fsanitize=address,undefined -Icsrc -pthread -o kv_cache_driver
//       tests/cpp/kv_cache_driver.cpp csrc/kv_cache.cpp csrc/prefix_index.cpp csrc/kv_storage.cpp
//   ./kv_cache_driver OPERATIONS SEED THREADS
//
// With PCM_DEVICE_STORAGE the memory is that of tests/cuda/device_storage.h: the kernels of csrc/cuda, on the CPU.
//
// The key and value at a position encode a hash of the namespace and of all tokens up to it, as real ones are a
// function of these. So whatever goes wrong with sharing, copying, reuse or eviction is seen as a wrong number in some
// row. Keys and values are written and read by THREADS threads, each with rows of its own: a block that two rows may
// write is a data race that ThreadSanitizer sees.
#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <mutex>
#include <new>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kv_cache.h"
#include "kv_storage.h"
#ifdef PCM_DEVICE_STORAGE
#include "device_storage.h"
#endif

std::atomic<int64_t> allocations{0};

// Sanitizers have their own, which should not be hidden from them.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
void* operator new(size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
#endif

namespace {

using pcm::KvBlockCopy;
using pcm::KvCacheManager;
using pcm::KvCacheStats;
using pcm::KvDtype;
using pcm::RowId;

#define REQUIRE(condition) \
  if (!(condition)) throw std::logic_error("line " + std::to_string(__LINE__) + ": " #condition)

constexpr int32_t kLayers = 2, kHeads = 2, kHeadDim = 4;
constexpr int32_t kItems = kHeads * kHeadDim;  // of the key of a token: the 8 bytes of a hash, exact in bfloat16

struct Scenario {
  const char* name;
  int32_t num_blocks, block_size, max_rows, max_blocks_per_row;
  uint64_t hash_mask;
  KvDtype dtype;
  bool rollback;  // with truncate; without it, which prefixes are cached can be foretold until the first eviction
};

constexpr Scenario kScenarios[] = {
    {"tight", 24, 4, 10, 8, ~0ull, KvDtype::kFloat32, true},
    {"tight, all hashes equal", 24, 4, 10, 8, 0, KvDtype::kBFloat16, true},
    {"tight, without rollback", 24, 4, 10, 8, ~0ull, KvDtype::kFloat32, false},
    {"ample", 400, 4, 12, 8, ~0ull, KvDtype::kBFloat16, true},
    {"ample, without rollback, few hashes", 400, 4, 12, 8, 7, KvDtype::kFloat32, false},
    {"blocks of one token", 60, 1, 6, 20, ~0ull, KvDtype::kFloat32, true},
    {"blocks of sixteen tokens", 20, 16, 8, 4, ~0ull, KvDtype::kFloat32, true},
    {"one row fills the pool", 6, 3, 5, 6, ~0ull, KvDtype::kFloat32, true},
};

uint64_t scramble(uint64_t x) {
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93ull;
  x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93ull;
  return x ^ (x >> 32);
}

// Threads that stay; run(n, task) calls task(0..n-1) on them and waits.
class Workers {
 public:
  explicit Workers(int count) {
    for (int i = 0; i < count; ++i) threads_.emplace_back([this, i, count] { work(i, count); });
  }

  ~Workers() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(int size, const std::function<void(int)>& task) {
    if (threads_.size() == 1) {
      for (int i = 0; i < size; ++i) task(i);
      return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    task_ = &task;
    size_ = size;
    left_ = static_cast<int>(threads_.size());
    ++round_;
    wake_.notify_all();
    done_.wait(lock, [this] { return left_ == 0; });
    if (!error_.empty()) throw std::logic_error(error_);
  }

 private:
  void work(int index, int count) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (int64_t round = 0;; ++round) {
      wake_.wait(lock, [this, round] { return stop_ || round_ > round; });
      if (stop_) return;
      lock.unlock();
      std::string error;
      try {
        for (int i = index; i < size_; i += count) (*task_)(i);
      } catch (const std::exception& e) {
        error = e.what();
      }
      lock.lock();
      if (!error.empty()) error_ = error;
      if (--left_ == 0) done_.notify_one();
    }
  }

  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(int)>* task_ = nullptr;
  int size_ = 0, left_ = 0;
  int64_t round_ = 0;
  bool stop_ = false;
  std::string error_;
};

#ifdef PCM_DEVICE_STORAGE
using Storage = DeviceStorage;
#else
using Storage = pcm::KvStorage;

// What gather_blocks does on a device: moves the blocks, and has the tables follow.
void move_blocks(Storage& storage, const std::vector<KvBlockCopy>& moves, std::vector<int32_t>& tables, int32_t) {
  for (const KvBlockCopy& move : moves) {
    storage.copy_block(move.src, move.dst);
    std::replace(tables.begin(), tables.end(), move.src, move.dst);
  }
}
#endif

struct ModelRow {
  uint64_t namespace_id;
  std::vector<int32_t> tokens;   // committed
  std::vector<uint64_t> hashes;  // of the namespace and the tokens up to each position
  std::vector<int32_t> prompt;   // what is left of it
  int32_t length;                // slots
  bool cut;                      // ends in a block that truncate cut short

  uint64_t hash_after(size_t count) const { return count == 0 ? scramble(namespace_id + 1) : hashes[count - 1]; }
  void push(int32_t token) {
    hashes.push_back(scramble(hash_after(hashes.size()) + 2 * static_cast<uint64_t>(token) + 1));
    tokens.push_back(token);
  }
};

class Episode {
 public:
  Episode(const Scenario& scenario, std::mt19937_64& random, Workers& workers)
      : scenario_(scenario),
        random_(random),
        workers_(workers),
        manager_({scenario.num_blocks, scenario.block_size, scenario.max_rows, scenario.max_blocks_per_row,
                  scenario.hash_mask}),
        storage_({kLayers, scenario.num_blocks, kHeads, scenario.block_size, kHeadDim, scenario.dtype}),
        holders_(scenario.num_blocks) {}

  void step(int64_t number) {
    const int choice = draw(100);
    if (rows_.empty() || choice < 14) {
      create();
    } else if (choice < 20) {
      fork();
    } else if (choice < 32 && scenario_.rollback) {
      truncate(pick(), false);
    } else if (choice < 46) {
      free(pick());
    } else if (choice < 48) {
      refuse_nonsense();
    } else if (choice < 50) {
      defragment();
    } else {
      append();
    }
    count_holders();
    if (number % 32 == 0) check_all();
  }

  void finish() {
    check_all();
    while (!rows_.empty()) free(rows_.begin()->first);
    count_holders();
    check_all();
    REQUIRE(manager_.stats().used == 0);
    REQUIRE(manager_.num_free() == scenario_.num_blocks);
  }

  KvCacheStats stats() const { return manager_.stats(); }
  bool foretold_all() const { return scenario_.rollback || manager_.stats().evictions == 0; }

 private:
  int draw(int size) { return static_cast<int>(random_() % size); }
  RowId pick() { return std::next(rows_.begin(), draw(static_cast<int>(rows_.size())))->first; }
  int32_t capacity() const { return scenario_.max_blocks_per_row * scenario_.block_size; }
  int32_t blocks_for(int32_t count) const { return (count + scenario_.block_size - 1) / scenario_.block_size; }

  // Few tokens, so that rows often agree for a while; sometimes one that uses all bits.
  int32_t draw_token() { return draw(50) == 0 ? static_cast<int32_t>(random_()) : draw(2); }

  // Calls the manager and checks that it did not allocate.
  template <typename Call>
  auto without_allocating(Call call) {
    const int64_t before = allocations;
    auto result = call();
    REQUIRE(allocations == before);
    return result;
  }

  void create() {
    const uint64_t namespace_id = draw(3) == 0 ? 0 : ~0ull << draw(2);
    std::vector<int32_t> prompt(draw(capacity() + 1));
    for (int32_t& token : prompt) token = draw_token();
    if (!rows_.empty() && draw(2) == 0) {  // continue what another row has, so that prefixes are found
      const std::vector<int32_t>& other = rows_.at(pick()).tokens;
      std::copy_n(other.begin(), std::min(other.size(), prompt.size()), prompt.begin());
    }
    const int32_t count = static_cast<int32_t>(prompt.size());
    const int32_t free_before = manager_.num_free();
    const auto match = manager_.match_prefix(namespace_id, prompt.data(), count);
    const auto id = without_allocating([&] { return manager_.create_row(namespace_id, prompt.data(), count); });
    REQUIRE(id.has_value() == (static_cast<int32_t>(rows_.size()) < scenario_.max_rows));
    if (!id) return;
    const int32_t reused = manager_.length(*id);
    REQUIRE(reused == match.tokens && manager_.num_free() == free_before - match.idle_blocks);
    REQUIRE(reused % scenario_.block_size == 0 && (reused < count || count == 0));
    REQUIRE(rows_.count(*id) == 0);
    ModelRow row{namespace_id, {}, {}, {}, reused, false};
    for (int32_t i = 0; i < reused; ++i) row.push(prompt[i]);
    row.prompt.assign(prompt.begin() + reused, prompt.end());
    if (!scenario_.rollback && manager_.stats().evictions == 0) {
      ModelRow whole = row;
      int32_t expected = reused;
      for (int32_t token : row.prompt) whole.push(token);
      for (int32_t end = 0; end < count; end += scenario_.block_size) {
        if (end == 0 || computed_.count(whole.hash_after(end)) != 0) expected = end;
      }
      REQUIRE(reused == expected);
    }
    rows_.emplace(*id, row);
    check_row(*id);
  }

  void fork() {
    const RowId parent = pick();
    const ModelRow& row = rows_.at(parent);
    if (row.length != static_cast<int32_t>(row.tokens.size())) {
      bool refused = false;
      try {
        (void)manager_.fork(parent);
      } catch (const std::invalid_argument&) {
        refused = true;
      }
      REQUIRE(refused);
      return;
    }
    const int32_t free_before = manager_.num_free();
    const auto id = without_allocating([&] { return manager_.fork(parent); });
    REQUIRE(id.has_value() == (static_cast<int32_t>(rows_.size()) < scenario_.max_rows));
    REQUIRE(manager_.num_free() == free_before);
    if (!id) return;
    rows_.emplace(*id, row);
    check_row(*id);
  }

  void truncate(RowId id, bool to_committed) {
    ModelRow& row = rows_.at(id);
    const int32_t committed = static_cast<int32_t>(row.tokens.size());
    const int32_t length = to_committed ? committed : std::max(0, row.length - draw(2 * scenario_.block_size + 2));
    without_allocating([&] {
      manager_.truncate(id, length);
      return 0;
    });
    row.cut = row.cut || length < committed;
    row.length = length;
    row.tokens.resize(std::min(committed, length));
    row.hashes.resize(row.tokens.size());
    check_row(id);
  }

  void free(RowId id) {
    without_allocating([&] {
      manager_.free(id);
      return 0;
    });
    rows_.erase(id);
  }

  void defragment() {
    const KvCacheStats before = manager_.stats();
    const int32_t* tables = manager_.block_tables();
    const size_t entries = static_cast<size_t>(scenario_.max_rows) * scenario_.max_blocks_per_row;
    std::vector<int32_t> moved_tables(tables, tables + entries);
    const std::vector<KvBlockCopy> moves = manager_.defragment();
    move_blocks(storage_, moves, moved_tables, scenario_.max_rows);
    const KvCacheStats after = manager_.stats();
    REQUIRE(after.used == before.used && after.cached == before.cached && after.free == before.free);
    for (const KvBlockCopy& move : moves) REQUIRE(move.dst < after.used + after.cached && move.dst < move.src);
    for (const auto& entry : rows_) {
      const int32_t* table = manager_.block_table(entry.first);
      const int32_t num_blocks = manager_.num_blocks(entry.first);
      REQUIRE(std::equal(table, table + num_blocks, moved_tables.data() + (table - tables)));
      for (int32_t i = 0; i < num_blocks; ++i) REQUIRE(table[i] < after.used + after.cached);
    }
    check_all();
  }

  void append() {
    std::vector<RowId> ids;
    for (const auto& entry : rows_) ids.push_back(entry.first);
    std::shuffle(ids.begin(), ids.end(), random_);
    ids.resize(1 + draw(static_cast<int>(ids.size())));
    std::vector<int32_t> counts;
    for (RowId id : ids) {
      const ModelRow& row = rows_.at(id);
      const int32_t wish = row.prompt.empty() ? draw(4) : 1 + draw(static_cast<int>(row.prompt.size()));
      counts.push_back(std::min(wish, capacity() - row.length));
    }
    const int32_t needed = foretell_blocks(ids, counts);
    const bool any_cut = std::any_of(ids.begin(), ids.end(), [&](RowId id) { return rows_.at(id).cut; });
    const KvCacheStats before = manager_.stats();
    const std::vector<int32_t> tables = all_tables();
    const bool fits = without_allocating(
        [&] { return manager_.append_slots(ids.data(), counts.data(), static_cast<int32_t>(ids.size())); });
    const KvCacheStats after = manager_.stats();
    REQUIRE(fits == (needed <= before.free + before.cached));
    if (!fits) {
      REQUIRE(tables == all_tables() && manager_.copies().empty());
      REQUIRE(after.used == before.used && after.cached == before.cached && after.evictions == before.evictions);
      REQUIRE(after.refusals == before.refusals + 1);
      if (draw(2) == 0) free(pick());  // preempted
      return;
    }
    REQUIRE(after.used == before.used + needed);
    if (!any_cut && needed <= before.free) REQUIRE(after.evictions == before.evictions);
    make_copies();
    count_holders();
    for (size_t i = 0; i < ids.size(); ++i) rows_.at(ids[i]).length += counts[i];
    compute_and_commit(ids);
  }

  // Blocks the rows need together: the first of several rows to append to a block copies it, the last keeps it.
  int32_t foretell_blocks(const std::vector<RowId>& ids, const std::vector<int32_t>& counts) {
    std::vector<int32_t> holders = holders_;
    int32_t needed = 0, sum = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
      const int32_t length = rows_.at(ids[i]).length;
      sum += manager_.blocks_needed(ids[i], counts[i]);
      needed += blocks_for(length + counts[i]) - blocks_for(length);
      if (counts[i] == 0 || length % scenario_.block_size == 0) continue;
      int32_t& count = holders[manager_.block_table(ids[i])[length / scenario_.block_size]];
      if (count > 1) {
        ++needed;
        --count;
      }
    }
    REQUIRE(needed <= sum && (ids.size() > 1 || needed == sum));
    return needed;
  }

  void make_copies() {
    std::vector<KvBlockCopy> copies = manager_.copies();
    for (const KvBlockCopy& copy : copies) {
      for (const KvBlockCopy& other : copies) {
        REQUIRE(copy.dst != other.src && (&copy == &other || copy.dst != other.dst));
      }
    }
    std::shuffle(copies.begin(), copies.end(), random_);  // they promise not to depend on each other
    for (const KvBlockCopy& copy : copies) storage_.copy_block(copy.src, copy.dst);
  }

  // Fills all reserved slots of the rows as a step would, then accepts the first few of the tokens.
  void compute_and_commit(const std::vector<RowId>& ids) {
    std::vector<ModelRow> drafts;
    for (RowId id : ids) {
      ModelRow draft = rows_.at(id);
      while (static_cast<int32_t>(draft.tokens.size()) < draft.length) {
        const size_t i = draft.tokens.size() - rows_.at(id).tokens.size();
        draft.push(i < draft.prompt.size() ? draft.prompt[i] : draw_token());
      }
      drafts.push_back(draft);
    }
    workers_.run(static_cast<int>(ids.size()), [&](int i) {
      const int32_t committed = static_cast<int32_t>(rows_.at(ids[i]).tokens.size());
      for (int32_t p = committed; p < drafts[i].length; ++p) {
        const int32_t block = manager_.block_table(ids[i])[p / scenario_.block_size];
        REQUIRE(holders_[block] == 1 && manager_.refcount(block) == 1);
        write(ids[i], p, drafts[i].hashes[p]);
      }
      check_content(ids[i], drafts[i]);
    });
    for (size_t i = 0; i < ids.size(); ++i) {
      ModelRow& row = rows_.at(ids[i]);
      const int32_t committed = static_cast<int32_t>(row.tokens.size());
      const int32_t accepted = draw(4) > 0 ? row.length - committed : draw(row.length - committed + 1);
      without_allocating([&] {
        manager_.commit(ids[i], drafts[i].tokens.data() + committed, accepted);
        return 0;
      });
      for (int32_t j = 0; j < accepted; ++j) row.push(drafts[i].tokens[committed + j]);
      row.prompt.erase(row.prompt.begin(),
                       row.prompt.begin() + std::min<int32_t>(accepted, static_cast<int32_t>(row.prompt.size())));
      row.cut = row.cut && accepted == 0;
      for (int32_t end = scenario_.block_size; end <= committed + accepted; end += scenario_.block_size) {
        computed_.insert(row.hash_after(end));
      }
      if (accepted < row.length - committed && draw(2) == 0) truncate(ids[i], true);
      check_row(ids[i]);
    }
  }

  // Arguments that make no sense throw and change nothing.
  void refuse_nonsense() {
    const RowId id = pick();
    const ModelRow& row = rows_.at(id);
    const RowId twice[] = {id, id};
    const int32_t counts[] = {1, 1};
    const RowId dead[] = {id, scenario_.max_rows};
    const int32_t token = 0;
    const std::function<void()> calls[] = {
        [&] { (void)manager_.append_slots(id, capacity() - row.length + 1); },
        [&] { (void)manager_.append_slots(id, -1); },
        [&] { (void)manager_.append_slots(twice, counts, 2); },
        [&] { (void)manager_.append_slots(dead, counts, 2); },
        [&] { manager_.commit(id, &token, row.length - static_cast<int32_t>(row.tokens.size()) + 1); },
        [&] { manager_.truncate(id, row.length + 1); },
        [&] { manager_.truncate(id, -1); },
        [&] { manager_.free(-1); },
        [&] { (void)manager_.create_row(0, &token, capacity() + 1); },
    };
    const std::vector<int32_t> tables = all_tables();
    const int32_t free_before = manager_.num_free();
    bool refused = false;
    if (row.length == capacity()) return;  // where a bad pair of counts would be refused for another reason
    try {
      calls[draw(std::size(calls))]();
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    REQUIRE(refused && tables == all_tables() && manager_.num_free() == free_before);
    check_row(id);
  }

  // --- Content

  void write(RowId id, int32_t position, uint64_t hash) {
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      float keys[kItems], values[kItems];
      encode(hash + layer, keys, values);
      storage_.write(layer, manager_.block_table(id), position, 1, keys, values, kItems);
    }
  }

  static void encode(uint64_t hash, float* keys, float* values) {
    for (int32_t i = 0; i < kItems; ++i) {
      keys[i] = static_cast<float>(hash >> (8 * i) & 0xff);
      values[i] = -1.0f - keys[i];
    }
  }

  // Reads a row as attention would: layer by layer, through its block table, tile by tile.
  void check_content(RowId id, const ModelRow& row) const {
    const int32_t* table = manager_.block_table(id);
    const int32_t count = static_cast<int32_t>(row.tokens.size());
    for (int32_t layer = 0; layer < kLayers; ++layer) {
      for (int32_t p = 0; p < count; ++p) {
        float keys[kItems], values[kItems], expected_keys[kItems], expected_values[kItems];
        storage_.read(layer, table, p, 1, keys, values, kItems);
        encode(row.hashes[p] + layer, expected_keys, expected_values);
        REQUIRE(std::equal(keys, keys + kItems, expected_keys));
        REQUIRE(std::equal(values, values + kItems, expected_values));
      }
    }
  }

  void check_row(RowId id) const {
    const ModelRow& row = rows_.at(id);
    REQUIRE(manager_.length(id) == row.length && manager_.lengths()[id] == row.length);
    REQUIRE(manager_.committed(id) == static_cast<int32_t>(row.tokens.size()));
    REQUIRE(manager_.num_blocks(id) == blocks_for(row.length));
    REQUIRE(manager_.block_table(id) == manager_.block_tables() + id * scenario_.max_blocks_per_row);
    check_content(id, row);
  }

  std::vector<int32_t> all_tables() const {
    std::vector<int32_t> all;
    for (const auto& entry : rows_) {
      all.push_back(manager_.length(entry.first));
      all.push_back(manager_.committed(entry.first));
      const int32_t* table = manager_.block_table(entry.first);
      all.insert(all.end(), table, table + manager_.num_blocks(entry.first));
    }
    return all;
  }

  // Who holds which block, from the block tables alone; nothing may be lost or counted twice.
  void count_holders() {
    std::fill(holders_.begin(), holders_.end(), 0);
    for (const auto& entry : rows_) {
      const int32_t* table = manager_.block_table(entry.first);
      for (int32_t i = 0; i < manager_.num_blocks(entry.first); ++i) ++holders_.at(table[i]);
    }
    int32_t used = 0;
    for (int32_t block = 0; block < scenario_.num_blocks; ++block) {
      REQUIRE(manager_.refcount(block) == holders_[block]);
      used += holders_[block] > 0;
    }
    const KvCacheStats stats = manager_.stats();
    REQUIRE(stats.used == used && stats.used + stats.cached + stats.free == scenario_.num_blocks);
    REQUIRE(stats.rows == static_cast<int32_t>(rows_.size()));
  }

  void check_all() const {
    manager_.check();
    for (const auto& entry : rows_) check_row(entry.first);
  }

  const Scenario& scenario_;
  std::mt19937_64& random_;
  Workers& workers_;
  KvCacheManager manager_;
  Storage storage_;
  std::map<RowId, ModelRow> rows_;
  std::vector<int32_t> holders_;
  std::set<uint64_t> computed_;  // hashes of the prefixes of whole blocks that were ever committed
};

void run(const Scenario& scenario, int64_t operations, uint64_t seed, Workers& workers) {
  std::mt19937_64 random(seed);
  KvCacheStats total{};
  int64_t number = 0, episodes = 0;
  try {
    while (number < operations) {
      Episode episode(scenario, random, workers);
      const int64_t end = std::min(operations, number + 20000);
      while (number < end && episode.foretold_all()) episode.step(number++);
      // Past the first eviction the cache's content is no longer foretold; go on for a while all the same.
      for (const int64_t last = std::min(end, number + 500); number < last;) episode.step(number++);
      episode.finish();
      ++episodes;
      const KvCacheStats stats = episode.stats();
      total.hits += stats.hits;
      total.misses += stats.misses;
      total.evictions += stats.evictions;
      total.copies += stats.copies;
      total.refusals += stats.refusals;
    }
  } catch (const std::exception& e) {
    std::printf("FAILED: scenario '%s', seed %llu, operation %lld: %s\n", scenario.name,
                static_cast<unsigned long long>(seed), static_cast<long long>(number), e.what());
    std::exit(1);
  }
  std::printf(
      "%-38s %8lld operations, %5lld pools, %7lld hits, %7lld misses, %7lld evictions, %7lld copies, %7lld refusals\n",
      scenario.name, static_cast<long long>(number), static_cast<long long>(episodes),
      static_cast<long long>(total.hits), static_cast<long long>(total.misses), static_cast<long long>(total.evictions),
      static_cast<long long>(total.copies), static_cast<long long>(total.refusals));
  // A scenario that never gets into trouble tests nothing. Blocks of one token are never partial, so never copied.
  const bool quiet = total.hits == 0 || total.evictions == 0 || (total.copies == 0) != (scenario.block_size == 1);
  if (operations >= 1000 && quiet) {
    std::printf("FAILED: scenario '%s' has no hits, evictions or copies\n", scenario.name);
    std::exit(1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::printf("usage: %s OPERATIONS SEED THREADS\n", argv[0]);
    return 2;
  }
  const int64_t operations = std::atoll(argv[1]);
  const uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  Workers workers(std::max(1, std::atoi(argv[3])));
  const int64_t num_scenarios = std::size(kScenarios);
  for (int64_t i = 0; i < num_scenarios; ++i) {
    run(kScenarios[i], (operations + num_scenarios - 1) / num_scenarios, seed + i, workers);
  }
  std::printf("passed: %lld operations\n", static_cast<long long>(operations));
  return 0;
}
