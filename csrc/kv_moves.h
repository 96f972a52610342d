// The order in which blocks of the KV cache change places.
#pragma once

#include <cstdint>
#include <vector>

#include "kv_cache.h"

namespace pcm {

// The same rearrangement as moves that can be made one after the other: no block is overwritten before it has been
// moved. Where blocks change places in a circle, the last goes round by way of `spare`, whose content is lost.
// Moves from a block to itself are left out.
//   moves: as if all at the same time. No source and no target twice.
//   spare: a block that is neither a source nor a target; kNoBlock if there are no circles.
// Throws std::invalid_argument if one of these does not hold.
std::vector<KvBlockCopy> ordered_moves(const std::vector<KvBlockCopy>& moves, int32_t spare);

}  // namespace pcm
