#include "graph_store.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace pcm {
namespace {

[[noreturn]] void bad_argument(const char* name, const std::string& expected, int64_t got) {
  throw std::invalid_argument(std::string("graph_store: ") + name + ": expected " + expected + ", got " +
                              std::to_string(got));
}

// Sets a flag for as long as it lives.
class While {
 public:
  explicit While(bool& flag) : flag_(flag) { flag_ = true; }
  ~While() { flag_ = false; }
  While(const While&) = delete;
  While& operator=(const While&) = delete;

 private:
  bool& flag_;
};

}  // namespace

GraphStore::GraphStore(GraphFunctions functions, std::vector<int32_t> buckets, int64_t budget_bytes)
    : functions_(std::move(functions)), buckets_(std::move(buckets)), budget_bytes_(budget_bytes) {
  if (buckets_.empty()) bad_argument("buckets", "at least one batch size", 0);
  for (size_t i = 0; i < buckets_.size(); ++i) {
    const int32_t before = i == 0 ? 0 : buckets_[i - 1];
    if (buckets_[i] <= before) bad_argument("buckets", "a batch size above " + std::to_string(before), buckets_[i]);
  }
  if (budget_bytes < 0) bad_argument("budget_bytes", "a number of bytes", budget_bytes);
}

int32_t GraphStore::bucket(int32_t batch) const {
  const auto found = std::lower_bound(buckets_.begin(), buckets_.end(), batch);
  if (batch <= 0 || found == buckets_.end()) {
    bad_argument("batch", "1 to " + std::to_string(buckets_.back()) + ", the largest bucket", batch);
  }
  return *found;
}

bool GraphStore::run(int32_t batch, int32_t draft) {
  check_idle("run");
  const int32_t size = bucket(batch);
  if (draft < 0) bad_argument("draft", "a number of tokens", draft);
  const While running(busy_);
  const auto found = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& entry) { return entry.bucket == size && entry.draft == draft; });
  const bool replayed = found != entries_.end();
  if (replayed) {
    std::rotate(found, found + 1, entries_.end());
  } else {
    entries_.reserve(entries_.size() + 1);  // so that nothing can fail once others have gone
    CapturedGraph captured = capture(size, draft);
    size_t leaving = 0;
    for (; bytes_ > budget_bytes_ - captured.bytes; ++leaving) bytes_ -= entries_[leaving].captured.bytes;
    evictions_ += static_cast<int64_t>(leaving);
    entries_.erase(entries_.begin(), entries_.begin() + static_cast<std::ptrdiff_t>(leaving));
    bytes_ += captured.bytes;
    ++captures_;
    entries_.push_back({size, draft, std::move(captured)});
  }
  functions_.launch(entries_.back().captured.graph.get());
  replays_ += replayed;
  return replayed;
}

CapturedGraph GraphStore::capture(int32_t bucket, int32_t draft) {
  CapturedGraph captured = functions_.capture(bucket, draft);
  if (captured.bytes < 0) bad_argument("bytes of a captured graph", "0 or more", captured.bytes);
  if (captured.bytes > budget_bytes_) {
    throw std::length_error("graph_store: the graph for batch " + std::to_string(bucket) + " and draft length " +
                            std::to_string(draft) + " takes " + std::to_string(captured.bytes) +
                            " bytes, the budget is " + std::to_string(budget_bytes_));
  }
  return captured;
}

GraphStoreStats GraphStore::stats() const {
  return {static_cast<int32_t>(entries_.size()), bytes_, captures_, replays_, evictions_};
}

void GraphStore::clear() {
  check_idle("clear");
  const While running(busy_);
  entries_.clear();
  bytes_ = 0;
}

void GraphStore::check_idle(const char* what) const {
  if (busy_) throw std::logic_error(std::string("graph_store: ") + what + " called from within capture or launch");
}

}  // namespace pcm
