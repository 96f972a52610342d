// What random cases are made of.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define REQUIRE(condition) \
  if (!(condition))        \
  throw std::logic_error(std::string(__FILE__) + " line " + std::to_string(__LINE__) + ": " #condition)

namespace {

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  int64_t below(int64_t end) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(end)); }
  bool chance(int64_t in) { return below(in) == 0; }
  template <class T>
  T one_of(std::initializer_list<T> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }
  std::vector<int64_t> permutation(int64_t size) {
    std::vector<int64_t> order(size);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), engine_);
    return order;
  }

 private:
  std::mt19937_64 engine_;
};

// Bytes that start `shift` after a multiple of 16, of random content.
class Memory {
 public:
  Memory(Random& random, int64_t bytes, int64_t shift)
      : bytes_(bytes), words_((bytes + shift) / 16 + 1), shift_(shift) {
    for (int64_t i = 0; i < bytes; ++i) data()[i] = static_cast<unsigned char>(random.below(256));
  }
  unsigned char* data() { return reinterpret_cast<unsigned char*>(words_.data()) + shift_; }
  std::vector<unsigned char> copy() { return {data(), data() + bytes_}; }

 private:
  int64_t bytes_;
  struct alignas(16) Word {
    unsigned char bytes[16];
  };
  std::vector<Word> words_;
  int64_t shift_;
};

}  // namespace
