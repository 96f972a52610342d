// Philox4x32-10 (Salmon et al., SC 2011): random bits as a function of (seed, sequence, position).
#pragma once

#include <cstdint>

namespace pcm {

inline uint64_t philox(uint64_t seed, uint64_t sequence, uint64_t position) {
  auto low = [](uint64_t x) { return static_cast<uint32_t>(x); };
  auto high = [](uint64_t x) { return static_cast<uint32_t>(x >> 32); };
  uint32_t c0 = low(position), c1 = high(position), c2 = low(sequence), c3 = high(sequence);
  uint32_t k0 = low(seed), k1 = high(seed);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = high(b) ^ c1 ^ k0;
    c1 = low(b);
    c2 = high(a) ^ c3 ^ k1;
    c3 = low(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return uint64_t{c1} << 32 | c0;
}

}  // namespace pcm
