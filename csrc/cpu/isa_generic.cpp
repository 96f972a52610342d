#define PCM_ISA generic
#include "cpu/simd_generic.h"

// The kernels come after the lanes they are written on.
#include "cpu/decoder_blocks.h"
#include "cpu/mix_sample_blocks.h"

namespace pcm::generic {
constinit const Isa kIsa{"generic", kMixSampleKernels, kDecoderKernels};
}
