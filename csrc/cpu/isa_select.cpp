#include "cpu/isa_select.h"

#include <stdexcept>

namespace pcm {

std::vector<const Isa*> available_isas() {
  std::vector<const Isa*> isas{&generic::kIsa};
#ifdef PCM_FAST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    isas.push_back(&avx2::kIsa);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      isas.push_back(&avx512::kIsa);
    }
  }
#endif
  return isas;
}

const Isa& select_isa(const std::string& name) {
  const auto isas = available_isas();
  if (name.empty() || name == "auto") return *isas.back();
  std::string known = "auto";
  for (const Isa* isa : isas) {
    if (name == isa->name) return *isa;
    known += std::string(", ") + isa->name;
  }
  throw std::invalid_argument("PCM_FAST_ISA: expected one of " + known + " (what this machine can run), got '" + name +
                              "'");
}

}  // namespace pcm
