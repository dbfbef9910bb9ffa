// A linear layer as an autograd function of C++: that of gradstats/rules/linear.py, without Python
// in its backward.
#include "linear_node.h"

#include <ATen/ATen.h>

#include <utility>

namespace gradstats::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// (B, T, features) of any rank.
Tensor three(const Tensor& t) { return t.dim() == 2 ? t.unsqueeze(1) : t.flatten(1, -2); }

struct LinearNode : LayerNode<LinearNode, LinearDeliveries> {
  static constexpr const char* kLayer = "linear";

  static Tensor run(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                    const std::optional<Tensor>& bias, const LinearDeliveries&) {
    ctx->save_for_backward({x, weight});
    return at::linear(x, weight, bias);
  }

  static void gradients(AutogradContext* ctx, const Tensor& g, const LinearDeliveries& rows,
                        const Wanted& wanted, variable_list& results) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    if (wanted[kX]) results[kX] = at::matmul(g, weight);
    const bool of_weight = wanted[kWeight], of_bias = wanted[kBias];
    if (!of_weight && !of_bias) return;
    const Tensor xs = three(x), gs = three(g);
    std::optional<double> dw_sq_norm;
    auto [dw, db, w_sq, b_sq, w_m2, b_m2] =
        route().here ? linear_stats(xs, gs, of_weight, of_bias, wanted.moments(), &dw_sq_norm)
                     : route().linear(xs, gs, of_weight, of_bias, wanted.moments());
    const auto use = reinterpret_cast<intptr_t>(ctx);
    if (of_weight) {
      results[kWeight] = dw;
      if (dw_sq_norm.has_value() && rows.keeping.norms != nullptr) {
        rows.keeping.norms->keep(rows.keeping.row, dw, *dw_sq_norm);
      }
      if (wanted[kRowOfWeight]) results[kRowOfWeight] = rows.weight(use, w_sq, gs, xs);
      if (wanted[kM2OfWeight]) results[kM2OfWeight] = w_m2;
    }
    if (of_bias) {
      results[kBias] = db;
      if (wanted[kRowOfBias]) results[kRowOfBias] = rows.bias(use, b_sq, gs, {});
      if (wanted[kM2OfBias]) results[kM2OfBias] = b_m2;
    }
  }
};

}  // namespace

Tensor linear(const LayerCall& call, LinearDeliveries deliveries) {
  return LinearNode::of(call, std::move(deliveries));
}

}  // namespace gradstats::cpu
