// The instruction sets this build knows, and the table of block kernels each of them fills. A block is kBlock
// consecutive vocabulary entries as float32, the last one of a row padded with -inf, so that no kernel has a tail to
// handle.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace pcm {

constexpr int kBlock = 256;
constexpr int kMaxExperts = 16;

enum class Merge : int { kLinear = 0, kLogLinear = 1, kPower = 2 };

// What the merge needs to know of one active expert, once its normaliser is known.
struct ExpertTerm {
  float top;        // greatest logit
  float log_total;  // log sum exp(logit - top)
  float scale;      // weight / sum exp(logit - top)
  float weight;
  float log_weight;
};

struct MixSampleKernels {
  // Greatest entry; *bad becomes true if there is a NaN.
  float (*max_block)(const float* x, bool* bad);
  // out = exp(x - top); returns the sum, each term rounded to a multiple of 2^-40, in units of 2^-40.
  uint64_t (*exp_block)(const float* x, float top, float* out);
  // Merged log-probability of each entry (not normalised for kLogLinear and kPower). Returns the greatest; *bad on NaN.
  // exps are those of exp_block, and are read for kLinear only.
  float (*merge_block)(const float* const* x, const float* const* exps, const ExpertTerm* terms, int experts,
                       Merge merge, float exponent, float* out, bool* bad);
  // out = x - (top + log_total), in two subtractions.
  void (*normalize_block)(const float* x, float top, float log_total, float* out);
  // out = exp((x - top) / temperature) rounded to a multiple of 2^-40; returns its sum in units of 2^-40 and its
  // greatest.
  uint64_t (*temper_block)(const float* x, float top, float temperature, float* out, float* greatest);
  // Sum of the entries of at least `floor`, all of them multiples of 2^-40, in units of 2^-40.
  uint64_t (*keep_block)(const float* x, float floor);
  // Writes the indices of the entries in [low, high), ascending, to indices[kBlock]; returns how many.
  int (*find_block)(const float* x, float low, float high, int* indices);
  float (*log)(float x);
  void (*convert_f16)(const uint16_t* in, float* out, int n);  // n a multiple of 16
};

// Weights lie in panels of kPanel outputs; kGroup inputs share the scales of the block formats.
constexpr int kPanel = 32;
constexpr int kGroup = 32;
constexpr int kRowTile = 8;

enum class Format : int { kFloat32 = 0, kBFloat16 = 1, kQ8_0 = 2, kQ4_0 = 3, kQ4_1 = 4 };

struct DecoderKernels {
  // out[r][0..kPanel) = panel * x[r] for 1 to kRowTile rows; rows x_stride and out_stride floats apart. What a row gets
  // does not depend on how many rows there are.
  void (*panel)(Format format, const uint8_t* panel, int in, const float* x, int64_t x_stride, int rows, float* out,
                int64_t out_stride);
  float (*dot)(const float* a, const float* b, int n);                 // n a multiple of 16, as below
  void (*add_scaled)(const float* x, float scale, float* out, int n);  // out += scale * x
  void (*softmax)(float* x, int n);                                    // any n; room for 15 more entries
  void (*gate)(const float* up, float* gate, int n);                   // gate = silu(gate) * up
};

struct Isa {
  const char* name;
  MixSampleKernels mix_sample;
  DecoderKernels decoder;
};

// The sets this machine can run, best last.
std::vector<const Isa*> available_isas();
// The best one, or the one asked for; throws std::invalid_argument naming what there is.
const Isa& select_isa(const std::string& name);

namespace generic {
extern const Isa kIsa;
}
#ifdef PCM_FAST_X86
namespace avx2 {
extern const Isa kIsa;
}
namespace avx512 {
extern const Isa kIsa;
}
#endif

}  // namespace pcm
