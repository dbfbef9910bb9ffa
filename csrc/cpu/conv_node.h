// A convolution whose backward delivers statistics.
#pragma once

#include <vector>

#include "layer_node.h"

namespace gradstats::cpu {

// What a convolution has beside its tensors, with one entry per spatial dimension.
struct ConvOptions {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
};

// x (B, I, *spatial) ⋆ weight (O, I / groups, *kernel).
Tensor conv(const LayerCall& call, ConvOptions options);

}  // namespace gradstats::cpu
