// Eight lanes of float32. The names are those of simd_generic.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pcm::PCM_ISA {

constexpr int kLanes = 8;

struct Vec {
  __m256 v;
};
struct Mask {
  __m256 v;
};

static inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
static inline Vec set1(float x) { return {_mm256_set1_ps(x)}; }
static inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
static inline Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
static inline Mask not_at_least(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NGE_UQ)}; }
static inline Mask is_nan(Vec a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
static inline Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.v, b.v)}; }
static inline Mask and_not(Mask a, Mask b) { return {_mm256_andnot_ps(b.v, a.v)}; }
static inline int append_lanes(Mask m, int first, int* out) {
  int count = 0;
  for (int lanes = _mm256_movemask_ps(m.v); lanes != 0; lanes &= lanes - 1) out[count++] = first + __builtin_ctz(lanes);
  return count;
}
static inline bool any(Mask m) { return _mm256_movemask_ps(m.v) != 0; }
static inline Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m.v)}; }

static inline float max_lane(Vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}

static inline Vec add_exponent(Vec p, Vec shifted) {
  const __m256i shift = _mm256_slli_epi32(_mm256_castps_si256(shifted.v), 23);
  return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), shift))};
}

static inline void split_exponent(Vec x, Vec* m, Vec* e) {
  const __m256i b = _mm256_castps_si256(x.v);
  const __m256i k = _mm256_srai_epi32(_mm256_sub_epi32(b, _mm256_set1_epi32(0x3F3504F3)), 23);
  *m = {_mm256_castsi256_ps(_mm256_sub_epi32(b, _mm256_slli_epi32(k, 23)))};
  *e = {_mm256_cvtepi32_ps(k)};
}

struct MassSum {
  __m256i low = _mm256_setzero_si256(), high = _mm256_setzero_si256();
  uint64_t added = 0;
  Vec add(Vec a) {
    const __m256d magic = _mm256_set1_pd(6144.0);
    const __m256d a0 = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)), magic);
    const __m256d a1 = _mm256_add_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1)), magic);
    low = _mm256_add_epi64(low, _mm256_castpd_si256(a0));
    high = _mm256_add_epi64(high, _mm256_castpd_si256(a1));
    added += kLanes;
    return {_mm256_set_m128(_mm256_cvtpd_ps(_mm256_sub_pd(a1, magic)), _mm256_cvtpd_ps(_mm256_sub_pd(a0, magic)))};
  }
  uint64_t total() const {
    alignas(32) uint64_t lanes[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi64(low, high));
    return lanes[0] + lanes[1] + lanes[2] + lanes[3] -
           added * 0x40B8000000000000u;  // the bits of 6144.0, once per lane
  }
};

static inline void convert_f16(const uint16_t* in, float* out, int n) {
  for (int i = 0; i < n; i += kLanes) {
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  }
}

static inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

static inline float sum_lanes(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

static inline Vec load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
static inline Vec load_bf16(const uint16_t* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16))};
}

struct Words {
  __m256i v;
};
static inline Words load_words(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
// Left where they are in the word, codes need no shift; their inputs are scaled down instead, which is exact.
constexpr bool kCodesInPlace = true;
static inline Vec nibble(Words w, int index) {
  if (index == 7) return {_mm256_cvtepi32_ps(_mm256_srli_epi32(w.v, 28))};  // the sign bit is no place for it
  return {_mm256_cvtepi32_ps(_mm256_and_si256(w.v, _mm256_set1_epi32(15 << (4 * index))))};
}
static inline Vec byte(Words w, int index) {
  if (index == 3) return {_mm256_cvtepi32_ps(_mm256_srli_epi32(w.v, 24))};
  return {_mm256_cvtepi32_ps(_mm256_and_si256(w.v, _mm256_set1_epi32(255 << (8 * index))))};
}

struct Bytes {
  __m256i v;
};
static inline Bytes broadcast_bytes(const int8_t* p) {
  return {_mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(p)))};
}
static inline Words even_nibbles(Words w) { return {_mm256_and_si256(w.v, _mm256_set1_epi8(15))}; }
static inline Words odd_nibbles(Words w) { return {_mm256_and_si256(_mm256_srli_epi16(w.v, 4), _mm256_set1_epi8(15))}; }
struct ByteSum {
  __m256i pairs = _mm256_setzero_si256(), wide = _mm256_setzero_si256();  // 16 and 32 bits
  void add(Words codes, Bytes bytes) { pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes.v, bytes.v)); }
  void add_biased(Words codes, Bytes bytes) {
    // The products of bytes do not fit 16 bits in pairs unless one is taken without its sign.
    const __m256i code = _mm256_xor_si256(codes.v, _mm256_set1_epi8(-128));
    const __m256i products = _mm256_maddubs_epi16(_mm256_abs_epi8(code), _mm256_sign_epi8(bytes.v, code));
    wide = _mm256_add_epi32(wide, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
  }
  Vec total() const {
    return {_mm256_cvtepi32_ps(_mm256_add_epi32(wide, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))))};
  }
};

}  // namespace pcm::PCM_ISA
