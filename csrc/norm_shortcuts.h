// Plain nn.LayerNorm and nn.GroupNorm inside a pass; see shortcuts.cpp.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "cpu/norm_nodes.h"
#include "layer_shortcut.h"

namespace gradstats {

class LayerNormShortcut : public LayerShortcut<LayerNormShortcut> {
 public:
  using LayerShortcut::LayerShortcut;

  static constexpr auto run = &cpu::layer_norm;

  static std::optional<double> options(PyObject* module, const cpu::LayerCall& call) {
    const at::IntArrayRef shape = call.weight.sizes();
    const auto last = static_cast<int64_t>(shape.size());
    if (!same(own(module, names().normalized_shape), shape) || call.x.dim() <= last ||
        call.x.sizes().slice(call.x.dim() - last) != shape) {
      return std::nullopt;
    }
    return real(own(module, names().eps));
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

class GroupNormShortcut : public LayerShortcut<GroupNormShortcut> {
 public:
  using LayerShortcut::LayerShortcut;

  static constexpr auto run = &cpu::group_norm;

  static std::optional<cpu::GroupNormOptions> options(PyObject* module,
                                                      const cpu::LayerCall& call) {
    const auto groups = whole(own(module, names().num_groups));
    const auto eps = real(own(module, names().eps));
    const int64_t channels = call.x.size(1);
    if (!groups || !eps || *groups < 1 || channels == 0 || channels % *groups != 0 ||
        call.weight.dim() != 1 || call.weight.numel() != channels) {
      return std::nullopt;
    }
    return cpu::GroupNormOptions{*groups, *eps};
  }
};

}  // namespace gradstats
