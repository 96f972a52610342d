// pcm_fast._native.GraphStore: a GraphStore whose functions and graphs are Python's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "bindings.h"
#include "graph_store.h"

namespace py = pybind11;

namespace pcm {
namespace {

// `capture` and `launch` are often methods of whoever owns the store, so the garbage collector has to see them.
struct PythonGraphStore {
  py::object capture, launch;
  GraphStore store;

  PythonGraphStore(py::object capture_, py::object launch_, std::vector<int32_t> buckets, int64_t budget_bytes)
      : capture(callable("capture", std::move(capture_))),
        launch(callable("launch", std::move(launch_))),
        store({[this](int32_t bucket, int32_t draft) { return captured(capture(bucket, draft)); },
               [this](void* graph) { launch(*static_cast<py::object*>(graph)); }},
              std::move(buckets), budget_bytes) {}

  static py::object callable(const char* name, py::object object) {
    if (PyCallable_Check(object.ptr())) return object;
    throw py::type_error(std::string(name) + ": expected a callable, got " + type_of(object));
  }

  static CapturedGraph captured(const py::object& result) {
    if (!py::isinstance<py::tuple>(result) || py::len(result) != 2 || !py::isinstance<py::int_>(result[py::int_(1)])) {
      throw py::type_error("capture: expected to be given (graph, bytes), got " + type_of(result));
    }
    const auto bytes = result[py::int_(1)].cast<int64_t>();
    auto* graph = new py::object(result[py::int_(0)]);
    return {std::shared_ptr<void>(graph, [](void* object) { delete static_cast<py::object*>(object); }), bytes};
  }

  static std::string type_of(const py::object& object) {
    return py::str(py::type::of(object).attr("__name__")).cast<std::string>();
  }
};

// The collector may come while __init__ runs, or after it failed.
bool is_constructed(PyObject* object) {
  return reinterpret_cast<py::detail::instance*>(object)->get_value_and_holder().holder_constructed();
}

void collect_garbage(PyHeapTypeObject* heap_type) {
  PyTypeObject* type = &heap_type->ht_type;
  type->tp_flags |= Py_TPFLAGS_HAVE_GC;
  type->tp_traverse = [](PyObject* object, visitproc visit, void* arg) -> int {
    Py_VISIT(Py_TYPE(object));
    if (!is_constructed(object)) return 0;
    const auto& self = py::cast<const PythonGraphStore&>(py::handle(object));
    Py_VISIT(self.capture.ptr());
    Py_VISIT(self.launch.ptr());
    return 0;
  };
  type->tp_clear = [](PyObject* object) -> int {
    if (!is_constructed(object)) return 0;
    auto& self = py::cast<PythonGraphStore&>(py::handle(object));
    self.capture = self.launch = py::none();
    return 0;
  };
}

}  // namespace

void bind_graph_store(py::module_& m) {
  py::class_<PythonGraphStore>(m, "GraphStore", "Captured decode steps, kept for replay (csrc/graph_store.h).",
                               py::custom_type_setup(collect_garbage))
      .def(py::init<py::object, py::object, std::vector<int32_t>, int64_t>(), py::arg("capture"), py::arg("launch"),
           py::arg("buckets"), py::arg("budget_bytes"),
           "capture(batch_bucket, draft) -> (graph, bytes of device memory it holds); launch(graph). A graph is any "
           "object, dropped when it is evicted.")
      .def(
          "bucket", [](const PythonGraphStore& self, int32_t batch) { return self.store.bucket(batch); },
          py::arg("batch"), "The smallest bucket >= batch. Raises ValueError if there is none.")
      .def(
          "run", [](PythonGraphStore& self, int32_t batch, int32_t draft) { return self.store.run(batch, draft); },
          py::arg("batch"), py::arg("draft") = 0,
          "Launches the graph of (bucket(batch), draft). True: it was there. False: it was captured first, and those "
          "not run for the longest time gave way to it. Raises ValueError, with the store as it was, if it is larger "
          "than the budget.")
      .def("stats",
           [](const PythonGraphStore& self) {
             using namespace pybind11::literals;
             const GraphStoreStats stats = self.store.stats();
             return py::dict("graphs"_a = stats.graphs, "bytes"_a = stats.bytes, "captures"_a = stats.captures,
                             "replays"_a = stats.replays, "evictions"_a = stats.evictions);
           })
      .def("clear", [](PythonGraphStore& self) { self.store.clear(); }, "Drops all graphs; none may be running.");
}

}  // namespace pcm
