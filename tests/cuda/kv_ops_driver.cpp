// Runs every kernel of csrc/cuda/kv_ops.cu over seeded random shapes beside straightforward host code.
//
//   kv_ops_driver ROUNDS SEED [KERNEL]
//
// Built with sanitizers and with emulation.h in place of CUDA (make gpu-check).
#include <cstdio>
#include <cstdlib>

#include "advance_cases.h"
#include "decode_cases.h"
#include "emulation.h"
#include "move_cases.h"
#include "store_kv_cases.h"

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) {
    std::printf("usage: %s ROUNDS SEED [KERNEL]\n", argv[0]);
    return 2;
  }
  const std::string wanted = argc == 4 ? argv[3] : "all";
  int64_t done = 0;
  const int64_t rounds = std::atoll(argv[1]);
  const uint64_t seed = std::strtoull(argv[2], nullptr, 10);
  const struct {
    const char* name;
    void (*run)(Random&);
  } tests[] = {{"store_kv", test_store_kv},
               {"copy_blocks", test_copy_blocks},
               {"gather_blocks", test_gather_blocks},
               {"advance", test_advance},
               {"decode", test_decode}};
  for (const auto& test : tests) {
    if (wanted != "all" && wanted != test.name) continue;
    ++done;
    for (int64_t round = 0; round < rounds; ++round) {
      try {
        Random random(seed * 1000003 + static_cast<uint64_t>(round));
        emulation::seed(static_cast<uint64_t>(round));
        test.run(random);
      } catch (const std::exception& e) {
        std::printf("FAILED: %s, seed %llu, round %lld: %s\n", test.name, static_cast<unsigned long long>(seed),
                    static_cast<long long>(round), e.what());
        return 1;
      }
    }
  }
  std::printf("passed: %lld rounds of each of %lld operations\n", static_cast<long long>(rounds),
              static_cast<long long>(done));
  return done > 0 ? 0 : 2;
}
