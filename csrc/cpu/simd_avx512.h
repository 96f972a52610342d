// Sixteen lanes of float32. The names are those of simd_generic.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace pcm::PCM_ISA {

constexpr int kLanes = 16;

struct Vec {
  __m512 v;
};
struct Mask {
  __mmask16 v;
};

static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
static inline Vec set1(float x) { return {_mm512_set1_ps(x)}; }
static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
static inline Mask operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
static inline Mask not_at_least(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NGE_UQ)}; }
static inline Mask is_nan(Vec a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
static inline Mask operator|(Mask a, Mask b) { return {static_cast<__mmask16>(a.v | b.v)}; }
static inline Mask and_not(Mask a, Mask b) { return {static_cast<__mmask16>(a.v & ~b.v)}; }
static inline int append_lanes(Mask m, int first, int* out) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(first), lanes);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(m.v, numbers));
  return __builtin_popcount(m.v);
}
static inline bool any(Mask m) { return m.v != 0; }
static inline Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }
static inline float max_lane(Vec a) { return _mm512_reduce_max_ps(a.v); }

static inline Vec add_exponent(Vec p, Vec shifted) {
  const __m512i shift = _mm512_slli_epi32(_mm512_castps_si512(shifted.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), shift))};
}

static inline void split_exponent(Vec x, Vec* m, Vec* e) {
  const __m512i b = _mm512_castps_si512(x.v);
  const __m512i k = _mm512_srai_epi32(_mm512_sub_epi32(b, _mm512_set1_epi32(0x3F3504F3)), 23);
  *m = {_mm512_castsi512_ps(_mm512_sub_epi32(b, _mm512_slli_epi32(k, 23)))};
  *e = {_mm512_cvtepi32_ps(k)};
}

struct MassSum {
  __m512i low = _mm512_setzero_si512(), high = _mm512_setzero_si512();
  uint64_t added = 0;
  Vec add(Vec a) {
    const __m512d magic = _mm512_set1_pd(6144.0);
    const __m512d a0 = _mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(a.v)), magic);
    const __m512d a1 = _mm512_add_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1)), magic);
    low = _mm512_add_epi64(low, _mm512_castpd_si512(a0));
    high = _mm512_add_epi64(high, _mm512_castpd_si512(a1));
    added += kLanes;
    const __m256 r0 = _mm512_cvtpd_ps(_mm512_sub_pd(a0, magic)), r1 = _mm512_cvtpd_ps(_mm512_sub_pd(a1, magic));
    return {_mm512_insertf32x8(_mm512_castps256_ps512(r0), r1, 1)};
  }
  uint64_t total() const {
    const uint64_t sum = static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high)));
    return sum - added * 0x40B8000000000000u;  // the bits of 6144.0, once per lane
  }
};

static inline void convert_f16(const uint16_t* in, float* out, int n) {
  for (int i = 0; i < n; i += kLanes) {
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
  }
}

static inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline float sum_lanes(Vec a) { return _mm512_reduce_add_ps(a.v); }

static inline Vec load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
static inline Vec load_bf16(const uint16_t* p) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))};
}

struct Words {
  __m512i v;
};
static inline Words load_words(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
constexpr bool kCodesInPlace = false;
// A permutation looks at the low four bits of its indices alone: a table of 0 to 15 turns nibbles into floats.
static inline Vec nibble(Words w, int index) {
  const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return {_mm512_permutexvar_ps(index == 0 ? w.v : _mm512_srli_epi32(w.v, 4 * index), table)};
}
static inline Vec byte(Words w, int index) {
  const __m512i shifted = index == 0 ? w.v : _mm512_srli_epi32(w.v, 8 * index);
  return {_mm512_cvtepi32_ps(index == 3 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi32(255)))};
}

struct Bytes {
  __m512i v;
};
static inline Bytes broadcast_bytes(const int8_t* p) {
  return {_mm512_castps_si512(_mm512_set1_ps(*reinterpret_cast<const float*>(p)))};
}
static inline Words even_nibbles(Words w) { return {_mm512_and_si512(w.v, _mm512_set1_epi8(15))}; }
static inline Words odd_nibbles(Words w) { return {_mm512_and_si512(_mm512_srli_epi16(w.v, 4), _mm512_set1_epi8(15))}; }
struct ByteSum {
  __m512i pairs = _mm512_setzero_si512(), wide = _mm512_setzero_si512();  // 16 and 32 bits
  void add(Words codes, Bytes bytes) { pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(codes.v, bytes.v)); }
  void add_biased(Words codes, Bytes bytes) {
    const __m512i code = _mm512_xor_si512(codes.v, _mm512_set1_epi8(-128));
    const __m512i zero = _mm512_setzero_si512();
    const __m512i flipped = _mm512_mask_sub_epi8(bytes.v, _mm512_movepi8_mask(code), zero, bytes.v);
    const __m512i products = _mm512_maddubs_epi16(_mm512_abs_epi8(code), flipped);
    wide = _mm512_add_epi32(wide, _mm512_madd_epi16(products, _mm512_set1_epi16(1)));
  }
  Vec total() const {
    return {_mm512_cvtepi32_ps(_mm512_add_epi32(wide, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1))))};
  }
};

}  // namespace pcm::PCM_ISA
