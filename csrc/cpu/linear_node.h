// A linear layer whose backward delivers statistics; csrc/host.cpp binds it for gradstats/rules.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "grad_norms.h"
#include "layer_node.h"

namespace gradstats::cpu {

// The gradient of a row, (B + 1,), from the node's number, the squared norms (B,) and the factors
// of the gradient, which other uses of the parameter may need: (B, T, O), and (B, T, I) or nothing.
using RowOf = std::function<Tensor(intptr_t, const Tensor&, const Tensor&, const Tensor&)>;

// Where the squared norm of the weight's gradient is kept, if it comes with the backward.
struct Keeping {
  std::shared_ptr<GradNorms> norms;
  size_t row = 0;
};

struct LinearDeliveries {
  RowOf weight, bias;
  Keeping keeping;
};

// y = x Wᵀ + b for x (B, …, I) of at least two dimensions.
Tensor linear(const LayerCall& call, LinearDeliveries deliveries);

}  // namespace gradstats::cpu
