// pcm_fast._native.MixtureStep. Arguments arrive checked by pcm_fast/backends/native_runner.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "bindings.h"
#include "cpu/mixture_step.h"
#include "draws_bindings.h"

namespace py = pybind11;

namespace pcm {
namespace {

using Ints = Array<int32_t>;
using Floats = Array<float>;

void check(bool fine, const char* what) {
  if (!fine) throw std::invalid_argument(std::string("mixture_step: ") + what);
}

// decoder, KV storage, tokens, rows, positions, adapters [n], block_tables [rows, blocks], wanted [m].
using Pass = std::tuple<Decoder*, KvStorage*, Ints, Ints, Ints, Ints, Ints, Ints>;

StepPass pass_of(const Pass& pass) {
  const auto& [decoder, kv, tokens, rows, positions, adapters, tables, wanted] = pass;
  const auto count = static_cast<int>(tokens.size());
  check(count > 0 && rows.size() == count && positions.size() == count && adapters.size() == count, "lengths differ");
  check(tables.ndim() == 2 && kv->shape().block_size == kKvBlock, "block tables");
  check(!decoder->rope_cos.empty(), "no rotary factors");
  return {decoder,
          kv,
          {count, tokens.data(), rows.data(), positions.data(), adapters.data(), tables.data(), tables.shape(1)},
          wanted.data(),
          static_cast<int>(wanted.size())};
}

// See pcm_fast/_native.pyi. Returns the status of each sequence; 0 is fine.
std::vector<int> run(MixtureStep& step, const std::vector<Pass>& given, const Ints& hidden, Floats weights,
                     const Ints& pcm, const std::optional<std::pair<Floats, Floats>>& head, const Ints& head_rows,
                     const Ints& merge, const Floats& exponent, const Array<bool>& combine, const Array<bool>& report,
                     Draws draws, Floats expert_logprobs, std::vector<std::optional<Floats>> logits) {
  const auto count = static_cast<size_t>(merge.size());
  check(hidden.ndim() == 3 && hidden.shape(2) == 2, "hidden: expected [S, K, 2]");
  const auto most = static_cast<int>(hidden.shape(1));
  check(most <= kMaxExperts && logits.size() == count, "too many experts, or logits");
  std::vector<StepPass> passes;
  for (const Pass& pass : given) passes.push_back(pass_of(pass));
  std::vector<StepSequence> sequences(count);
  for (size_t s = 0; s < count; ++s) {
    StepSequence& sequence = sequences[s];
    const int32_t* refs = hidden.data() + s * most * 2;
    while (sequence.experts < most && refs[2 * sequence.experts] >= 0) {
      const int i = sequence.experts++;
      sequence.hidden[i] = {refs[2 * i], refs[2 * i + 1]};
      sequence.weights[i] = weights.data()[s * most + i];
    }
    sequence.pcm = {pcm.data()[2 * s], pcm.data()[2 * s + 1]};
    if (sequence.pcm.pass >= 0) {
      check(head.has_value(), "no head");
      const int64_t width = head->first.shape(1);
      check(width == passes.at(sequence.pcm.pass).decoder->shape().hidden, "the head does not fit its model");
      for (int i = 0; i < sequence.experts; ++i) {
        const int32_t row = head_rows.data()[s * most + i];
        sequence.head[i] = head->first.data() + row * width;
        sequence.bias[i] = head->second.data()[row];
      }
    }
    sequence.merge = static_cast<Merge>(merge.data()[s]);
    sequence.exponent = exponent.data()[s];
    sequence.combine = combine.data()[s];
    sequence.report_experts = report.data()[s];
    if (logits[s]) sequence.logits = logits[s]->mutable_data();
    sequence.params = draws.params(static_cast<int64_t>(s));
  }
  {
    py::gil_scoped_release release;
    step.run(passes, sequences);
  }
  std::vector<int> statuses;
  for (size_t s = 0; s < count; ++s) {
    const StepSequence& sequence = sequences[s];
    statuses.push_back(static_cast<int>(sequence.status));
    std::copy_n(sequence.weights, sequence.experts, weights.mutable_data() + s * most);
    if (sequence.logits != nullptr) continue;
    draws.tokens.mutable_data()[s] = sequence.token;
    draws.logprobs.mutable_data()[s] = sequence.logprob;
    std::copy_n(sequence.expert_logprobs, sequence.experts, expert_logprobs.mutable_data() + s * most);
  }
  return statuses;
}

}  // namespace

void bind_mixture_step(py::module_& m) {
  py::class_<MixtureStep>(m, "MixtureStep")
      .def(py::init<std::shared_ptr<MixSampler>>(), py::arg("sampler"))
      .def("run", &run)
      .def_property_readonly("seconds", &MixtureStep::seconds);
}

}  // namespace pcm
