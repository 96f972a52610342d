// Steps replayed as a captured graph would be: store_kv and advance on the same buffers, with the host's manager at
// hand only when a sequence has run out of room.
#pragma once

#include <algorithm>

#include "cuda/kv_ops.h"
#include "kv_cache.h"
#include "random_case.h"

namespace {

using namespace pcm;

constexpr int32_t kBlockSize = 4, kMaxRows = 9, kMaxBlocks = 6, kStop = 29;

class Decoding {
 public:
  explicit Decoding(Random& random)
      : random_(random),
        seed_(random.below(1 << 20)),
        manager_({kMaxRows * kMaxBlocks, kBlockSize, kMaxRows, kMaxBlocks}),
        cache_(int64_t{kMaxRows} * kMaxBlocks * kBlockSize * 2, -1.0f) {
    const int64_t sequences = 1 + random.below(3);
    for (int32_t s = 0; s < sequences; ++s) {
      draw_positions_.push_back(random.below(100));
      first_draw_.push_back(draw_positions_.back());
      state_.push_back(static_cast<int32_t>(SequenceState::kGoing));
      for (int64_t rows = 1 + random.below(3); rows > 0; --rows) add_row(s);
    }
    const auto rows = positions_.size();
    drawn_.resize(sequences);
    stop_tokens_.assign(sequences, kStop);
    slots_.resize(rows);
    lengths_.resize(rows);
    capacities_.resize(rows);
    tables_.resize(rows * kMaxBlocks);
    for (size_t r = 0; r < rows; ++r) {
      give_room(r);
      lengths_[r] = static_cast<int32_t>(positions_[r] + 1);
      slots_[r] =
          int64_t{tables_[r * kMaxBlocks + positions_[r] / kBlockSize]} * kBlockSize + positions_[r] % kBlockSize;
    }
  }

  void run(int replays) {
    for (int i = 0; i < replays; ++i) {
      replay();
      for (size_t r = 0; r < positions_.size(); ++r) {
        if (is(SequenceState::kNoRoom, sequence_of_[r]) && random_.chance(2)) give_room(r);
      }
    }
    check();
  }

 private:
  // The token that a sequence draws at a position of its random numbers, whoever asks.
  int64_t token(int32_t sequence, int64_t position) const {
    return (seed_ + 7919 * sequence + position * position * 31) % (kStop + 1);
  }
  bool is(SequenceState state, int32_t sequence) const { return state_[sequence] == static_cast<int32_t>(state); }

  // A row that has read a prompt of its own and reads the sequence's first token next.
  void add_row(int32_t sequence) {
    const auto length = static_cast<int32_t>(random_.below(2 * kBlockSize));
    const std::vector<int32_t> prompt(length, 5);
    const RowId row = *manager_.create_row(~uint64_t{0} - rows_.size(), prompt.data(), length);
    REQUIRE(manager_.append_slots(row, length));
    manager_.commit(row, prompt.data(), length);
    rows_.push_back(row);
    sequence_of_.push_back(sequence);
    input_ids_.push_back(token(sequence, first_draw_[sequence] - 1));
    positions_.push_back(length);
    first_position_.push_back(length);
  }

  // What the host does between steps: slots for a row, and what the device has to know of them.
  void give_room(size_t r) {
    const RowId row = rows_[r];
    const int32_t left = kMaxBlocks * kBlockSize - manager_.length(row);
    REQUIRE(manager_.append_slots(row, std::min<int32_t>(left, 1 + static_cast<int32_t>(random_.below(5)))));
    capacities_[r] = manager_.length(row);
    std::copy_n(manager_.block_table(row), manager_.num_blocks(row), tables_.begin() + r * kMaxBlocks);
  }

  void replay() {
    std::vector<float> keys;
    for (size_t r = 0; r < positions_.size(); ++r) keys.push_back(static_cast<float>(input_ids_[r]));
    const std::vector<float> values(positions_.begin(), positions_.end());
    const auto rows = static_cast<int32_t>(positions_.size());
    const auto cache = [&](int64_t which) {
      return LayerCache{&cache_[which * kBlockSize], DeviceDtype::kFloat32, 2 * kBlockSize, kBlockSize, 1, 1};
    };
    store_kv({keys.data(), DeviceDtype::kFloat32, 1, 1}, {values.data(), DeviceDtype::kFloat32, 1, 1}, slots_.data(),
             {rows, 1, 1, kBlockSize}, cache(0), cache(1), nullptr);
    const auto sequences = static_cast<int32_t>(state_.size());
    for (int32_t s = 0; s < sequences; ++s) drawn_[s] = token(s, draw_positions_[s]);  // the sampler
    advance({sequences, rows, 1, drawn_.data(), stop_tokens_.data(), state_.data(), draw_positions_.data(),
             sequence_of_.data(), capacities_.data(), input_ids_.data(), positions_.data(), slots_.data(),
             lengths_.data(), &going_},
            {tables_.data(), rows, kMaxBlocks, kMaxBlocks}, kBlockSize, nullptr);
  }

  void check() const {
    int32_t going = 0;
    for (size_t s = 0; s < state_.size(); ++s) {
      going += is(SequenceState::kGoing, static_cast<int32_t>(s));
      const bool stops = token(static_cast<int32_t>(s), draw_positions_[s]) == kStop;
      REQUIRE(!is(SequenceState::kStopped, static_cast<int32_t>(s)) || stops);
    }
    REQUIRE(going_ == going);
    for (size_t r = 0; r < positions_.size(); ++r) {
      const int32_t sequence = sequence_of_[r];
      REQUIRE(positions_[r] - first_position_[r] == draw_positions_[sequence] - first_draw_[sequence]);
      REQUIRE(positions_[r] < manager_.length(rows_[r]) && lengths_[r] == positions_[r] + 1);
      const int64_t stored = positions_[r] + (is(SequenceState::kGoing, sequence) ? 0 : 1);  // the next is not yet
      for (int64_t p = first_position_[r]; p < manager_.length(rows_[r]); ++p) {
        const int64_t block = manager_.block_table(rows_[r])[p / kBlockSize];
        const float key = cache_[block * 2 * kBlockSize + p % kBlockSize];
        const float value = cache_[block * 2 * kBlockSize + kBlockSize + p % kBlockSize];
        const int64_t draw = first_draw_[sequence] + p - first_position_[r] - 1;
        REQUIRE(key == (p < stored ? static_cast<float>(token(sequence, draw)) : -1.0f));
        REQUIRE(value == (p < stored ? static_cast<float>(p) : -1.0f));
      }
    }
  }

  Random& random_;
  int64_t seed_;
  KvCacheManager manager_;
  std::vector<float> cache_;  // [blocks][keys, values][block_size]
  std::vector<RowId> rows_;
  std::vector<int64_t> drawn_, stop_tokens_, draw_positions_, first_draw_;
  std::vector<int64_t> input_ids_, positions_, first_position_, slots_;
  std::vector<int32_t> state_, sequence_of_, capacities_, lengths_, tables_;
  int32_t going_ = 0;
};

void test_decode(Random& random) { Decoding(random).run(1 + static_cast<int>(random.below(12))); }

}  // namespace
