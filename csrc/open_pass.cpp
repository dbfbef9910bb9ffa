#include "open_pass.h"

#include <ATen/FuncTorchTLS.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

namespace gradstats {

bool Shortcuts::watched() {
  return c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
         c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         at::impl::PythonTorchFunctionTLS::stack_len() != 1 ||
         at::impl::PythonTorchFunctionTLS::get_disabled_state() !=
             at::impl::TorchFunctionDisabledState::ENABLED;
}

bool Shortcuts::open() const {
  if (pass_.is_none() || PyList_GET_SIZE(observers_.ptr()) != 0) return false;
  return own(interposer_, names().current) == pass_.ptr() &&
         own(interposer_, names().suspended) == Py_False &&
         own(interposer_, names().recorder) == Py_None &&
         own(pass_.ptr(), names().groups) == Py_None && c10::GradMode::is_enabled() &&
         !at::autocast::is_autocast_enabled(at::kCPU) && !watched();
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
