// The instruction sets this build knows, and the table of kernels each of them fills. isa_select.h chooses one.
//
// Only <cstdint> may be included here and in what the isa_*.cpp include, and the tables must be constants: a function
// template instantiated, or an initialiser run, in a file compiled for AVX-512 would reach machines without it.
#pragma once

#include <cstdint>

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

// Weights lie in panels of kPanel outputs; kGroup inputs share the scales of the block formats (packed_linear.h).
constexpr int kPanel = 32;
constexpr int kGroup = 32;
constexpr int kRowTile = 96;  // rows worked on with a panel at a time, at most

enum class Format : int { kFloat32 = 0, kBFloat16 = 1, kQ8_0 = 2, kQ4_0 = 3, kQ4_1 = 4 };

// Memory that will be needed soon, in cache lines. A product that is bound by arithmetic asks for it on the way.
struct Run {
  const char* start;
  int lines;
};
struct Ahead {
  const Run* runs = nullptr;
  int count = 0;
};

// Rows of inputs of a linear layer, and what is known of them.
struct LinearInput {
  const float* x;       // [rows][stride]
  const float* scaled;  // [rows][stride], see scale_inputs
  int64_t stride;
  const float* group_sums;  // [rows][sums_stride]: sums of kGroup inputs each
  int64_t sums_stride;
  Ahead ahead = {};
};

// The same with 8-bit activations, see int8_blocks.h.
struct Int8Input {
  const int8_t* bytes;  // [rows][stride]
  int64_t stride;
  const float *scales, *group_sums;  // [rows][groups_stride]
  int64_t groups_stride;
  Ahead ahead = {};
};

// The keys and values that the query heads of one key/value head of one token see.
struct AttentionInput {
  const float* q;  // [group][head_dim]
  int group, head_dim;
  const int32_t* block_table;
  int begin, end;  // positions
  const void*
      keys;  // of this layer and head in block 0: [head_dim][kKvBlock] a block, then values [kKvBlock][head_dim]
  int64_t value_offset, block_stride;  // in items
  bool bf16;
};
constexpr int kKvBlock = 16;  // slots of a block of the KV cache

struct DecoderKernels {
  // out[r][0..kPanel) = panel * x[r] for 1 to kRowTile rows, out_stride floats apart. What a row gets does not depend
  // on how many rows there are.
  void (*panel)(Format format, const uint8_t* panel, int in, const LinearInput& input, int rows, float* out,
                int64_t out_stride);
  // The same for a block format and 8-bit activations, any number of rows.
  void (*panel_int8)(Format format, const uint8_t* panel, int in, const Int8Input& input, int rows, float* out,
                     int64_t out_stride);
  // out[j] = a[j] . x for the rank rows of a [rank][in] of float32 or bfloat16; in is a multiple of 16.
  void (*shrink)(Format format, const void* a, int rank, const float* x, int in, float* out);
  // out[0..kPanel) += sum_j factors[j] b[j] for b [rank][kPanel] of float32 or bfloat16.
  void (*expand)(Format format, const void* b, int rank, const float* factors, float* out);
  // x [group][head_dim] -> softmax(q K^T / sqrt(head_dim)) V, for head_dim a multiple of 16. scores: scratch, group
  // rows of scores_stride >= end - begin + 2 * kKvBlock.
  void (*attend)(const AttentionInput& input, float* scores, int64_t scores_stride, float* out);
  // RMSNorm (Zhang and Sennrich 2019): out = x / sqrt(mean(x^2) + eps) * weight; n a multiple of 16.
  void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* out);
  // For a block format: the sums of kGroup inputs each, and the inputs in the scale that few rows want them in.
  void (*scale_inputs)(Format format, const float* x, int groups, float* sums, float* scaled);
  // Inputs as signed bytes, their scales and the sums of the inputs, by group.
  void (*quantize_inputs)(Format format, const float* x, int groups, float* sums, float* scales, int8_t* bytes);
  void (*gate)(const float* up, float* gate, int n);  // gate = silu(gate) * up, n a multiple of 16
};

struct Isa {
  const char* name;
  MixSampleKernels mix_sample;
  DecoderKernels decoder;
};

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
