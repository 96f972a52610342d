// The Python module pcm_fast._cuda. Arguments arrive checked by pcm_fast/backends/cuda_kv.py: addresses in device
// memory, sizes, strides and a stream, all of them integers. Importing it needs no driver.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "kv_ops.h"

namespace py = pybind11;

namespace {

using namespace pcm;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Heads = std::tuple<uintptr_t, int32_t, int64_t, int64_t>;                    // see NewHeads
using Cache = std::tuple<uintptr_t, int32_t, int64_t, int64_t, int64_t, int64_t>;  // see LayerCache
using Pool = std::tuple<uintptr_t, int64_t, int64_t, int64_t, int32_t>;            // see BlockPool
using Tables = std::tuple<uintptr_t, int32_t, int32_t, int64_t>;                   // see BlockTables

NewHeads heads_of(const Heads& from) {
  const auto& [data, dtype, token_stride, head_stride] = from;
  return {at<void>(data), static_cast<DeviceDtype>(dtype), token_stride, head_stride};
}

LayerCache cache_of(const Cache& from) {
  const auto& [data, dtype, block_stride, head_stride, slot_stride, item_stride] = from;
  return {at<void>(data), static_cast<DeviceDtype>(dtype), block_stride, head_stride, slot_stride, item_stride};
}

BlockPool pool_of(const Pool& from) {
  const auto& [data, part_bytes, part_stride, block_stride, parts] = from;
  return {at<void>(data), part_bytes, part_stride, block_stride, parts};
}

BlockTables tables_of(const Tables& from) {
  const auto& [data, rows, width, stride] = from;
  return {at<int32_t>(data), rows, width, stride};
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "The device side of the KV cache (csrc/cuda/kv_ops.h). Use it through pcm_fast.backends.cuda_kv.";
  m.attr("device_type") = device_type();
  m.def("architectures", &architectures, "Compute capabilities that the kernels were compiled for, like 80 and 90.");

  using Release = py::call_guard<py::gil_scoped_release>;
  m.def(
      "store_kv",
      [](const Heads& keys, const Heads& values, uintptr_t slots, std::tuple<int32_t, int32_t, int32_t, int32_t> shape,
         const Cache& key_cache, const Cache& value_cache, uintptr_t stream) {
        const auto& [tokens, heads, head_dim, block_size] = shape;
        store_kv(heads_of(keys), heads_of(values), at<int64_t>(slots), {tokens, heads, head_dim, block_size},
                 cache_of(key_cache), cache_of(value_cache), at<void>(stream));
      },
      Release());
  m.def(
      "copy_blocks",
      [](const Pool& pool, uintptr_t moves, int32_t count, uintptr_t stream) {
        copy_blocks(pool_of(pool), at<int64_t>(moves), count, at<void>(stream));
      },
      Release());
  m.def(
      "gather_blocks",
      [](const Pool& pool, uintptr_t moves, int32_t count, const Tables& tables, uintptr_t stream) {
        gather_blocks(pool_of(pool), at<int64_t>(moves), count, tables_of(tables), at<void>(stream));
      },
      Release());
  m.def(
      "advance",
      [](int32_t sequences, int32_t rows, int32_t stop_width, uintptr_t drawn, uintptr_t stop_tokens, uintptr_t state,
         uintptr_t draw_positions, uintptr_t sequence_of, uintptr_t capacities, uintptr_t input_ids,
         uintptr_t positions, uintptr_t slots, uintptr_t lengths, uintptr_t going, const Tables& tables,
         int32_t block_size, uintptr_t stream) {
        const StepBuffers step{sequences,
                               rows,
                               stop_width,
                               at<int64_t>(drawn),
                               at<int64_t>(stop_tokens),
                               at<int32_t>(state),
                               at<int64_t>(draw_positions),
                               at<int32_t>(sequence_of),
                               at<int32_t>(capacities),
                               at<int64_t>(input_ids),
                               at<int64_t>(positions),
                               at<int64_t>(slots),
                               at<int32_t>(lengths),
                               at<int32_t>(going)};
        advance(step, tables_of(tables), block_size, at<void>(stream));
      },
      Release());
}
