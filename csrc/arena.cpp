#include "arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace pcm {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kChunk = size_t{64} << 20;
constexpr size_t kLine = 64;

}  // namespace

Pages::Pages(size_t bytes) : mapped_bytes_(bytes + kHugePage) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#ifdef MAP_NORESERVE
  flags |= MAP_NORESERVE;  // a pool may be larger than the memory it will ever use
#endif
  if (bytes > SIZE_MAX - kHugePage) throw std::bad_alloc();
  mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (mapped_ == MAP_FAILED) throw std::bad_alloc();
  const auto address = reinterpret_cast<uintptr_t>(mapped_);
  data_ = static_cast<uint8_t*>(mapped_) + ((kHugePage - address % kHugePage) % kHugePage);
#ifdef MADV_HUGEPAGE
  madvise(data_, bytes, MADV_HUGEPAGE);  // a wish: without huge pages everything works all the same
#endif
}

Pages::~Pages() { munmap(mapped_, mapped_bytes_); }

uint8_t* Arena::take(size_t bytes) {
  const size_t rounded = (bytes + kLine - 1) / kLine * kLine;
  if (rounded > left_) {
    left_ = std::max(kChunk, rounded);
    chunks_.push_back(std::make_unique<Pages>(left_));
    next_ = chunks_.back()->data();
  }
  uint8_t* taken = next_;
  next_ += rounded;
  left_ -= rounded;
  return taken;
}

}  // namespace pcm
