// pcm_fast._native.MixSampler. Arguments arrive checked by pcm_fast/ops.py: addresses, shapes and strides are trusted
// here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "bindings.h"
#include "cpu/isa_select.h"
#include "cpu/mix_sample.h"
#include "draws_bindings.h"

namespace py = pybind11;

namespace pcm {
namespace {

// A [B, K, V] or [B, V] array somewhere in memory; strides in elements.
struct View {
  uintptr_t address;
  int dtype;
  std::vector<int64_t> shape, strides;

  RowView row(int64_t batch, int64_t expert) const {
    const int64_t width = dtype == static_cast<int>(DType::kFloat32) ? 4 : 2;
    const int64_t offset = batch * strides[0] + (shape.size() == 3 ? expert * strides[1] : 0);
    return {reinterpret_cast<const char*>(address) + offset * width, strides.back(), static_cast<DType>(dtype)};
  }
};

// Status of each row; 0 is fine.
std::vector<int> run_rows(MixSampler& sampler, std::vector<MixSampleRow>& rows, Draws* draws) {
  {
    py::gil_scoped_release release;
    sampler.run(rows.data(), static_cast<int64_t>(rows.size()));
  }
  std::vector<int> statuses;
  for (size_t b = 0; b < rows.size(); ++b) {
    statuses.push_back(static_cast<int>(rows[b].status));
    if (draws == nullptr) continue;
    draws->tokens.mutable_data()[b] = rows[b].token;
    draws->logprobs.mutable_data()[b] = rows[b].logprob;
  }
  return statuses;
}

std::vector<int> mix_sample(MixSampler& sampler, const View& logits, Array<float> weights, int merge, float exponent,
                            std::optional<Draws> draws, std::optional<Array<float>> log_probs,
                            std::optional<Array<float>> expert_logprobs) {
  const int64_t batch = logits.shape[0], experts = logits.shape[1], vocabulary = logits.shape[2];
  std::vector<MixSampleRow> rows(batch);
  for (int64_t b = 0; b < batch; ++b) {
    MixSampleRow& row = rows[b];
    row.experts = static_cast<int>(experts);
    row.vocabulary = vocabulary;
    row.merge = static_cast<Merge>(merge);
    row.exponent = exponent;
    for (int64_t i = 0; i < experts; ++i) {
      row.logits[i] = logits.row(b, i);
      row.weights[i] = weights.data()[b * experts + i];
    }
    row.draw = draws.has_value();
    if (draws) row.params = draws->params(b);
    if (log_probs) row.log_probs = log_probs->mutable_data() + b * vocabulary;
    if (expert_logprobs) row.expert_logprobs = expert_logprobs->mutable_data() + b * experts;
  }
  return run_rows(sampler, rows, draws ? &*draws : nullptr);
}

std::vector<int> sample(MixSampler& sampler, const View& log_p, Draws draws) {
  std::vector<MixSampleRow> rows(log_p.shape[0]);
  for (size_t b = 0; b < rows.size(); ++b) {
    rows[b].vocabulary = log_p.shape[1];
    rows[b].log_p = log_p.row(static_cast<int64_t>(b), 0);
    rows[b].params = draws.params(static_cast<int64_t>(b));
  }
  return run_rows(sampler, rows, &draws);
}

}  // namespace

void bind_mix_sample(py::module_& m) {
  m.def("isas", [] {
    std::vector<std::string> names;
    for (const Isa* isa : available_isas()) names.emplace_back(isa->name);
    return names;
  });
  m.attr("MAX_EXPERTS") = kMaxExperts;
  m.attr("MAX_VOCABULARY") = kMaxVocabulary;
  py::class_<View>(m, "View").def(py::init<uintptr_t, int, std::vector<int64_t>, std::vector<int64_t>>(),
                                  py::arg("address"), py::arg("dtype"), py::arg("shape"), py::arg("strides"));
  py::class_<Draws>(m, "Draws")
      .def(py::init<Array<bool>, Array<float>, Array<int64_t>, Array<double>, Array<double>, Array<uint64_t>,
                    std::optional<Array<uint64_t>>, Array<uint64_t>, Array<int64_t>, Array<float>>());
  py::class_<MixSampler, std::shared_ptr<MixSampler>>(m, "MixSampler")
      .def(py::init([](const std::string& isa, std::shared_ptr<ThreadPool> pool) {
             return new MixSampler(select_isa(isa), std::move(pool));
           }),
           py::arg("isa"), py::arg("pool"))
      .def_property_readonly("isa", [](const MixSampler& sampler) { return sampler.isa().name; })
      .def_property_readonly("threads", &MixSampler::threads)
      .def("mix_sample", &mix_sample)
      .def("sample", &sample);
}

}  // namespace pcm
