#define PCM_ISA avx512
#include "cpu/simd_avx512.h"

// The kernels come after the lanes they are written on.
#include "cpu/decoder_blocks.h"
#include "cpu/mix_sample_blocks.h"

namespace pcm::avx512 {
constinit const Isa kIsa{"avx512", kMixSampleKernels, kDecoderKernels};
}
