// A linear layer as an autograd function of C++: that of gradstats/rules/linear.py, without Python
// in its backward.
#include "linear_node.h"

#include <ATen/ATen.h>

namespace gradstats::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// (B, T, features) of any rank.
Tensor three(const Tensor& t) { return t.dim() == 2 ? t.unsqueeze(1) : t.flatten(1, -2); }

// What a node remembers beside its tensors, in one place: each name is looked up in the backward.
struct Deliveries : torch::CustomClassHolder {
  RowOf weight, bias;
  Keeping keeping;
  int64_t given = 0;
  Deliveries(RowOf w, RowOf b, Keeping k)
      : weight(std::move(w)), bias(std::move(b)), keeping(std::move(k)) {}
};

struct Linear : torch::autograd::Function<Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& row_w,
                        const std::optional<Tensor>& m2_w, const std::optional<Tensor>& row_b,
                        const std::optional<Tensor>& m2_b,
                        const c10::intrusive_ptr<Deliveries>& deliveries) {
    ctx->save_for_backward({x, *weight});
    deliveries->given = Given::pack({&weight, &bias, &row_w, &m2_w, &row_b, &m2_b});
    ctx->saved_data["deliveries"] = c10::IValue::make_capsule(deliveries);
    const at::AutoDispatchBelowADInplaceOrView below;  // a result in place of a view of one
    return at::linear(x, *weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results;
    {
      const at::AutoGradMode off(false);
      results = gradients(ctx, grads[0]);
    }
    return once(grads[0], "linear", std::move(results));
  }

 private:
  static variable_list gradients(AutogradContext* ctx, const Tensor& g) {
    const auto to = ctx->saved_data["deliveries"].toCapsule();
    const auto& rows = static_cast<const Deliveries&>(*to);
    const Given given(*ctx, rows.given);
    const auto wants = [&](Input i) { return given.wants(i); };
    variable_list results(kInputs + 1);  // and nothing for what is no tensor
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    if (wants(kX)) results[kX] = at::matmul(g, weight);
    const bool of_weight = wants(kWeight), of_bias = wants(kBias);
    if (!of_weight && !of_bias) return results;
    const Tensor xs = three(x), gs = three(g);
    const bool moments = wants(kM2OfWeight) || wants(kM2OfBias);
    std::optional<double> dw_sq_norm;
    auto [dw, db, w_sq, b_sq, w_m2, b_m2] =
        route().here ? linear_stats(xs, gs, of_weight, of_bias, moments, &dw_sq_norm)
                     : route().linear(xs, gs, of_weight, of_bias, moments);
    const auto use = reinterpret_cast<intptr_t>(ctx);
    if (of_weight) {
      results[kWeight] = dw;
      if (dw_sq_norm.has_value() && rows.keeping.norms != nullptr) {
        rows.keeping.norms->keep(rows.keeping.row, dw, *dw_sq_norm);
      }
      if (wants(kRowOfWeight)) results[kRowOfWeight] = rows.weight(use, w_sq, gs, xs);
      if (wants(kM2OfWeight)) results[kM2OfWeight] = w_m2;
    }
    if (of_bias) {
      results[kBias] = db;
      if (wants(kRowOfBias)) results[kRowOfBias] = rows.bias(use, b_sq, gs, {});
      if (wants(kM2OfBias)) results[kM2OfBias] = b_m2;
    }
    return results;
  }
};

}  // namespace

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
              const Probe& of_weight, const Probe& of_bias, RowOf row_of_weight, RowOf row_of_bias,
              Keeping keeping) {
  return Linear::apply(x, std::optional<Tensor>(weight), bias, of_weight.row, of_weight.m2,
                       of_bias.row, of_bias.m2,
                       c10::make_intrusive<Deliveries>(std::move(row_of_weight),
                                                       std::move(row_of_bias), std::move(keeping)));
}

}  // namespace gradstats::cpu
