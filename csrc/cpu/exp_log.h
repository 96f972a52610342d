// exp and log as fixed sequences of float32 operations: the same bits as pcm_fast/sampling.py on every instruction set.
// log's coefficients are those of Cephes' logf, exp's a minimax fit (3e-9). Nothing may be fused here (the build says
// -ffp-contract=off).
#pragma once

namespace pcm::PCM_ISA {

// So many vectors go through exp side by side: one alone leaves the arithmetic units waiting for its chain of
// operations.
constexpr int kAbreast = kLanes == 16 ? 4 : kLanes == 8 ? 2 : 1;

// x = exp(x) for kCount vectors of x <= 0; exp(-87) below -87.
template <int kCount>
static inline void exp32_all(Vec* x) {
  const Vec magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  Vec shifted[kCount], r[kCount], p[kCount];
  const auto each = [](auto&& step) __attribute__((always_inline)) {
    for (int i = 0; i < kCount; ++i) step(i);
  };
  each([&](int i) { x[i] = max(x[i], set1(-87.0f)); });
  each([&](int i) { shifted[i] = x[i] * set1(1.44269504088896341f); });
  each([&](int i) { shifted[i] = shifted[i] + magic; });
  each([&](int i) { p[i] = shifted[i] - magic; });
  each([&](int i) { r[i] = x[i] - p[i] * set1(0.693359375f); });
  each([&](int i) { r[i] = r[i] - p[i] * set1(-2.12194440e-4f); });
  each([&](int i) { p[i] = set1(1.3814433478e-3f) * r[i] + set1(8.3687966689e-3f); });
  each([&](int i) { p[i] = p[i] * r[i] + set1(4.1668396443e-2f); });
  each([&](int i) { p[i] = p[i] * r[i] + set1(1.6666519642e-1f); });
  each([&](int i) { p[i] = p[i] * r[i] + set1(4.9999994040e-1f); });
  each([&](int i) { p[i] = (p[i] * (r[i] * r[i]) + r[i]) + set1(1.0f); });
  each([&](int i) { x[i] = add_exponent(p[i], shifted[i]); });
}

static inline Vec exp32(Vec x) {
  exp32_all<1>(&x);
  return x;
}

// log(x); -inf below the smallest normal number.
static inline Vec log32(Vec x) {
  const Mask zero = not_at_least(x, set1(1.17549435e-38f));
  Vec m, e;
  split_exponent(select(zero, set1(1.0f), x), &m, &e);
  m = m - set1(1.0f);
  Vec p = set1(7.0376836292e-2f);
  p = p * m + set1(-1.1514610310e-1f);
  p = p * m + set1(1.1676998740e-1f);
  p = p * m + set1(-1.2420140846e-1f);
  p = p * m + set1(1.4249322787e-1f);
  p = p * m + set1(-1.6668057665e-1f);
  p = p * m + set1(2.0000714765e-1f);
  p = p * m + set1(-2.4999993993e-1f);
  p = p * m + set1(3.3333331174e-1f);
  const Vec square = m * m;
  Vec y = (p * m) * square;
  y = y + e * set1(-2.12194440e-4f);
  y = y - square * set1(0.5f);
  return select(zero, set1(-__builtin_inff()), (m + y) + e * set1(0.693359375f));
}

}  // namespace pcm::PCM_ISA
