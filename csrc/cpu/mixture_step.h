// One step of a mixture: the forward passes of all experts and the PCM, mixture weights, merge and draw, for every
// sequence that is due a token, in one call.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "cpu/decoder.h"
#include "cpu/mix_sample.h"

namespace pcm {

// What one model reads in this step, and which of these tokens lead to logits or weights.
struct StepPass {
  Decoder* decoder;
  KvStorage* kv;
  DecoderBatch batch;
  const int32_t* wanted;  // entries of the batch
  int num_wanted;
};

// A hidden state of this step: one of the `wanted` of one of the passes.
struct HiddenRef {
  int pass = -1;
  int index = 0;
};

// One sequence that is due a token.
struct StepSequence {
  int experts = 0;
  HiddenRef hidden[kMaxExperts];
  float weights[kMaxExperts];  // in; out if there is a PCM
  // The PCM: its hidden state, and the rows of its head for these experts. weights = softmax(head hidden + bias).
  HiddenRef pcm;
  const float* head[kMaxExperts];
  float bias[kMaxExperts];
  Merge merge = Merge::kLinear;
  float exponent = 1;
  bool combine = false;        // log_linear through one row of the head: sum w_i (W h_i) = W (sum w_i h_i)
  bool report_experts = true;  // log p_i of the token are wanted
  float* logits = nullptr;     // not null: no merge and no draw; the experts' logits [experts][vocabulary] go here
  SampleParams params;
  // Out.
  int64_t token = -1;
  float logprob = 0;
  float expert_logprobs[kMaxExperts];  // NaN if not reported, or of weight 0
  Status status = Status::kOk;
};

class MixtureStep {
 public:
  explicit MixtureStep(std::shared_ptr<MixSampler> sampler) : sampler_(std::move(sampler)) {}

  // Fills the outputs of every sequence. What a sequence gets does not depend on the others.
  void run(const std::vector<StepPass>& passes, std::vector<StepSequence>& sequences);

  // Seconds spent since construction in merging and drawing.
  double seconds() const { return seconds_; }

 private:
  // A hidden state that goes through the head of its model, and where its logits go.
  struct HeadRow {
    HiddenRef hidden;
    const StepSequence* combined;  // not null: the states of this sequence's experts under its weights instead
    float* out;
  };

  const float* state(const HiddenRef& ref) const;
  void weigh(StepSequence& sequence) const;
  void compute_logits(const std::vector<StepPass>& passes, const std::vector<HeadRow>& rows);
  void report_experts(StepSequence& sequence, const float* logits, int64_t vocabulary);

  std::shared_ptr<MixSampler> sampler_;
  std::vector<std::vector<float>> states_;  // per pass [num_wanted][hidden]
  std::vector<int> widths_;                 // per pass: hidden
  std::vector<float> logits_, head_in_, head_out_, log_p_;
  double seconds_ = 0;
};

}  // namespace pcm
