// store_kv beside host code: all dtypes, layouts and alignments.
#pragma once

#include <cmath>
#include <cstring>

#include "cuda/kv_ops.h"
#include "random_case.h"

namespace {

using namespace pcm;

struct Format {
  int bytes, digits, least, most;  // of a positive number, powers of two: of the least, and above the greatest
};

Format format_of(DeviceDtype dtype) {
  if (dtype == DeviceDtype::kFloat32) return {4, 24, -149, 128};
  return dtype == DeviceDtype::kBFloat16 ? Format{2, 8, -133, 128} : Format{2, 11, -24, 16};
}

double decode(const Format& format, const void* item) {
  uint32_t bits = 0;
  std::memcpy(&bits, item, format.bytes);
  const int fraction_bits = format.digits - 1;
  const uint32_t fraction = bits & ((1u << fraction_bits) - 1);
  const uint32_t exponents = (1u << (8 * format.bytes - 1 - fraction_bits)) - 1;
  const uint32_t exponent = bits >> fraction_bits & exponents;
  double value = std::ldexp(fraction + (exponent > 0 ? std::ldexp(1.0, fraction_bits) : 0.0),
                            format.least + std::max<int>(exponent, 1) - 1);
  if (exponent == exponents) value = fraction ? NAN : INFINITY;
  return bits >> (8 * format.bytes - 1) ? -value : value;
}

// To nearest, ties to even.
double rounded(const Format& format, double x) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int unit = std::max(std::ilogb(x) - format.digits + 1, format.least);
  const double near = std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
  return std::abs(near) >= std::ldexp(1.0, format.most) ? std::copysign(INFINITY, x) : near;
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b));
}

struct StoreCase {
  Memory news, cache;
  NewHeads from;
  LayerCache to;
};

StoreCase make_store_case(Random& random, const StoreShape& shape, int64_t blocks, DeviceDtype in, DeviceDtype out) {
  const int64_t size = format_of(out).bytes;
  const int64_t gap = random.one_of({0, 0, 8, 3}), spread = random.one_of({1, 1, 1, 2});
  const int64_t tile = shape.block_size * shape.head_dim * spread;
  const int64_t head = tile + random.one_of({0, 0, 16, 1}), block = head * shape.heads + random.one_of({0, 0, 8, 5});
  const bool by_slot = random.chance(3);  // [head_dim][block_size], as KvStorage lays keys
  const int64_t token_stride = (shape.head_dim + gap) * shape.heads + random.one_of({0, 0, 64, 7});
  const auto shift = [&](int64_t bytes) { return random.chance(4) ? bytes : 0; };
  Memory news(random, (shape.tokens + 1) * token_stride * format_of(in).bytes, shift(format_of(in).bytes));
  Memory cache(random, blocks * block * size, shift(size));
  const NewHeads from{news.data(), in, token_stride, shape.head_dim + gap};
  const LayerCache to{cache.data(),
                      out,
                      block,
                      head,
                      by_slot ? spread : shape.head_dim * spread,
                      by_slot ? shape.block_size * spread : spread};
  return {std::move(news), std::move(cache), from, to};
}

void check_stored(StoreCase& one, std::vector<unsigned char> before, const StoreShape& shape,
                  const std::vector<int64_t>& slots) {
  const Format in = format_of(one.from.dtype), out = format_of(one.to.dtype);
  for (int64_t t = 0; t < shape.tokens; ++t) {
    if (slots[t] < 0) continue;
    for (int64_t h = 0; h < shape.heads; ++h) {
      for (int64_t d = 0; d < shape.head_dim; ++d) {
        const int64_t from = t * one.from.token_stride + h * one.from.head_stride + d;
        const int64_t to = slots[t] / shape.block_size * one.to.block_stride + h * one.to.head_stride +
                           slots[t] % shape.block_size * one.to.slot_stride + d * one.to.item_stride;
        const double given = decode(in, one.news.data() + from * in.bytes);
        REQUIRE(same(decode(out, one.cache.data() + to * out.bytes), rounded(out, given)));
        std::memcpy(before.data() + to * out.bytes, one.cache.data() + to * out.bytes, out.bytes);
      }
    }
  }
  REQUIRE(before == one.cache.copy());  // nothing else was written
}

void test_store_kv(Random& random) {
  const StoreShape shape{static_cast<int32_t>(random.below(24)), static_cast<int32_t>(1 + random.below(5)),
                         random.one_of({1, 3, 8, 8, 16, 24, 64}), random.one_of({1, 3, 4, 16})};
  const int64_t blocks = shape.tokens / shape.block_size + 2 + random.below(4);
  const auto in = static_cast<DeviceDtype>(random.below(3)), out = static_cast<DeviceDtype>(random.below(3));
  StoreCase keys = make_store_case(random, shape, blocks, in, out);
  StoreCase values = make_store_case(random, shape, blocks, in, out);
  std::vector<int64_t> slots = random.permutation(blocks * shape.block_size);
  slots.resize(shape.tokens);
  for (int64_t& slot : slots) slot = random.chance(5) ? -1 : slot;
  const auto keys_before = keys.cache.copy(), values_before = values.cache.copy();
  store_kv(keys.from, values.from, slots.data(), shape, keys.to, values.to, nullptr);
  check_stored(keys, keys_before, shape, slots);
  check_stored(values, values_before, shape, slots);
}

}  // namespace
