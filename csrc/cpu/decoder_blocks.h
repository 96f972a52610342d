// The inner loops of the decoder. Included once per instruction set, after its lanes.
#pragma once

#include "cpu/attention_blocks.h"
#include "cpu/exp_log.h"
#include "cpu/int8_blocks.h"
#include "cpu/isa.h"
#include "cpu/linear_blocks.h"

namespace pcm::PCM_ISA {

static void rms_norm(const float* x, const float* weight, float eps, int n, float* out) {
  Vec sum = set1(0.0f);
  for (int i = 0; i < n; i += kLanes) sum = multiply_add(load(x + i), load(x + i), sum);
  const Vec scale = set1(1.0f / __builtin_sqrtf(sum_lanes(sum) / static_cast<float>(n) + eps));
  for (int i = 0; i < n; i += kLanes) store(out + i, load(x + i) * scale * load(weight + i));
}

static void gate(const float* up, float* gate, int n) {
  const Vec zero = set1(0.0f), one = set1(1.0f);
  for (int i = 0; i < n; i += kLanes) {
    const Vec g = load(gate + i), negated = zero - g;
    const Vec e = exp32(zero - max(g, negated));
    const Vec silu = select(g < zero, g * e, g) / (one + e);
    store(gate + i, silu * load(up + i));
  }
}

static constexpr DecoderKernels kDecoderKernels = {panel_any, panel_int8,       shrink_any,      expand_any, attend,
                                                   rms_norm,  scale_inputs_any, quantize_inputs, gate};

}  // namespace pcm::PCM_ISA
