// Plain nn.Conv1d, nn.Conv2d and nn.Conv3d inside a pass; see shortcuts.cpp.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <utility>
#include <vector>

#include "cpu/conv_node.h"
#include "layer_shortcut.h"

namespace gradstats {

class ConvShortcut : public LayerShortcut<ConvShortcut> {
 public:
  using LayerShortcut::LayerShortcut;

  static constexpr auto run = &cpu::conv;

  // Where it pads with a given number of zeros, if at all.
  static std::optional<cpu::ConvOptions> options(PyObject* module, const cpu::LayerCall& call) {
    const int64_t spatial = call.weight.dim() - 2;
    PyObject* const mode = own(module, names().padding_mode);
    if (spatial < 1 || call.x.dim() != spatial + 2 || mode == nullptr || !PyUnicode_Check(mode) ||
        PyUnicode_CompareWithASCIIString(mode, "zeros") != 0) {
      return std::nullopt;
    }
    auto stride = sizes(own(module, names().stride), spatial);
    auto padding = sizes(own(module, names().padding), spatial);
    auto dilation = sizes(own(module, names().dilation), spatial);
    const auto groups = whole(own(module, names().groups));
    if (!stride || !padding || !dilation || !groups) return std::nullopt;
    return cpu::ConvOptions{std::move(*stride), std::move(*padding), std::move(*dilation), *groups};
  }

 private:
  // A tuple of that many numbers.
  static std::optional<std::vector<int64_t>> sizes(PyObject* tuple, int64_t count) {
    if (tuple == nullptr || !PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != count) {
      return std::nullopt;
    }
    std::vector<int64_t> values(count);
    for (int64_t i = 0; i < count; ++i) {
      const auto value = whole(PyTuple_GET_ITEM(tuple, i));
      if (!value.has_value()) return std::nullopt;
      values[i] = *value;
    }
    return values;
  }
};

}  // namespace gradstats
