// The passes of mix_sample over one block of the vocabulary. Included once per instruction set, after its lanes.
#pragma once

#include "cpu/exp_log.h"
#include "cpu/isa.h"

namespace pcm::PCM_ISA {

static float max_block(const float* x, bool* bad) {
  Vec top = load(x);
  Mask nan = is_nan(top);
  for (int v = kLanes; v < kBlock; v += kLanes) {
    const Vec a = load(x + v);
    nan = nan | is_nan(a);
    top = max(top, a);
  }
  *bad = *bad || any(nan);
  return max_lane(top);
}

static uint64_t exp_block(const float* x, float top, float* out) {
  MassSum sum;
  for (int v = 0; v < kBlock; v += kAbreast * kLanes) {
    Vec e[kAbreast];
    for (int i = 0; i < kAbreast; ++i) e[i] = load(x + v + i * kLanes) - set1(top);
    exp32_all<kAbreast>(e);
    for (int i = 0; i < kAbreast; ++i) {
      sum.add(e[i]);
      store(out + v + i * kLanes, e[i]);
    }
  }
  return sum.total();
}

// log sum exp over the experts; terms of +inf or NaN must have been dealt with.
static inline Vec log_sum_exp(const Vec* terms, int experts) {
  const Vec minus_inf = set1(-__builtin_inff());
  Vec top = terms[0];
  for (int i = 1; i < experts; ++i) top = max(top, terms[i]);
  const Mask none = top == minus_inf;
  const Vec base = select(none, set1(0.0f), top);
  Vec total = exp32(terms[0] - base);
  for (int i = 1; i < experts; ++i) total = total + exp32(terms[i] - base);
  return select(none, minus_inf, top + log32(total));
}

static inline Vec expert_log_prob(const float* x, const ExpertTerm& term) {
  return (load(x) - set1(term.top)) - set1(term.log_total);
}

static Vec merge_linear(const float* const* x, const float* const* exps, const ExpertTerm* terms, int experts, int v) {
  if (experts == 1) return expert_log_prob(x[0] + v, terms[0]);
  Vec p = load(exps[0] + v) * set1(terms[0].scale);
  for (int i = 1; i < experts; ++i) p = p + load(exps[i] + v) * set1(terms[i].scale);
  const Mask rare = p < set1(7.888609052210118e-31f);  // 2^-100: near the end of float32's range add in log space
  Vec log_p = log32(p);
  if (any(rare)) {
    Vec weighted[kMaxExperts] = {};
    for (int i = 0; i < experts; ++i) weighted[i] = expert_log_prob(x[i] + v, terms[i]) + set1(terms[i].log_weight);
    log_p = select(rare, log_sum_exp(weighted, experts), log_p);
  }
  return log_p;
}

// A token is excluded by any one expert of positive weight, or by all together.
static Vec merge_log_linear(const float* const* x, const ExpertTerm* terms, int experts, int v) {
  const Vec minus_inf = set1(-__builtin_inff());
  Vec total = set1(0.0f);
  Mask excluded = minus_inf < minus_inf;
  Vec most = minus_inf;
  for (int i = 0; i < experts; ++i) {
    const Vec log_p = expert_log_prob(x[i] + v, terms[i]);
    const Vec product = log_p * set1(terms[i].weight);
    total = i == 0 ? product : total + product;
    most = max(most, log_p);
    if (terms[i].weight > 0) excluded = excluded | (log_p == minus_inf);
  }
  return select(excluded | (most == minus_inf), minus_inf, total);
}

// A negative exponent lets no token through that one expert excludes.
static Vec merge_power(const float* const* x, const ExpertTerm* terms, int experts, float exponent, int v) {
  const Vec inf = set1(__builtin_inff()), minus_inf = set1(-__builtin_inff());
  Vec weighted[kMaxExperts] = {};
  Mask excluded = inf < inf;
  for (int i = 0; i < experts; ++i) {
    weighted[i] = expert_log_prob(x[i] + v, terms[i]) * set1(exponent) + set1(terms[i].log_weight);
    excluded = excluded | (weighted[i] == inf);
  }
  for (int i = 0; i < experts; ++i) weighted[i] = select(excluded, minus_inf, weighted[i]);
  return select(excluded, minus_inf, log_sum_exp(weighted, experts) / set1(exponent));
}

static float merge_block(const float* const* x, const float* const* exps, const ExpertTerm* terms, int experts,
                         Merge merge, float exponent, float* out, bool* bad) {
  Vec top = set1(-__builtin_inff());
  Mask nan = is_nan(top);
  for (int v = 0; v < kBlock; v += kLanes) {
    Vec log_p;
    switch (merge) {
      case Merge::kLinear:
        log_p = merge_linear(x, exps, terms, experts, v);
        break;
      case Merge::kLogLinear:
        log_p = merge_log_linear(x, terms, experts, v);
        break;
      default:
        log_p = merge_power(x, terms, experts, exponent, v);
        break;
    }
    nan = nan | is_nan(log_p);
    top = max(top, log_p);
    store(out + v, log_p);
  }
  *bad = *bad || any(nan);
  return max_lane(top);
}

static void normalize_block(const float* x, float top, float log_total, float* out) {
  for (int v = 0; v < kBlock; v += kLanes) store(out + v, (load(x + v) - set1(top)) - set1(log_total));
}

static uint64_t temper_block(const float* x, float top, float temperature, float* out, float* greatest) {
  MassSum sum;
  Vec most = set1(0.0f);
  for (int v = 0; v < kBlock; v += kAbreast * kLanes) {
    Vec e[kAbreast];
    for (int i = 0; i < kAbreast; ++i) {
      e[i] = load(x + v + i * kLanes) - set1(top);
      if (temperature != 1.0f) e[i] = e[i] / set1(temperature);
    }
    exp32_all<kAbreast>(e);
    for (int i = 0; i < kAbreast; ++i) {
      e[i] = sum.add(e[i]);
      most = max(most, e[i]);
      store(out + v + i * kLanes, e[i]);
    }
  }
  *greatest = max_lane(most);
  return sum.total();
}

static uint64_t keep_block(const float* x, float floor) {
  MassSum sum;
  for (int v = 0; v < kBlock; v += kLanes) {
    const Vec e = load(x + v);
    sum.add(select(not_at_least(e, set1(floor)), set1(0.0f), e));
  }
  return sum.total();
}

static int find_block(const float* x, float low, float high, int* indices) {
  int found = 0;
  for (int v = 0; v < kBlock; v += kLanes) {
    const Vec e = load(x + v);
    const Mask inside = and_not(e < set1(high), not_at_least(e, set1(low)));
    if (any(inside)) found += append_lanes(inside, v, indices + found);
  }
  return found;
}

static float log_scalar(float x) {
  float lanes[kLanes];
  store(lanes, log32(set1(x)));
  return lanes[0];
}

static constexpr MixSampleKernels kMixSampleKernels = {
    max_block, exp_block, merge_block, normalize_block, temper_block, keep_block, find_block, log_scalar, convert_f16};

}  // namespace pcm::PCM_ISA
