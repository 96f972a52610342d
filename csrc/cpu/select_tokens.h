// Which tokens top_k, min_p and top_p keep, and the draw among them, from tempered probabilities block by block.
#pragma once

#include "cpu/mix_sample.h"

namespace pcm {

// ws.tempered, ws.block_top and ws.block_mass are filled in, block_top holding tempered probabilities by now.
int64_t draw_token(const MixSampleKernels& kernels, const BlockRange& range, MixSampleWorkspace& ws,
                   const SampleParams& params);

}  // namespace pcm
