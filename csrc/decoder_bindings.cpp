// pcm_fast._native.Decoder. Arguments arrive checked by pcm_fast/backends/native.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "bindings.h"
#include "cpu/decoder.h"
#include "cpu/isa_select.h"

namespace py = pybind11;

namespace pcm {
namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

std::vector<float> floats(const Array<float>& values) { return {values.data(), values.data() + values.size()}; }

PackedLinear pack(Decoder& decoder, int format, int out, int in, const Array<uint8_t>& rows) {
  const auto kind = static_cast<Format>(format);
  if (rows.ndim() != 2 || rows.shape(0) != out || rows.shape(1) != PackedLinear::row_bytes(kind, in)) {
    throw std::invalid_argument("weights: the bytes do not have the shape");
  }
  py::gil_scoped_release release;
  return PackedLinear(kind, out, in, rows.data(), decoder.arena());
}

DecoderLayer& layer_of(Decoder& decoder, int layer) {
  if (layer < 0 || layer >= decoder.shape().layers) throw std::out_of_range("layer");
  return decoder.layer(layer);
}

void set_norm(Decoder& decoder, int layer, const std::string& name, const Array<float>& values) {
  if (name == "final") {
    decoder.final_norm = floats(values);
  } else if (name == "input") {
    layer_of(decoder, layer).input_norm = floats(values);
  } else if (name == "post") {
    layer_of(decoder, layer).post_norm = floats(values);
  } else if (name == "q") {
    layer_of(decoder, layer).q_norm = floats(values);
  } else if (name == "k") {
    layer_of(decoder, layer).k_norm = floats(values);
  } else {
    throw std::invalid_argument("norm: " + name);
  }
}

// Returns the number of the adapter. sites: (layer, site, A [rank, in], scaled B transposed [rank, out]); the head's
// layer is the number of layers.
int add_adapter(Decoder& decoder, const std::vector<std::tuple<int, int, Array<float>, Array<float>>>& sites) {
  auto adapter = std::make_unique<LoraAdapter>();
  const int layers = decoder.shape().layers;
  adapter->sites.resize(static_cast<size_t>(layers) * kSites + 1);
  for (const auto& [layer, site, a, b] : sites) {
    const PackedLinear& base = layer < layers         ? layer_of(decoder, layer).weights[site]
                               : decoder.head.empty() ? decoder.embedding
                                                      : decoder.head;
    if (a.shape(1) != base.in() || b.shape(1) != base.out() || a.shape(0) != b.shape(0)) {
      throw std::invalid_argument("adapter: factors do not fit the base");
    }
    adapter->sites.at(static_cast<size_t>(layer) * kSites + site) =
        LoraSite(static_cast<int>(a.shape(0)), base.in(), base.out(), a.data(), b.data(), decoder.arena());
  }
  decoder.adapters.push_back(std::move(adapter));
  return static_cast<int>(decoder.adapters.size()) - 1;
}

py::dict profile(const Decoder& decoder) {
  static const char* const names[] = {"embedding",
                                      "norms, adapters in",
                                      "query, key, value",
                                      "rotary, cache",
                                      "attention",
                                      "output",
                                      "gate, up",
                                      "down",
                                      "head"};
  py::dict seconds;
  for (size_t i = 0; i < decoder.seconds().size(); ++i) seconds[names[i]] = decoder.seconds()[i];
  return seconds;
}

}  // namespace

void bind_decoder(py::module_& m) {
  py::class_<ThreadPool, std::shared_ptr<ThreadPool>>(m, "ThreadPool")
      .def(py::init<int>(), py::arg("threads"))
      .def_property_readonly("size", &ThreadPool::size);
  py::class_<Decoder>(m, "Decoder")
      .def(py::init([](const std::string& isa, std::shared_ptr<ThreadPool> pool, int layers, int hidden,
                       int intermediate, int heads, int kv_heads, int head_dim, int vocabulary, float norm_eps,
                       std::vector<int> windows) {
             return new Decoder(
                 select_isa(isa), std::move(pool),
                 {layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, norm_eps, std::move(windows)});
           }),
           py::arg("isa"), py::arg("pool"), py::arg("layers"), py::arg("hidden"), py::arg("intermediate"),
           py::arg("heads"), py::arg("kv_heads"), py::arg("head_dim"), py::arg("vocabulary"), py::arg("norm_eps"),
           py::arg("windows"))
      .def("set_linear",
           [](Decoder& decoder, int layer, int site, int format, int out, int in, const Array<uint8_t>& rows) {
             if (site < 0 || site >= kSites) throw std::out_of_range("site");
             layer_of(decoder, layer).weights[site] = pack(decoder, format, out, in, rows);
           })
      .def("set_bias", [](Decoder& decoder, int layer, int site,
                          const Array<float>& bias) { layer_of(decoder, layer).biases[site] = floats(bias); })
      .def("set_norm", &set_norm)
      .def("set_embedding",
           [](Decoder& decoder, int format, const Array<uint8_t>& rows) {
             decoder.embedding = pack(decoder, format, decoder.shape().vocabulary, decoder.shape().hidden, rows);
           })
      .def("set_head",
           [](Decoder& decoder, int format, const Array<uint8_t>& rows) {
             decoder.head = pack(decoder, format, decoder.shape().vocabulary, decoder.shape().hidden, rows);
           })
      .def("set_rope",
           [](Decoder& decoder, const Array<float>& cos, const Array<float>& sin) {
             decoder.rope_cos = floats(cos);
             decoder.rope_sin = floats(sin);
           })
      .def("add_adapter", &add_adapter)
      .def_readwrite("int8_activations", &Decoder::int8_activations)
      .def("profile", &profile)
      .def_property_readonly("num_bytes", &Decoder::bytes);
}

}  // namespace pcm
