#include "kv_moves.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <unordered_set>

namespace pcm {

std::vector<KvBlockCopy> ordered_moves(const std::vector<KvBlockCopy>& moves, int32_t spare) {
  const auto refuse = [](const char* expected, int32_t got) {
    throw std::invalid_argument(std::string("kv_moves: expected ") + expected + ", got " + std::to_string(got));
  };
  std::unordered_map<int32_t, int32_t> target_of;  // moves still to be made
  std::unordered_set<int32_t> targets;
  for (const KvBlockCopy& move : moves) {
    if (move.src < 0 || move.dst < 0) refuse("blocks that are not negative", std::min(move.src, move.dst));
    if (!target_of.emplace(move.src, move.dst).second) refuse("no source twice", move.src);
    if (!targets.insert(move.dst).second) refuse("no target twice", move.dst);
  }
  if (target_of.count(spare) || targets.count(spare)) refuse("a spare block that does not move", spare);

  std::vector<KvBlockCopy> ordered;
  // Makes the moves a -> b, b -> c, ... that start at `block`, the last of them first.
  const auto make_chain = [&](int32_t block) {
    const auto start = static_cast<std::ptrdiff_t>(ordered.size());
    for (auto move = target_of.find(block); move != target_of.end(); move = target_of.find(block)) {
      ordered.push_back({move->first, move->second});
      block = move->second;
      target_of.erase(move);
    }
    std::reverse(ordered.begin() + start, ordered.end());
  };
  for (const KvBlockCopy& move : moves) {
    if (!targets.count(move.src)) make_chain(move.src);
  }
  for (const KvBlockCopy& move : moves) {  // what is left are circles
    if (!target_of.count(move.src)) continue;
    if (move.src == move.dst) {
      target_of.erase(move.src);
      continue;
    }
    if (spare < 0) refuse("a spare block for moves in a circle", spare);
    const size_t start = ordered.size();
    make_chain(move.src);
    const KvBlockCopy last = ordered[start];  // into the block that started the circle
    ordered[start] = {last.src, spare};
    ordered.push_back({spare, last.dst});
  }
  return ordered;
}

}  // namespace pcm
