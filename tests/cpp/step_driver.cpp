// Drives thread pool, decoder, KV cache and mixture step without Python, for the sanitizers: random tiny models of
// every weight format, several sequences of three experts and a PCM. Whatever the number of threads and whoever shares
// the batch, the same tokens with the same log-probabilities must come out. Two threads then share one pool.
//
//   step_driver STEPS SEED
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>

#include "cpu/isa_select.h"
#include "cpu/mixture_step.h"
#include "kv_cache.h"

namespace {

using namespace pcm;

constexpr int kExperts = 3, kSequences = 4, kReaders = kExperts + 1, kBlocks = 128, kBlocksPerRow = 8;
const DecoderShape kShape{2, 64, 96, 4, 2, 32, 160, 1e-5f, {0, 24}};

class Random {
 public:
  explicit Random(unsigned seed) : engine_(seed) {}
  int below(int n) { return static_cast<int>(engine_() % static_cast<unsigned>(n)); }
  std::vector<float> floats(size_t n, float size) {
    std::normal_distribution<float> normal(0, size);
    std::vector<float> values(n);
    for (float& x : values) x = normal(engine_);
    return values;
  }

 private:
  std::mt19937 engine_;
};

// Rows of a weight matrix as a checkpoint stores them. Scales are float16 numbers about 1/64.
PackedLinear random_linear(Random& random, Format format, int out, int in, Arena& arena) {
  const auto stride = static_cast<size_t>(PackedLinear::row_bytes(format, in));
  std::vector<uint8_t> rows(stride * out);
  if (format == Format::kFloat32 || format == Format::kBFloat16) {
    const auto values = random.floats(static_cast<size_t>(out) * in, 0.2f);
    for (size_t i = 0; i < values.size(); ++i) {
      const auto* bytes = reinterpret_cast<const uint8_t*>(&values[i]);
      if (format == Format::kFloat32) std::copy_n(bytes, 4, &rows[4 * i]);
      if (format == Format::kBFloat16) std::copy_n(bytes + 2, 2, &rows[2 * i]);
    }
  } else {
    for (uint8_t& byte : rows) byte = static_cast<uint8_t>(random.below(256));
    const size_t block = stride / (in / kGroup);
    for (size_t at = 0; at < rows.size(); at += block) {
      rows[at + 1] = 0x24;
      if (format == Format::kQ4_1) rows[at + 3] = 0xAF;  // a minimum about -7/64
    }
  }
  return {format, out, in, rows.data(), arena};
}

std::unique_ptr<Decoder> random_decoder(std::shared_ptr<ThreadPool> pool, const Isa& isa, unsigned seed) {
  Random random(seed);
  auto decoder = std::make_unique<Decoder>(isa, std::move(pool), kShape);
  const auto format = [&] { return static_cast<Format>(random.below(5)); };
  const int q = kShape.heads * kShape.head_dim, kv = kShape.kv_heads * kShape.head_dim;
  const int outs[] = {q, kv, kv, kShape.hidden, kShape.intermediate, kShape.intermediate, kShape.hidden};
  const int ins[] = {kShape.hidden, kShape.hidden, kShape.hidden, q, kShape.hidden, kShape.hidden, kShape.intermediate};
  for (int l = 0; l < kShape.layers; ++l) {
    DecoderLayer& layer = decoder->layer(l);
    const Format projections = format(), gates = format(), output = format(), down = format();
    const Format formats[] = {projections, projections, projections, output, gates, gates, down};
    for (int s = 0; s < kSites; ++s) {
      layer.weights[s] = random_linear(random, formats[s], outs[s], ins[s], decoder->arena());
    }
    layer.biases[kQ] = random.floats(q, 0.1f);
    layer.input_norm = layer.post_norm = std::vector<float>(kShape.hidden, 1.0f);
    layer.q_norm = layer.k_norm = std::vector<float>(kShape.head_dim, 1.0f);
  }
  decoder->embedding = random_linear(random, format(), kShape.vocabulary, kShape.hidden, decoder->arena());
  decoder->final_norm = std::vector<float>(kShape.hidden, 1.0f);
  decoder->rope_cos = random.floats(kBlocksPerRow * kKvBlock * kShape.head_dim / 2, 0.5f);
  decoder->rope_sin = random.floats(kBlocksPerRow * kKvBlock * kShape.head_dim / 2, 0.5f);
  for (int a = 0; a < kReaders - 1; ++a) {
    auto adapter = std::make_unique<LoraAdapter>();
    adapter->sites.resize(kShape.layers * kSites + 1);
    for (int i = 0; i < kShape.layers * kSites; ++i) {
      const int rank = random.below(3) * 3, s = i % kSites;
      if (rank == 0) continue;
      const auto first = random.floats(static_cast<size_t>(rank) * ins[s], 0.1f);
      const auto second = random.floats(static_cast<size_t>(rank) * outs[s], 0.1f);
      adapter->sites[i] = LoraSite(rank, ins[s], outs[s], first.data(), second.data(), decoder->arena());
    }
    decoder->adapters.push_back(std::move(adapter));
  }
  return decoder;
}

struct Drawn {
  std::vector<int64_t> tokens;
  std::vector<float> logprobs;
  bool operator==(const Drawn&) const = default;
};

// The answers of some of the sequences, drawn together. Prompts are read in one pass, however long.
std::vector<Drawn> answers(std::shared_ptr<ThreadPool> pool, const Isa& isa, unsigned seed, int steps,
                           const std::vector<int>& sequences, bool int8) {
  const auto decoder = random_decoder(pool, isa, seed);
  decoder->int8_activations = int8;
  KvCacheManager cache({kBlocks, kKvBlock, kSequences * kReaders, kBlocksPerRow});
  KvStorage storage({kShape.layers, kBlocks, kShape.kv_heads, kKvBlock, kShape.head_dim, KvDtype::kFloat32});
  MixtureStep step(std::make_shared<MixSampler>(isa, pool));
  Random head_random(seed + 1);
  const auto head = head_random.floats(static_cast<size_t>(kExperts) * kShape.hidden, 0.2f);

  std::vector<std::vector<int32_t>> unread;
  std::vector<RowId> rows;
  for (const int s : sequences) {
    for (int reader = 0; reader < kReaders; ++reader) {
      Random random(seed + 100u * static_cast<unsigned>(s) + static_cast<unsigned>(reader));
      std::vector<int32_t> prompt(static_cast<size_t>(1 + random.below(40)));
      for (int32_t& token : prompt) token = random.below(kShape.vocabulary);
      rows.push_back(
          *cache.create_row(static_cast<uint64_t>(rows.size()), prompt.data(), static_cast<int32_t>(prompt.size())));
      unread.push_back(std::move(prompt));
    }
  }
  std::vector<Drawn> drawn(sequences.size());
  for (int t = 0; t < steps; ++t) {
    std::vector<int32_t> tokens, of_row, positions, adapters, wanted;
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto count = static_cast<int32_t>(unread[i].size());
      const int32_t length = cache.length(rows[i]);
      if (!cache.append_slots(rows[i], count)) std::abort();
      for (int32_t j = 0; j < count; ++j) {
        tokens.push_back(unread[i][j]);
        of_row.push_back(rows[i]);
        positions.push_back(length + j);
        adapters.push_back(static_cast<int32_t>(i % kReaders) - 1);
      }
      wanted.push_back(static_cast<int32_t>(tokens.size()) - 1);
    }
    const DecoderBatch batch{static_cast<int>(tokens.size()),
                             tokens.data(),
                             of_row.data(),
                             positions.data(),
                             adapters.data(),
                             cache.block_tables(),
                             kBlocksPerRow};
    std::vector<StepSequence> due(sequences.size());
    for (size_t s = 0; s < due.size(); ++s) {
      StepSequence& sequence = due[s];
      const auto first = static_cast<int>(s) * kReaders;
      sequence.experts = kExperts;
      for (int e = 0; e < kExperts; ++e) {
        sequence.hidden[e] = {0, first + e};
        sequence.head[e] = head.data() + static_cast<size_t>(e) * kShape.hidden;
        sequence.bias[e] = 0;
      }
      sequence.pcm = {0, first + kExperts};
      sequence.merge = static_cast<Merge>(sequences[s] % 3);
      sequence.exponent = -1;
      sequence.combine = sequence.merge == Merge::kLogLinear;
      sequence.params = {false, 1.0f, 0, 0.9, 0.0, 7, static_cast<uint64_t>(sequences[s]), static_cast<uint64_t>(t)};
    }
    step.run({{decoder.get(), &storage, batch, wanted.data(), static_cast<int>(wanted.size())}}, due);
    for (size_t i = 0; i < rows.size(); ++i) {
      cache.commit(rows[i], unread[i].data(), static_cast<int32_t>(unread[i].size()));
      const StepSequence& sequence = due[i / kReaders];
      if (sequence.status != Status::kOk) std::abort();
      unread[i] = {static_cast<int32_t>(sequence.token)};
    }
    for (size_t s = 0; s < due.size(); ++s) {
      drawn[s].tokens.push_back(due[s].token);
      drawn[s].logprobs.push_back(due[s].logprob);
    }
  }
  cache.check();
  return drawn;
}

