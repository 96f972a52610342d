// advance beside the words of kv_ops.h.
#pragma once

#include <algorithm>

#include "cuda/kv_ops.h"
#include "random_case.h"

namespace {

using namespace pcm;

struct Step {
  std::vector<int64_t> drawn, stop_tokens, draw_positions, input_ids, positions, slots;
  std::vector<int32_t> state, sequence_of, capacities, lengths, table;
  int32_t stop_width, going, width, block_size;
  int64_t stride;

  bool operator==(const Step&) const = default;

  StepBuffers buffers() {
    return {static_cast<int32_t>(state.size()),
            static_cast<int32_t>(positions.size()),
            stop_width,
            drawn.data(),
            stop_tokens.data(),
            state.data(),
            draw_positions.data(),
            sequence_of.data(),
            capacities.data(),
            input_ids.data(),
            positions.data(),
            slots.data(),
            lengths.data(),
            &going};
  }
};

Step make_step(Random& random) {
  Step step{};
  const int64_t sequences = 1 + random.below(random.chance(2) ? 6 : 300), rows = random.below(3 * sequences + 1);
  step.stop_width = static_cast<int32_t>(random.below(3));
  step.block_size = random.one_of({1, 3, 16});
  step.width = static_cast<int32_t>(1 + random.below(4));
  step.stride = step.width + random.below(2);
  step.drawn.resize(sequences);
  step.draw_positions.resize(sequences);
  step.state.resize(sequences);
  for (int64_t s = 0; s < sequences; ++s) {
    step.draw_positions[s] = random.below(1000);
    step.state[s] = static_cast<int32_t>(random.chance(2) ? random.below(4) : 0);
    for (int32_t i = 0; i < step.stop_width; ++i) step.stop_tokens.push_back(random.chance(3) ? -1 : random.below(30));
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t most = int64_t{step.width} * step.block_size;
    step.sequence_of.push_back(static_cast<int32_t>(random.chance(9) ? -1 : random.below(sequences)));
    step.capacities.push_back(static_cast<int32_t>(random.chance(4) ? 1 + random.below(most) : most));
    step.positions.push_back(random.below(step.capacities.back()));
    step.lengths.push_back(static_cast<int32_t>(step.positions.back() + 1));
    step.input_ids.push_back(random.below(30));
    step.slots.push_back(random.below(1000));
  }
  for (int64_t i = 0; i < rows * step.stride; ++i) step.table.push_back(static_cast<int32_t>(random.below(1 << 20)));
  return step;
}

// The words of kv_ops.h, one by one.
void advance_on_host(Step& step) {
  using enum SequenceState;
  const auto is_going = [&](size_t s) { return step.state[s] == static_cast<int32_t>(kGoing); };
  step.going = 0;
  for (size_t s = 0; s < step.state.size(); ++s) {
    const auto before = static_cast<SequenceState>(step.state[s]);
    if (before == kStopped || before == kFailed) continue;
    const auto first = step.stop_tokens.begin() + static_cast<std::ptrdiff_t>(s * step.stop_width);
    const bool stops = std::find(first, first + step.stop_width, step.drawn[s]) != first + step.stop_width;
    bool room = true;
    for (size_t r = 0; r < step.positions.size(); ++r) {
      room &= step.sequence_of[r] != static_cast<int32_t>(s) || step.positions[r] + 1 < step.capacities[r];
    }
    step.state[s] = static_cast<int32_t>(step.drawn[s] < 0 ? kFailed : stops ? kStopped : room ? kGoing : kNoRoom);
    step.going += is_going(s);
    step.draw_positions[s] += is_going(s);
  }
  for (size_t r = 0; r < step.positions.size(); ++r) {
    const int32_t s = step.sequence_of[r];
    step.slots[r] = -1;
    if (s < 0 || !is_going(s)) continue;
    step.input_ids[r] = step.drawn[s];
    const int64_t position = ++step.positions[r];
    ++step.lengths[r];
    const int64_t block = step.table[r * step.stride + position / step.block_size];
    step.slots[r] = block * step.block_size + position % step.block_size;
  }
}

void test_advance(Random& random) {
  Step step = make_step(random);
  for (int replay = 0; replay < 4; ++replay) {
    for (int64_t& token : step.drawn) token = random.chance(20) ? -1 : random.below(30);
    Step expected = step;
    advance_on_host(expected);
    const auto rows = static_cast<int32_t>(step.positions.size());
    advance(step.buffers(), {step.table.data(), rows, step.width, step.stride}, step.block_size, nullptr);
    REQUIRE(step == expected);
    for (int32_t& capacity : step.capacities) {  // the host finds room for some
      if (random.chance(2)) capacity = step.width * step.block_size;
    }
  }
}

}  // namespace
