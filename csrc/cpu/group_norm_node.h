// A GroupNorm whose backward delivers statistics.
#pragma once

#include <optional>

#include "layer_node.h"

namespace gradstats::cpu {

// As at::group_norm of x (B, C, …); the result is contiguous.
Tensor group_norm(const Tensor& x, int64_t groups, const Tensor& weight,
                  const std::optional<Tensor>& bias, double eps, const Probe& of_weight,
                  const Probe& of_bias);

}  // namespace gradstats::cpu
