#include "cpu/mixture_step.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>

namespace pcm {

void MixtureStep::run(const std::vector<StepPass>& passes, std::vector<StepSequence>& sequences) {
  states_.resize(std::max(states_.size(), passes.size()));
  widths_.assign(passes.size(), 0);
  for (size_t p = 0; p < passes.size(); ++p) {
    const StepPass& pass = passes[p];
    widths_[p] = pass.decoder->shape().hidden;
    pass.decoder->forward(pass.batch, *pass.kv);
    const size_t size = static_cast<size_t>(pass.num_wanted) * widths_[p];
    if (states_[p].size() < size) states_[p].resize(size);
    pass.decoder->final_hidden(pass.wanted, pass.num_wanted, states_[p].data());
  }
  if (sequences.empty()) return;

  const int64_t vocabulary = passes[0].decoder->shape().vocabulary;
  // Rows of logits_ of a sequence: one for each expert, or the combined one and then, if they are reported, the
  // experts.
  const auto rows_of = [](const StepSequence& s) {
    return s.logits != nullptr ? 0 : !s.combine ? s.experts : s.report_experts ? 1 + s.experts : 1;
  };
  size_t num_rows = 0;
  for (const StepSequence& sequence : sequences) num_rows += rows_of(sequence);
  if (logits_.size() < num_rows * vocabulary) logits_.resize(num_rows * vocabulary);

  std::vector<HeadRow> head_rows;
  float* next = logits_.data();
  for (StepSequence& sequence : sequences) {
    if (sequence.pcm.pass >= 0) weigh(sequence);
    float* out = sequence.logits;
    if (out == nullptr) {
      out = next;
      next += rows_of(sequence) * vocabulary;
      if (sequence.combine) {
        head_rows.push_back({sequence.hidden[0], &sequence, out});
        if (!sequence.report_experts) continue;
        out += vocabulary;
      }
    }
    for (int i = 0; i < sequence.experts; ++i) head_rows.push_back({sequence.hidden[i], nullptr, out + i * vocabulary});
  }
  compute_logits(passes, head_rows);

  const auto start = std::chrono::steady_clock::now();
  std::vector<MixSampleRow> draws;
  std::vector<StepSequence*> drawn;
  const float* logits = logits_.data();
  for (StepSequence& sequence : sequences) {
    if (sequence.logits != nullptr) continue;
    MixSampleRow& row = draws.emplace_back();
    row.experts = sequence.combine ? 1 : sequence.experts;
    for (int i = 0; i < row.experts; ++i) {
      row.logits[i] = {logits + i * vocabulary, 1, DType::kFloat32};
      row.weights[i] = sequence.combine ? 1.0f : sequence.weights[i];
    }
    row.vocabulary = vocabulary;
    row.merge = sequence.combine ? Merge::kLinear : sequence.merge;
    row.exponent = sequence.combine ? 1.0f : sequence.exponent;
    row.params = sequence.params;
    std::fill_n(sequence.expert_logprobs, sequence.experts, std::numeric_limits<float>::quiet_NaN());
    if (!sequence.combine && sequence.report_experts) row.expert_logprobs = sequence.expert_logprobs;
    drawn.push_back(&sequence);
    logits += rows_of(sequence) * vocabulary;
  }
  sampler_->run(draws.data(), static_cast<int64_t>(draws.size()));
  for (size_t i = 0; i < draws.size(); ++i) {
    StepSequence& sequence = *drawn[i];
    sequence.token = draws[i].token;
    sequence.logprob = draws[i].logprob;
    sequence.status = draws[i].status;
    if (sequence.combine && sequence.report_experts && sequence.status == Status::kOk) {
      report_experts(sequence, static_cast<const float*>(draws[i].logits[0].data) + vocabulary, vocabulary);
    }
  }
  seconds_ += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

const float* MixtureStep::state(const HiddenRef& ref) const {
  return states_[ref.pass].data() + static_cast<int64_t>(ref.index) * widths_[ref.pass];
}

void MixtureStep::weigh(StepSequence& sequence) const {
  const float* x = state(sequence.pcm);
  const int width = widths_[sequence.pcm.pass];
  double scores[kMaxExperts], top = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int i = 0; i < sequence.experts; ++i) {
    scores[i] = sequence.bias[i];
    for (int d = 0; d < width; ++d) scores[i] += static_cast<double>(x[d]) * sequence.head[i][d];
    top = std::max(top, scores[i]);
  }
  for (int i = 0; i < sequence.experts; ++i) sum += scores[i] = std::exp(scores[i] - top);
  for (int i = 0; i < sequence.experts; ++i) sequence.weights[i] = static_cast<float>(scores[i] / sum);
}

// The rows of one model go through its head together.
void MixtureStep::compute_logits(const std::vector<StepPass>& passes, const std::vector<HeadRow>& rows) {
  for (size_t p = 0; p < passes.size(); ++p) {
    const int width = widths_[p];
    const int64_t vocabulary = passes[p].decoder->shape().vocabulary;
    std::vector<const HeadRow*> mine;
    std::vector<int32_t> adapters;
    for (const HeadRow& row : rows) {
      if (row.hidden.pass != static_cast<int>(p)) continue;
      mine.push_back(&row);
      const int32_t entry = passes[p].wanted[row.hidden.index];
      adapters.push_back(row.combined != nullptr ? -1 : passes[p].batch.adapters[entry]);
    }
    if (mine.empty()) continue;
    if (head_in_.size() < mine.size() * width) head_in_.resize(mine.size() * width);
    for (size_t i = 0; i < mine.size(); ++i) {
      float* in = head_in_.data() + i * width;
      const StepSequence* combined = mine[i]->combined;
      if (combined == nullptr) {
        std::copy_n(state(mine[i]->hidden), width, in);
        continue;
      }
      std::fill_n(in, width, 0.0f);
      for (int e = 0; e < combined->experts; ++e) {
        const float* x = state(combined->hidden[e]);
        for (int d = 0; d < width; ++d) in[d] += combined->weights[e] * x[d];
      }
    }
    // Straight to where they go if they go there one after the other.
    bool contiguous = true;
    for (size_t i = 1; i < mine.size(); ++i) contiguous &= mine[i]->out == mine[i - 1]->out + vocabulary;
    float* out = mine[0]->out;
    if (!contiguous) {
      if (head_out_.size() < mine.size() * vocabulary) head_out_.resize(mine.size() * vocabulary);
      out = head_out_.data();
    }
    passes[p].decoder->logits(head_in_.data(), static_cast<int>(mine.size()), adapters.data(), out);
    if (contiguous) continue;
    for (size_t i = 0; i < mine.size(); ++i) std::copy_n(out + i * vocabulary, vocabulary, mine[i]->out);
  }
}

// log p_i of the token of a combined sequence, from the logits of its experts.
void MixtureStep::report_experts(StepSequence& sequence, const float* logits, int64_t vocabulary) {
  if (log_p_.size() < static_cast<size_t>(vocabulary)) log_p_.resize(vocabulary);
  for (int i = 0; i < sequence.experts; ++i, logits += vocabulary) {
    if (sequence.weights[i] == 0) continue;
    MixSampleRow row;
    row.experts = 1;
    row.logits[0] = {logits, 1, DType::kFloat32};
    row.weights[0] = 1;
    row.vocabulary = vocabulary;
    row.draw = false;
    row.log_probs = log_p_.data();
    sampler_->run(&row, 1);
    sequence.expert_logprobs[i] = log_p_[sequence.token];
  }
}

}  // namespace pcm
