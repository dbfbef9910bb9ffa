// A LayerNorm whose backward delivers statistics.
#pragma once

#include <optional>

#include "layer_node.h"

namespace gradstats::cpu {

// As at::layer_norm, over the last dimensions of x (B, …, *shape).
Tensor layer_norm(const Tensor& x, IntArrayRef shape, const Tensor& weight,
                  const std::optional<Tensor>& bias, double eps, const Probe& of_weight,
                  const Probe& of_bias);

}  // namespace gradstats::cpu
