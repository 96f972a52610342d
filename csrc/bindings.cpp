// The Python module pcm_fast._native.
#include "bindings.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of pcm-fast. Use them through pcm_fast.ops.";
  pcm::bind_decoder(m);
  pcm::bind_graph_store(m);
  pcm::bind_kv_cache(m);
  pcm::bind_mix_sample(m);
  pcm::bind_mixture_step(m);
}
