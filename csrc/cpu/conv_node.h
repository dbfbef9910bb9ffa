// A convolution whose backward delivers statistics.
#pragma once

#include <optional>
#include <vector>

#include "layer_node.h"

namespace gradstats::cpu {

// What a convolution has beside its tensors, with one entry per spatial dimension.
struct ConvOptions {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
};

// x (B, I, *spatial) ⋆ weight (O, I / groups, *kernel).
Tensor conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const ConvOptions& options, const Probe& of_weight, const Probe& of_bias);

}  // namespace gradstats::cpu