void expect(bool same, const std::string& what) {
  if (same) return;
  std::fprintf(stderr, "step_driver: not the same answers: %s\n", what.c_str());
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: step_driver STEPS SEED\n");
    return 2;
  }
  const int steps = std::atoi(argv[1]);
  const auto seed = static_cast<unsigned>(std::atoi(argv[2]));
  std::vector<int> all(kSequences);
  for (int s = 0; s < kSequences; ++s) all[s] = s;
  for (const Isa* isa : available_isas()) {
    for (const bool int8 : {false, true}) {
      const auto together = answers(std::make_shared<ThreadPool>(2), *isa, seed, steps, all, int8);
      for (const int threads : {1, 4}) {
        const auto again = answers(std::make_shared<ThreadPool>(threads), *isa, seed, steps, all, int8);
        expect(again == together, std::string(isa->name) + ", " + std::to_string(threads) + " threads");
      }
      const auto shared = std::make_shared<ThreadPool>(2);
      std::vector<std::thread> others;
      for (int s = 0; s < 2; ++s) {
        others.emplace_back([&, s] {
          const auto alone = answers(shared, *isa, seed, steps, {s}, int8);
          expect(alone[0] == together[s], std::string(isa->name) + ", sequence " + std::to_string(s) + " alone");
        });
      }
      for (std::thread& other : others) other.join();
    }
    std::printf("step_driver: %s: the same answers in every batch and on 1, 2 and 4 threads\n", isa->name);
  }
}
