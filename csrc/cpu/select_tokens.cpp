#include "cpu/select_tokens.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/philox.h"

namespace pcm {
namespace {

constexpr uint64_t kOne = uint64_t{1} << 40;
constexpr float kSmallest = 0x1p-40f;

inline uint64_t mass_of(float e) { return static_cast<uint64_t>(e * 0x1p40f); }  // exact: e is a multiple of 2^-40

inline uint32_t bits_of(float e) {
  uint32_t b;
  std::memcpy(&b, &e, 4);
  return b;
}
inline float from_bits(uint32_t b) {
  float e;
  std::memcpy(&e, &b, 4);
  return e;
}

// Positive floats are ordered as their bits are. A bucket is what shares all but the last 18 of them.
constexpr int kBucketShift = 18;
const uint32_t kFirstBucket = (127 - 40) << 5;
inline int bucket_of(float e) { return static_cast<int>((bits_of(e) >> kBucketShift) - kFirstBucket); }
inline float bucket_floor(int bucket) {
  return from_bits((static_cast<uint32_t>(bucket) + kFirstBucket) << kBucketShift);
}

// The least number that is at least fraction * mass, for a fraction in [0, 1], exactly.
uint64_t ceil_product(double fraction, uint64_t mass) {
  if (fraction <= 0) return 0;
  int exponent;
  const double mantissa = std::frexp(fraction, &exponent);
  const auto whole = static_cast<uint64_t>(mantissa * 0x1p53);
  const int shift = 53 - exponent;  // fraction = whole / 2^shift
  const unsigned __int128 product = static_cast<unsigned __int128>(whole) * mass;
  if (shift >= 120) return product != 0;
  return static_cast<uint64_t>((product + ((static_cast<unsigned __int128>(1) << shift) - 1)) >> shift);
}

// Tokens are ordered by probability descending, then id ascending. A cut keeps all up to and including one of them.
struct Cut {
  float value = kSmallest;
  int64_t last_id = std::numeric_limits<int64_t>::max();

  bool keeps(float e, int64_t id) const { return e > value || (e == value && id <= last_id); }
  bool stricter_than(const Cut& other) const {
    return value > other.value || (value == other.value && last_id < other.last_id);
  }
};

enum class By { kCount, kMass };

class Selector {
 public:
  Selector(const MixSampleKernels& kernels, const BlockRange& range, MixSampleWorkspace& ws)
      : kernels_(kernels), range_(range), ws_(ws), blocks_(range.blocks) {}

  uint64_t total() const {
    uint64_t sum = 0;
    for (int64_t b = 0; b < blocks_; ++b) sum += ws_.block_mass[b];
    return sum;
  }

  // Sums the entries of at least `floor` into ws.histograms[0], and counts them if wanted.
  template <bool kCounts>
  void fill_histogram(float floor) {
    std::memset(ws_.histograms.data(), 0, range_.threads() * sizeof(MassHistogram));
    range_.for_chunks([&](int64_t begin, int64_t end, int, int worker) {
      MassHistogram& mine = ws_.histograms[worker];
      for (int64_t b = begin; b < end; ++b) {
        if (ws_.block_top[b] < floor) continue;
        int indices[kBlock];
        const int found = kernels_.find_block(tempered(b), floor, 2.0f, indices);
        for (int i = 0; i < found; ++i) {
          const float e = tempered(b)[indices[i]];
          const int bucket = bucket_of(e);
          mine.mass[bucket] += mass_of(e);
          if constexpr (kCounts) ++mine.count[bucket];
        }
      }
    });
    MassHistogram& all = ws_.histograms[0];
    for (int worker = 1; worker < range_.threads(); ++worker) {
      for (int i = 0; i < MassHistogram::kBuckets; ++i) {
        all.mass[i] += ws_.histograms[worker].mass[i];
        all.count[i] += ws_.histograms[worker].count[i];
      }
    }
  }

  uint64_t in_histogram(By by) const {
    const MassHistogram& h = ws_.histograms[0];
    uint64_t sum = 0;
    for (int i = 0; i < MassHistogram::kBuckets; ++i) sum += by == By::kCount ? h.count[i] : h.mass[i];
    return sum;
  }

  // The shortest prefix of the order whose count or mass reaches the target; everything if none does. A radix select:
  // the bucket from the histogram, then nine bits at a time within it, then the place among equals.
  Cut cut_at(By by, uint64_t target) {
    const MassHistogram& h = ws_.histograms[0];
    const uint64_t* weights = by == By::kCount ? h.count : h.mass;
    uint64_t before = 0;
    int bucket = MassHistogram::kBuckets - 1;
    while (bucket >= 0 && (weights[bucket] == 0 || before + weights[bucket] < target)) before += weights[bucket--];
    if (bucket < 0) return Cut{};
    int64_t count = collect(bucket);
    const auto weight_of = [by](float e) { return by == By::kCount ? uint64_t{1} : mass_of(e); };
    for (const int shift : {9, 0}) {
      uint64_t sums[512] = {};
      for (int64_t i = 0; i < count; ++i) {
        const float e = value(ws_.candidates[i]);
        sums[(bits_of(e) >> shift) & 511] += weight_of(e);
      }
      uint32_t digit = 511;
      while (digit > 0 && (sums[digit] == 0 || before + sums[digit] < target)) before += sums[digit--];
      const auto matches = [&](int64_t id) { return ((bits_of(value(id)) >> shift) & 511) == digit; };
      count = std::stable_partition(ws_.candidates.begin(), ws_.candidates.begin() + count, matches) -
              ws_.candidates.begin();
    }
    const float cut = value(ws_.candidates[0]);
    const uint64_t each = weight_of(cut), missing = target > before ? target - before : 0;
    const uint64_t wanted = std::max<uint64_t>(1, (missing + each - 1) / each);
    return Cut{cut, ws_.candidates[wanted - 1]};
  }

