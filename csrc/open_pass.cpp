#include "open_pass.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>

#include "cpu/layer_node.h"

namespace gradstats {

bool Shortcuts::watched(int64_t modes) {
  return c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
         c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         at::impl::PythonTorchFunctionTLS::stack_len() != modes ||
         at::impl::PythonTorchFunctionTLS::get_disabled_state() !=
             at::impl::TorchFunctionDisabledState::ENABLED;
}

bool Shortcuts::open() const {
  if (pass_.is_none() || PyList_GET_SIZE(observers_.ptr()) != 0) return false;
  return own(interposer_, names().current) == pass_.ptr() &&
         own(interposer_, names().suspended) == Py_False &&
         own(interposer_, names().recorder) == Py_None &&
         own(pass_.ptr(), names().groups) == Py_None && c10::GradMode::is_enabled() &&
         !at::autocast::is_autocast_enabled(at::kCPU) && !watched(1);
}

bool Shortcuts::is_settled(const py::str& path) const {
  PyObject* const settled = own(interposer_, names().settled);
  PyObject* const fallbacks = own(interposer_, names().fallbacks);
  return settled != nullptr && fallbacks != nullptr && PySet_Contains(settled, path.ptr()) == 1 &&
         PyDict_Contains(fallbacks, path.ptr()) == 0;
}

bool Shortcuts::may_begin(const py::object& input) const {
  if (!is_plain(input.ptr()) || PyList_GET_SIZE(observers_.ptr()) != 0) return false;
  const at::Tensor& x = THPVariable_Unpack(input.ptr());
  PyObject* const passes = own(interposer_, names().passes);
  PyObject* const ledger = own(interposer_, names().ledger);
  return own(interposer_, names().current) == Py_None &&
         own(interposer_, names().recorder) == Py_None &&
         own(interposer_, names().suspended) == Py_False &&
         own(interposer_, names().enabled) == Py_True &&
         own(interposer_, names().groups) == Py_None &&
         own(interposer_, names().counted) == Py_None && passes != nullptr &&
         PyList_GET_SIZE(passes) == 0 && ledger != nullptr &&
         own(ledger, names().between) == Py_None && x.dim() > 0 && x.size(0) > 0 && x.is_cpu() &&
         !x.is_inference() && cpu::route().here && c10::GradMode::is_enabled() &&
         torch::autograd::get_current_graph_task_id() == -1 && !watched(0);
}

Shortcuts::Begun::Begun(Shortcuts& of, const py::object& input, int64_t batch,
                        const py::object& leaf)
    : of_(of) {
  const auto set = [](PyObject* on, PyObject* name, const py::object& value) {
    if (PyObject_SetAttr(on, name, value.ptr()) != 0) throw py::error_already_set();
  };
  const auto found = py::reinterpret_borrow<py::tuple>(leaf);
  const py::tuple rows = found[1];
  pass_ = of_.pass_of_(batch, found[0], rows);
  const at::IntArrayRef others = THPVariable_Unpack(input.ptr()).sizes().slice(1);
  const bool square = std::find(others.begin(), others.end(), batch) != others.end();
  set(pass_.ptr(), names().inputs, py::make_tuple(input));
  set(pass_.ptr(), names().square, py::bool_(square));
  py::list passes = py::reinterpret_borrow<py::list>(own(of_.interposer_, names().passes));
  py::list stack = py::reinterpret_borrow<py::list>(own(of_.interposer_, names().stack));
  py::dict uses = py::reinterpret_borrow<py::dict>(own(pass_.ptr(), names().uses));
  PyList_SetSlice(stack.ptr(), 0, PyList_GET_SIZE(stack.ptr()), nullptr);
  set(of_.interposer_, names().batch, py::int_(batch));
  of_.begin(pass_, rows, batch, uses, stack);
  passes.append(pass_);
  set(of_.interposer_, names().current, pass_);
}

Shortcuts::Begun::~Begun() {
  of_.end();
  const py::tuple nothing;
  if (PyObject_SetAttr(pass_.ptr(), names().inputs, nothing.ptr()) != 0 ||
      PyObject_SetAttr(of_.interposer_, names().current, Py_None) != 0) {
    PyErr_WriteUnraisable(of_.interposer_);
  }
}

py::object Shortcuts::take_leaf(int64_t entries) const {
  for (const auto& [leaf, rows] : leaves_) {
    const at::Tensor& known = THPVariable_Unpack(leaf.ptr());
    if (known.size(1) != entries || known.grad().defined()) continue;
    const at::Tensor& row = THPVariable_Unpack(PyTuple_GET_ITEM(rows.ptr(), 0));
    // Every row holds its node; so does the edge here, and so does every graph that uses a row.
    const auto edge = torch::autograd::impl::gradient_edge(row);
    if (edge.function.use_count() == known.size(0) + 1) return py::make_tuple(leaf, rows);
  }
  return py::none();
}

void Shortcuts::keep_leaf(py::object leaf, py::tuple rows) {
  if (PyTuple_GET_SIZE(rows.ptr()) == 0) return;
  if (leaves_.size() == kLeaves) leaves_.erase(leaves_.begin());
  leaves_.emplace_back(std::move(leaf), std::move(rows));
}

const at::Tensor* Place::in(PyObject* parameters, PyObject* key) const {
  PyObject* const object = PyDict_GetItem(parameters, key);
  if (object == nullptr || !THPVariable_CheckExact(object)) return nullptr;
  if (own(object, names().mark) != mark.ptr()) return nullptr;
  const at::Tensor& t = THPVariable_Unpack(object);
  const bool plain = t.requires_grad() && t.is_leaf() && t.is_cpu() && t.layout() == at::kStrided;
  return plain ? &t : nullptr;
}

}  // namespace gradstats
