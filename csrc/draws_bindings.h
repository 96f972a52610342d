// The arrays that describe the draws of many rows, as Python hands them over.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <optional>

#include "cpu/mix_sample.h"

namespace pcm {

template <class T>
using Array = pybind11::array_t<T, pybind11::array::c_style | pybind11::array::forcecast>;

// One value for all rows, or one a row.
template <class T>
T at(const Array<T>& values, int64_t row) {
  return values.data()[values.size() == 1 ? 0 : row];
}

struct Draws {
  Array<bool> greedy;
  Array<float> temperature;
  Array<int64_t> top_k;
  Array<double> top_p, min_p;
  Array<uint64_t> seed;
  std::optional<Array<uint64_t>> sequence;  // default: the index of the row
  Array<uint64_t> position;
  Array<int64_t> tokens;
  Array<float> logprobs;

  SampleParams params(int64_t b) const {
    const uint64_t row = sequence ? at(*sequence, b) : static_cast<uint64_t>(b);
    return {at(greedy, b), at(temperature, b), at(top_k, b), at(top_p, b),
            at(min_p, b),  at(seed, b),        row,          at(position, b)};
  }
};

}  // namespace pcm
