// LayerNorms and GroupNorms whose backward delivers statistics.
#pragma once

#include "layer_node.h"

namespace gradstats::cpu {

// As at::layer_norm, over the last dimensions of x (B, …, *shape), those of the weight.
Tensor layer_norm(const LayerCall& call, double eps);

struct GroupNormOptions {
  int64_t groups;
  double eps;
};

// As at::group_norm of x (B, C, …); the result is contiguous.
Tensor group_norm(const LayerCall& call, GroupNormOptions options);

}  // namespace gradstats::cpu
