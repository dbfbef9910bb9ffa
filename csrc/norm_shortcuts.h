// Plain nn.LayerNorm and nn.GroupNorm inside a pass; see shortcuts.cpp.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <utility>

#include "cpu/group_norm_node.h"
#include "cpu/layer_norm_node.h"
#include "layer_shortcut.h"

namespace gradstats {

class LayerNormShortcut : Layer {
 public:
  using Layer::Layer;

  py::object operator()(const py::object& module, const py::object&,
                        const py::object& input) const {
    const auto found = call(module, input);
    if (!found.has_value()) return not_taken();
    PyObject* const shape = own(module.ptr(), names().normalized_shape);
    PyObject* const eps = own(module.ptr(), names().eps);
    const at::IntArrayRef sizes = found->weight.sizes();
    const auto last = static_cast<int64_t>(sizes.size());
    if (!same(shape, sizes) || eps == nullptr || !PyFloat_Check(eps) || found->x.dim() <= last ||
        found->x.sizes().slice(found->x.dim() - last) != sizes) {
      return not_taken();
    }
    const auto [of_weight, of_bias] = noted();
    at::Tensor out;
    {
      const double added = PyFloat_AS_DOUBLE(eps);
      const py::gil_scoped_release released;
      out = cpu::layer_norm(found->x, sizes, found->weight, found->bias, added, of_weight, of_bias);
    }
    return wrap(std::move(out));
  }

 private:
  // Whether a module's `normalized_shape` is that of its weight.
  static bool same(PyObject* shape, at::IntArrayRef sizes) {
    if (shape == nullptr || !PyTuple_Check(shape) ||
        PyTuple_GET_SIZE(shape) != static_cast<Py_ssize_t>(sizes.size())) {
      return false;
    }
    for (size_t i = 0; i < sizes.size(); ++i) {
      PyObject* const size = PyTuple_GET_ITEM(shape, i);
      if (!PyLong_Check(size) || PyLong_AsLongLong(size) != sizes[i]) return false;
    }
    return true;
  }
};

class GroupNormShortcut : Layer {
 public:
  using Layer::Layer;

  py::object operator()(const py::object& module, const py::object&,
                        const py::object& input) const {
    const auto found = call(module, input);
    if (!found.has_value()) return not_taken();
    const std::optional<int64_t> groups = whole(own(module.ptr(), names().num_groups));
    PyObject* const eps = own(module.ptr(), names().eps);
    const at::Tensor &x = found->x, &weight = found->weight;
    if (!groups.has_value() || *groups < 1 || eps == nullptr || !PyFloat_Check(eps) ||
        weight.dim() != 1 || weight.numel() == 0 || x.size(1) != weight.numel() ||
        x.size(1) % *groups != 0) {
      return not_taken();
    }
    const auto [of_weight, of_bias] = noted();
    at::Tensor out;
    {
      const double added = PyFloat_AS_DOUBLE(eps);
      const py::gil_scoped_release released;
      out = cpu::group_norm(x, *groups, weight, found->bias, added, of_weight, of_bias);
    }
    return wrap(std::move(out));
  }
};

}  // namespace gradstats
