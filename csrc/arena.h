// Memory for what is read over and over: weights, adapters, the KV cache. A token reads all of it, so it lies in huge
// pages where the system has them; with small ones a good part of a step goes into address translation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace pcm {

// Zeroed pages that take no memory until they are touched, aligned for huge pages; throws std::bad_alloc if the address
// space is refused.
class Pages {
 public:
  explicit Pages(size_t bytes);
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  uint8_t* data() const { return data_; }

 private:
  void* mapped_;
  size_t mapped_bytes_;
  uint8_t* data_;
};

// Pieces of pages, freed all together.
class Arena {
 public:
  // Zeroed, and aligned to a cache line.
  uint8_t* take(size_t bytes);

 private:
  std::vector<std::unique_ptr<Pages>> chunks_;
  size_t left_ = 0;  // in the last chunk
  uint8_t* next_ = nullptr;
};

}  // namespace pcm
