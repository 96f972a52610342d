#define PCM_ISA avx2
#include "cpu/simd_avx2.h"

// The kernels come after the lanes they are written on.
#include "cpu/decoder_blocks.h"
#include "cpu/mix_sample_blocks.h"

namespace pcm::avx2 {
constinit const Isa kIsa{"avx2", kMixSampleKernels, kDecoderKernels};
}
