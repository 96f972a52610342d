// One lane of float32 in plain C++: what every machine has, and the yardstick for the vector versions.
// The three simd_*.h headers offer the same names; kernels are written once on top of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace pcm::PCM_ISA {

constexpr int kLanes = 1;

struct Vec {
  float v;
};
struct Mask {
  bool v;
};

static inline Vec load(const float* p) { return {*p}; }
static inline void store(float* p, Vec a) { *p = a.v; }
static inline Vec set1(float x) { return {x}; }
static inline Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
static inline Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
static inline Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
static inline Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
static inline Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
static inline Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
static inline Mask operator==(Vec a, Vec b) { return {a.v == b.v}; }
static inline Mask not_at_least(Vec a, Vec b) { return {!(a.v >= b.v)}; }  // true for NaN too
static inline Mask is_nan(Vec a) { return {a.v != a.v}; }
static inline Mask operator|(Mask a, Mask b) { return {a.v || b.v}; }
static inline Mask and_not(Mask a, Mask b) { return {a.v && !b.v}; }
// Writes the numbers first + lane of the lanes set, ascending; returns how many. May write up to kLanes entries.
static inline int append_lanes(Mask m, int first, int* out) {
  *out = first;
  return m.v;
}
static inline bool any(Mask m) { return m.v; }
static inline Vec select(Mask m, Vec a, Vec b) { return m.v ? a : b; }
static inline float max_lane(Vec a) { return a.v; }

static inline int32_t bits(float x) {
  int32_t b;
  std::memcpy(&b, &x, 4);
  return b;
}
static inline float from_bits(int32_t b) {
  float x;
  std::memcpy(&x, &b, 4);
  return x;
}

// p * 2^n, with n in the low bits of `shifted` (a whole number plus 1.5 * 2^23).
static inline Vec add_exponent(Vec p, Vec shifted) {
  return {from_bits(
      static_cast<int32_t>(static_cast<uint32_t>(bits(p.v)) + (static_cast<uint32_t>(bits(shifted.v)) << 23)))};
}

// Splits x = m * 2^e with m in [sqrt(1/2), sqrt(2)).
static inline void split_exponent(Vec x, Vec* m, Vec* e) {
  const int32_t b = bits(x.v), k = (b - 0x3F3504F3) >> 23;
  *m = {from_bits(b - k * (1 << 23))};
  *e = {static_cast<float>(k)};
}

// Sum of values in [0, 1], each rounded to a multiple of 2^-40 (ties to even): adding 1.5 * 2^12 as a double leaves
// exactly those bits at the end of the mantissa.
struct MassSum {
  uint64_t sum = 0;
  // Returns the rounded value.
  Vec add(Vec a) {
    const double shifted = static_cast<double>(a.v) + 6144.0;
    uint64_t b;
    std::memcpy(&b, &shifted, 8);
    sum += b & ((uint64_t{1} << 51) - 1);
    return {static_cast<float>(shifted - 6144.0)};
  }
  uint64_t total() const { return sum; }
};

static inline void convert_f16(const uint16_t* in, float* out, int n) {
  for (int i = 0; i < n; ++i) {
    const uint32_t h = in[i], sign = (h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
    uint32_t b;
    if (magnitude >= 0x7C00u) {
      b = 0x7F800000u | (magnitude & 0x3FFu) << 13;
    } else if (magnitude >= 0x400u) {
      b = (magnitude << 13) + 0x38000000u;
    } else {
      b = static_cast<uint32_t>(bits(static_cast<float>(magnitude) * 5.9604644775390625e-8f));  // 2^-24
    }
    out[i] = from_bits(static_cast<int32_t>(b | sign));
  }
}

// a * b + c, rounded once or twice: only for what is compared within a tolerance.
static inline Vec multiply_add(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
static inline float sum_lanes(Vec a) { return a.v; }

static inline Vec load_f16(const uint16_t* p) {
  Vec x;
  convert_f16(p, &x.v, 1);
  return x;
}
static inline Vec load_bf16(const uint16_t* p) { return {from_bits(static_cast<int32_t>(uint32_t{*p} << 16))}; }

// Words of 32 bits, one a lane, each of 8 nibbles or 4 bytes, all unsigned, the lowest bits first.
struct Words {
  uint32_t v;
};
static inline Words load_words(const uint8_t* p) {
  Words w;
  std::memcpy(&w.v, p, 4);
  return w;
}
// Whether the numbers that nibble and byte give are those in the word times 2^(4 index) and 2^(8 index), save the last
// one's.
constexpr bool kCodesInPlace = false;
static inline Vec nibble(Words w, int index) { return {static_cast<float>(w.v >> (4 * index) & 15)}; }
static inline Vec byte(Words w, int index) { return {static_cast<float>(w.v >> (8 * index) & 255)}; }

// For products of whole numbers: four bytes of a lane, and sums of products of unsigned codes and signed bytes.
struct Bytes {
  uint32_t v;
};
static inline Bytes broadcast_bytes(const int8_t* p) { return {load_words(reinterpret_cast<const uint8_t*>(p)).v}; }
static inline Words even_nibbles(Words w) { return {w.v & 0x0F0F0F0Fu}; }
static inline Words odd_nibbles(Words w) { return {w.v >> 4 & 0x0F0F0F0Fu}; }
struct ByteSum {
  int32_t v = 0;
  void add(Words codes, Bytes bytes) { accumulate(codes.v, bytes.v, 0); }  // codes of at most 15, 8 times at most
  void add_biased(Words codes, Bytes bytes) { accumulate(codes.v, bytes.v, 128); }  // codes less 128
  Vec total() const { return {static_cast<float>(v)}; }

 private:
  void accumulate(uint32_t codes, uint32_t bytes, int bias) {
    for (int i = 0; i < 32; i += 8) {
      v += (static_cast<int>(codes >> i & 255) - bias) * static_cast<int8_t>(bytes >> i & 255);
    }
  }
};

}  // namespace pcm::PCM_ISA
