// The Python faces of KvCacheManager and KvStorage: shapes, dtypes and ranges are checked here.
//
// The GIL is held during calls of the manager: they take well under a microsecond, and it is what keeps a manager that
// is not thread-safe whole.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "kv_cache.h"
#include "kv_moves.h"
#include "kv_storage.h"

namespace py = pybind11;

namespace pcm {
namespace {

struct OutOfBlocks : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct OutOfRows : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Int32Array = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

[[noreturn]] void bad_argument(const std::string& name, const std::string& expected, const std::string& got) {
  throw py::value_error(name + ": expected " + expected + ", got " + got);
}

std::string describe(const py::array& array) {
  return py::str(array.dtype()).cast<std::string>() + " " + py::str(array.attr("shape")).cast<std::string>();
}

// Any one-dimensional array-like of integers that fit into int32.
Int32Array int32_array(const char* name, const py::object& values) {
  const py::array array = py::array::ensure(values);
  if (!array) {
    PyErr_Clear();
    bad_argument(name, "a list or array of integers", py::str(py::type::of(values)).cast<std::string>());
  }
  if (array.ndim() != 1 || (array.size() > 0 && array.dtype().kind() != 'i' && array.dtype().kind() != 'u')) {
    bad_argument(name, "one-dimensional integers", describe(array));
  }
  if (array.size() > 0 && (array.itemsize() > 4 || (array.itemsize() == 4 && array.dtype().kind() == 'u'))) {
    const auto low = array.attr("min")().cast<py::int_>(), high = array.attr("max")().cast<py::int_>();
    if (low < py::int_(std::numeric_limits<int32_t>::min()) || high > py::int_(std::numeric_limits<int32_t>::max())) {
      bad_argument(name, "int32 values", py::str(low).cast<std::string>() + " to " + py::str(high).cast<std::string>());
    }
  }
  if (array.size() > std::numeric_limits<int32_t>::max()) bad_argument(name, "fewer values", describe(array));
  return Int32Array(array);
}

int32_t size_of(const Int32Array& array) { return static_cast<int32_t>(array.size()); }

RowId row_or_throw(const KvCacheManager& manager, std::optional<RowId> row) {
  if (row) return *row;
  throw OutOfRows("all " + std::to_string(manager.config().max_rows) + " rows are in use");
}

std::vector<std::pair<int32_t, int32_t>> pairs(const std::vector<KvBlockCopy>& copies) {
  std::vector<std::pair<int32_t, int32_t>> list;
  for (const KvBlockCopy& copy : copies) list.emplace_back(copy.src, copy.dst);
  return list;
}

std::vector<std::pair<int32_t, int32_t>> append_slots(KvCacheManager& manager, const RowId* rows, const int32_t* counts,
                                                      int32_t num_rows) {
  if (!manager.append_slots(rows, counts, num_rows)) {
    throw OutOfBlocks("the slots asked for need more than the " + std::to_string(manager.num_free()) +
                      " blocks not in use (of " + std::to_string(manager.config().num_blocks) + ")");
  }
  return pairs(manager.copies());
}

// A read-only array over the manager's own memory, which it keeps alive.
py::array view(const int32_t* data, std::vector<py::ssize_t> shape, const py::object& owner) {
  py::array_t<int32_t> array(std::move(shape), data, owner);
  array.attr("flags").attr("writeable") = false;
  return array;
}

py::dict to_dict(const KvCacheStats& stats) {
  using namespace pybind11::literals;
  return py::dict("used"_a = stats.used, "cached"_a = stats.cached, "free"_a = stats.free, "rows"_a = stats.rows,
                  "prompt_tokens"_a = stats.prompt_tokens, "reused_tokens"_a = stats.reused_tokens,
                  "hits"_a = stats.hits, "misses"_a = stats.misses, "evictions"_a = stats.evictions,
                  "copies"_a = stats.copies, "refusals"_a = stats.refusals);
}

KvDtype parse_dtype(const std::string& name) {
  if (name == "float32") return KvDtype::kFloat32;
  if (name == "bfloat16") return KvDtype::kBFloat16;
  bad_argument("dtype", "'float32' or 'bfloat16'", "'" + name + "'");
}

const char* dtype_name(const KvStorage& storage) {
  return storage.shape().dtype == KvDtype::kFloat32 ? "float32" : "bfloat16";
}

void check_index(const char* name, int64_t index, int64_t size) {
  if (index < 0 || index >= size) bad_argument(name, "0 to " + std::to_string(size - 1), std::to_string(index));
}

void check_span(const KvStorage& storage, int32_t layer, const Int32Array& block_table, int64_t start, int64_t count) {
  const KvStorageShape& shape = storage.shape();
  check_index("layer", layer, shape.num_layers);
  const int64_t capacity = static_cast<int64_t>(block_table.size()) * shape.block_size;
  if (start < 0 || count < 0 || start + count > capacity) {
    bad_argument("start, count", "a span in the " + std::to_string(capacity) + " slots of block_table",
                 std::to_string(start) + ", " + std::to_string(count));
  }
  for (int64_t i = start / shape.block_size; i * shape.block_size < start + count; ++i) {
    check_index("block_table", block_table.at(i), shape.num_blocks);
  }
}

void check_heads(const char* name, const KvStorage& storage, const FloatArray& array) {
  const KvStorageShape& shape = storage.shape();
  if (array.ndim() != 3 || array.shape(1) != shape.num_kv_heads || array.shape(2) != shape.head_dim) {
    bad_argument(name,
                 "[count, " + std::to_string(shape.num_kv_heads) + ", " + std::to_string(shape.head_dim) + "] float32",
                 describe(array));
  }
}

void bind_manager(py::module_& m) {
  py::class_<KvCacheManager>(m, "KvCacheManager",
                             "Which block of the KV cache holds which token of which row (csrc/kv_cache.h).")
      .def(py::init([](int32_t num_blocks, int32_t max_rows, int32_t max_blocks_per_row, int32_t block_size,
                       uint64_t hash_mask) {
             return std::make_unique<KvCacheManager>(
                 KvCacheConfig{num_blocks, block_size, max_rows, max_blocks_per_row, hash_mask});
           }),
           py::kw_only(), py::arg("num_blocks"), py::arg("max_rows"), py::arg("max_blocks_per_row"),
           py::arg("block_size") = KvCacheConfig().block_size, py::arg("hash_mask") = KvCacheConfig().hash_mask)
      .def(
          "match_prefix",
          [](const KvCacheManager& self, uint64_t namespace_id, const py::object& prompt) {
            const Int32Array tokens = int32_array("prompt", prompt);
            const KvPrefixMatch match = self.match_prefix(namespace_id, tokens.data(), size_of(tokens));
            return py::make_tuple(match.tokens, match.idle_blocks);
          },
          py::arg("namespace_id"), py::arg("prompt"),
          "-> (tokens of the prompt that are cached, blocks of them that no row holds now). Takes nothing.")
      .def(
          "create_row",
          [](KvCacheManager& self, uint64_t namespace_id, const py::object& prompt) {
            const Int32Array tokens = int32_array("prompt", prompt);
            return row_or_throw(self, self.create_row(namespace_id, tokens.data(), size_of(tokens)));
          },
          py::arg("namespace_id"), py::arg("prompt"),
          "-> id of a row that starts with the longest cached prefix of the prompt; length(row) tokens of it need not "
          "be computed, always fewer than the prompt has. Raises OutOfRows.")
      .def(
          "fork", [](KvCacheManager& self, RowId row) { return row_or_throw(self, self.fork(row)); }, py::arg("row"),
          "-> id of a row that shares all blocks of this one. Raises OutOfRows.")
      .def(
          "append_slots",
          [](KvCacheManager& self, RowId row, int32_t count) { return append_slots(self, &row, &count, 1); },
          py::arg("row"), py::arg("count"))
      .def(
          "append_slots",
          [](KvCacheManager& self, const py::object& rows, const py::object& counts) {
            const Int32Array ids = int32_array("rows", rows), numbers = int32_array("counts", counts);
            if (ids.size() != numbers.size()) bad_argument("counts", "as many as rows", std::to_string(numbers.size()));
            return append_slots(self, ids.data(), numbers.data(), size_of(ids));
          },
          py::arg("rows"), py::arg("counts"),
          "Reserves slots for all rows or for none -> [(src, dst)], the blocks to copy before anything is written. "
          "Raises OutOfBlocks with nothing changed.")
      .def(
          "commit",
          [](KvCacheManager& self, RowId row, const py::object& tokens) {
            const Int32Array ids = int32_array("tokens", tokens);
            self.commit(row, ids.data(), size_of(ids));
          },
          py::arg("row"), py::arg("tokens"), "The next reserved slots now hold the keys and values of these tokens.")
      .def("truncate", &KvCacheManager::truncate, py::arg("row"), py::arg("length"))
      .def("free", &KvCacheManager::free, py::arg("row"))
      .def(
          "defragment", [](KvCacheManager& self) { return pairs(self.defragment()); },
          "Content into the blocks at the front -> [(src, dst)], the blocks to copy before anything is written.")
      .def("blocks_needed", &KvCacheManager::blocks_needed, py::arg("row"), py::arg("count"))
      .def("num_free", &KvCacheManager::num_free, "Blocks that no row holds, cached ones included.")
      .def("length", &KvCacheManager::length, py::arg("row"))
      .def("committed", &KvCacheManager::committed, py::arg("row"))
      .def("refcount", &KvCacheManager::refcount, py::arg("block"))
      .def("stats", [](const KvCacheManager& self) { return to_dict(self.stats()); })
      .def("check", &KvCacheManager::check, "Recounts everything; raises RuntimeError naming what is wrong.")
      .def(
          "block_table",
          [](const py::object& self, RowId row) {
            const auto& manager = self.cast<const KvCacheManager&>();
            return view(manager.block_table(row), {manager.num_blocks(row)}, self);
          },
          py::arg("row"), "The row's blocks: int32, read-only, a view of block_tables.")
      .def_property_readonly(
          "block_tables",
          [](const py::object& self) {
            const auto& manager = self.cast<const KvCacheManager&>();
            return view(manager.block_tables(), {manager.config().max_rows, manager.config().max_blocks_per_row}, self);
          },
          "[max_rows, max_blocks_per_row] int32, read-only; its address never changes.")
      .def_property_readonly(
          "lengths",
          [](const py::object& self) {
            const auto& manager = self.cast<const KvCacheManager&>();
            return view(manager.lengths(), {manager.config().max_rows}, self);
          },
          "[max_rows] int32, read-only; its address never changes.")
      .def_property_readonly("num_blocks", [](const KvCacheManager& self) { return self.config().num_blocks; })
      .def_property_readonly("block_size", [](const KvCacheManager& self) { return self.config().block_size; })
      .def_property_readonly("max_rows", [](const KvCacheManager& self) { return self.config().max_rows; })
      .def_property_readonly("max_blocks_per_row",
                             [](const KvCacheManager& self) { return self.config().max_blocks_per_row; });
}

void bind_storage(py::module_& m) {
  py::class_<KvStorage>(m, "KvStorage", "Keys and values of every layer on the CPU (csrc/kv_storage.h).")
      .def(py::init([](int32_t num_layers, int32_t num_blocks, int32_t num_kv_heads, int32_t head_dim,
                       int32_t block_size, const std::string& dtype) {
             return std::make_unique<KvStorage>(
                 KvStorageShape{num_layers, num_blocks, num_kv_heads, block_size, head_dim, parse_dtype(dtype)});
           }),
           py::kw_only(), py::arg("num_layers"), py::arg("num_blocks"), py::arg("num_kv_heads"), py::arg("head_dim"),
           py::arg("block_size") = KvCacheConfig().block_size, py::arg("dtype") = "float32")
      .def(
          "write",
          [](KvStorage& self, int32_t layer, const py::object& block_table, int32_t start, const FloatArray& keys,
             const FloatArray& values) {
            const Int32Array table = int32_array("block_table", block_table);
            check_heads("keys", self, keys);
            check_heads("values", self, values);
            if (keys.shape(0) != values.shape(0)) bad_argument("values", "as many tokens as keys", describe(values));
            check_span(self, layer, table, start, keys.shape(0));
            self.write(layer, table.data(), start, static_cast<int32_t>(keys.shape(0)), keys.data(), values.data(),
                       static_cast<size_t>(self.shape().num_kv_heads) * self.shape().head_dim);
          },
          py::arg("layer"), py::arg("block_table"), py::arg("start"), py::arg("keys"), py::arg("values"),
          "Writes tokens from position `start` of a row on. keys, values: [count, num_kv_heads, head_dim] float32.")
      .def(
          "read",
          [](const KvStorage& self, int32_t layer, const py::object& block_table, int32_t start, int32_t count) {
            const Int32Array table = int32_array("block_table", block_table);
            check_span(self, layer, table, start, count);
            const std::vector<py::ssize_t> shape{count, self.shape().num_kv_heads, self.shape().head_dim};
            py::array_t<float> keys(shape), values(shape);
            self.read(layer, table.data(), start, count, keys.mutable_data(), values.mutable_data(),
                      static_cast<size_t>(self.shape().num_kv_heads) * self.shape().head_dim);
            return py::make_tuple(keys, values);
          },
          py::arg("layer"), py::arg("block_table"), py::arg("start"), py::arg("count"),
          "-> keys, values: [count, num_kv_heads, head_dim] float32.")
      .def(
          "copy_block",
          [](KvStorage& self, int32_t src, int32_t dst) {
            check_index("src", src, self.shape().num_blocks);
            check_index("dst", dst, self.shape().num_blocks);
            if (src == dst) bad_argument("dst", "another block than src", std::to_string(dst));
            py::gil_scoped_release release;
            self.copy_block(src, dst);
          },
          py::arg("src"), py::arg("dst"), "Copies a block in all layers.")
      .def_property_readonly(
          "array",
          [](const py::object& owner) -> py::array {
            auto& self = owner.cast<KvStorage&>();
            const KvStorageShape& shape = self.shape();
            const std::vector<py::ssize_t> sizes{shape.num_blocks,   shape.num_layers, 2,
                                                 shape.num_kv_heads, shape.block_size, shape.head_dim};
            if (shape.dtype == KvDtype::kFloat32) {
              return py::array_t<float>(sizes, static_cast<float*>(self.data()), owner);
            }
            return py::array_t<uint16_t>(sizes, static_cast<uint16_t*>(self.data()), owner);
          },
          "[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim], float32, or uint16 holding bfloat16: the "
          "memory itself.")
      .def_property_readonly("dtype", &dtype_name)
      .def_property_readonly("num_bytes", &KvStorage::num_bytes);
}

}  // namespace

void bind_kv_cache(py::module_& m) {
  py::register_exception<OutOfBlocks>(m, "OutOfBlocks", PyExc_RuntimeError).attr("__doc__") =
      "Not enough blocks for append_slots; nothing was changed. Wait, or free a row and recompute it later.";
  py::register_exception<OutOfRows>(m, "OutOfRows", PyExc_RuntimeError).attr("__doc__") =
      "max_rows rows are in use; nothing was changed.";
  bind_manager(m);
  bind_storage(m);
  m.def(
      "ordered_moves",
      [](const std::vector<std::pair<int32_t, int32_t>>& moves, int32_t spare) {
        std::vector<KvBlockCopy> given;
        for (const auto& [src, dst] : moves) given.push_back({src, dst});
        return pairs(ordered_moves(given, spare));
      },
      py::arg("moves"), py::arg("spare") = kNoBlock,
      "Moves of blocks (src, dst), meant as if all at the same time -> the same as moves that can be made one after "
      "the "
      "other, by way of the block `spare` where blocks change places in a circle.");
}

}  // namespace pcm
