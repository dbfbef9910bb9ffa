// A GroupNorm as an autograd function of C++: that of gradstats/rules/norm.py, without Python in
// its backward.
#include "group_norm_node.h"

#include <ATen/ATen.h>

#include <tuple>
#include <utility>

#include "../checks.h"

namespace gradstats::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct GroupNormNode : torch::autograd::Function<GroupNormNode> {
  static Tensor forward(AutogradContext* ctx, const Tensor& input,
                        const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& row_w, const std::optional<Tensor>& m2_w,
                        const std::optional<Tensor>& row_b, const std::optional<Tensor>& m2_b,
                        int64_t groups, double eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const Tensor x = input.contiguous();
    const int64_t batch = x.size(0), channels = x.size(1);
    const int64_t positions = batch == 0 ? 1 : x.numel() / (batch * channels);
    auto [out, mean, rstd] =
        at::native_group_norm(x, weight, bias, batch, channels, positions, groups, eps);
    const auto wide = stats_dtype(x.scalar_type());
    if (mean.scalar_type() != wide) {  // a pure bfloat16 layer rounds them; the statistics do not
      const Tensor grouped = x.to(wide).reshape({batch, groups, channels / groups * positions});
      Tensor var;
      std::tie(var, mean) = at::var_mean(grouped, {-1}, /*correction=*/0);
      rstd = at::rsqrt(var + eps);
    }
    ctx->save_for_backward({x, *weight, mean, rstd});
    ctx->saved_data["given"] = Given::pack({&weight, &bias, &row_w, &m2_w, &row_b, &m2_b});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results;
    {
      const at::AutoGradMode off(false);
      results = gradients(ctx, grads[0]);
    }
    return once(grads[0], "GroupNorm", std::move(results));
  }

 private:
  static variable_list gradients(AutogradContext* ctx, const Tensor& g) {
    const Given given(*ctx, ctx->saved_data["given"].toInt());
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const auto flat = [](const Tensor& t) {
      return t.reshape({t.size(0), t.size(1), t.size(0) == 0 ? 1 : -1});
    };
    const auto compute = [&](const auto& stats) {
      return stats(flat(g), flat(x), saved[2], saved[3], weight, given.wants(kX),
                   given.wants(kWeight), given.wants(kBias), given.moments());
    };
    const auto [dx, dw, db, w_sq, b_sq, w_m2, b_m2] =
        route().here ? compute(group_norm_stats) : compute(route().group_norm);
    variable_list results(kInputs + 2);  // and nothing for what is no tensor
    if (given.wants(kX)) results[kX] = dx.reshape(x.sizes());
    put(results, given, kWeight, weight.sizes(), dw, w_sq, w_m2);
    put(results, given, kBias, weight.sizes(), db, b_sq, b_m2);
    return results;
  }
};

}  // namespace

Tensor group_norm(const Tensor& x, int64_t groups, const Tensor& weight,
                  const std::optional<Tensor>& bias, double eps, const Probe& of_weight,
                  const Probe& of_bias) {
  return GroupNormNode::apply(x, std::optional<Tensor>(weight), bias, of_weight.row, of_weight.m2,
                              of_bias.row, of_bias.m2, groups, eps);
}

}  // namespace gradstats::cpu
