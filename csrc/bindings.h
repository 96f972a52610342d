// Each noun binds itself in csrc/<noun>_bindings.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace pcm {
void bind_decoder(pybind11::module_& m);
void bind_graph_store(pybind11::module_& m);
void bind_kv_cache(pybind11::module_& m);
void bind_mix_sample(pybind11::module_& m);
void bind_mixture_step(pybind11::module_& m);
}  // namespace pcm