  // Replaces ws.block_mass by what the cut keeps of each block; returns the sum.
  uint64_t keep(const Cut& cut) {
    range_.for_chunks([&](int64_t begin, int64_t end, int, int) {
      for (int64_t b = begin; b < end; ++b) ws_.block_mass[b] = kept_of_block(b, cut);
    });
    return total();
  }

  // The first kept token in id order whose running mass exceeds the threshold.
  int64_t token_at(uint64_t threshold, const Cut& cut) const {
    int64_t b = 0;
    while (ws_.block_mass[b] <= threshold) threshold -= ws_.block_mass[b++];
    for (int64_t id = b * kBlock;; ++id) {
      const uint64_t mass = cut.keeps(value(id), id) ? mass_of(value(id)) : 0;
      if (mass > threshold) return id;
      threshold -= mass;
    }
  }

 private:
  uint64_t kept_of_block(int64_t b, const Cut& cut) const {
    if (ws_.block_top[b] < cut.value) return 0;
    const int64_t last_block = cut.last_id / kBlock;
    if (b < last_block) return kernels_.keep_block(tempered(b), cut.value);
    if (b > last_block) return kernels_.keep_block(tempered(b), std::nextafter(cut.value, 2.0f));
    uint64_t mass = 0;
    for (int64_t id = b * kBlock; id < (b + 1) * kBlock; ++id)
      mass += cut.keeps(value(id), id) ? mass_of(value(id)) : 0;
    return mass;
  }

  const float* tempered(int64_t b) const { return ws_.tempered.data() + b * kBlock; }
  float value(int64_t id) const { return ws_.tempered[id]; }

  // Fills ws.candidates with the ids of one bucket, ascending; returns how many.
  int64_t collect(int bucket) {
    const float low = bucket_floor(bucket), high = bucket_floor(bucket + 1);
    int64_t count = 0;
    for (int64_t b = 0; b < blocks_; ++b) {
      if (ws_.block_top[b] < low) continue;
      int indices[kBlock];
      const int found = kernels_.find_block(tempered(b), low, high, indices);
      for (int i = 0; i < found; ++i) ws_.candidates[count++] = b * kBlock + indices[i];
    }
    return count;
  }

  const MixSampleKernels& kernels_;
  const BlockRange& range_;
  MixSampleWorkspace& ws_;
  int64_t blocks_;
};

// min_p as a cut: the smallest float that is at least ceil(min_p * 2^40) / 2^40.
Cut cut_at_probability(double min_p) {
  const double least = static_cast<double>(std::max<uint64_t>(1, ceil_product(min_p, kOne))) * 0x1p-40;
  const auto nearest = static_cast<float>(least);
  return Cut{nearest < least ? std::nextafter(nearest, 2.0f) : nearest};
}

}  // namespace

int64_t draw_token(const MixSampleKernels& kernels, const BlockRange& range, MixSampleWorkspace& ws,
                   const SampleParams& params) {
  Selector selector(kernels, range, ws);
  uint64_t kept = selector.total();
  Cut cut = cut_at_probability(params.min_p);
  const bool by_count = params.top_k > 0;
  if (by_count || params.top_p < 1) {
    // Most of the mass is most often in a few tokens: look at those of at least 2^-10 first, at all if that is not
    // enough.
    const uint64_t wanted = by_count ? static_cast<uint64_t>(params.top_k) : ceil_product(params.top_p, kept);
    for (const float floor : {std::max(cut.value, 0x1p-9f), std::max(cut.value, 0x1p-16f), cut.value}) {
      by_count ? selector.fill_histogram<true>(floor) : selector.fill_histogram<false>(floor);
      if (selector.in_histogram(by_count ? By::kCount : By::kMass) >= wanted) break;
    }
  }
  if (by_count) {
    const Cut at_count = selector.cut_at(By::kCount, static_cast<uint64_t>(params.top_k));
    if (at_count.stricter_than(cut)) cut = at_count;
  }
  if (cut.stricter_than(Cut{})) kept = selector.keep(cut);
  if (params.top_p < 1) {
    cut = selector.cut_at(By::kMass, ceil_product(params.top_p, kept));
    kept = selector.keep(cut);
  }
  const uint64_t random = philox(params.seed, params.sequence, params.position);
  const auto threshold = static_cast<uint64_t>(static_cast<unsigned __int128>(random) * kept >> 64);
  return selector.token_at(threshold, cut);
}

}  // namespace pcm
