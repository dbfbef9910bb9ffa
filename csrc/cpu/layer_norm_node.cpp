// A LayerNorm as an autograd function of C++: that of gradstats/rules/norm.py, without Python in
// its backward, which takes as long as the arithmetic of a short batch.
#include "layer_norm_node.h"

#include <ATen/ATen.h>

#include <utility>
#include <vector>

#include "../checks.h"

namespace gradstats::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LayerNormNode : torch::autograd::Function<LayerNormNode> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& row_w,
                        const std::optional<Tensor>& m2_w, const std::optional<Tensor>& row_b,
                        const std::optional<Tensor>& m2_b, const std::vector<int64_t>& shape,
                        double eps) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, mean, rstd] = at::native_layer_norm(x, shape, weight, bias, eps);
    const auto wide = stats_dtype(x.scalar_type());
    if (mean.scalar_type() != wide) {  // a pure bfloat16 layer rounds them; the statistics do not
      std::vector<int64_t> dims(shape.size());
      for (size_t i = 0; i < dims.size(); ++i) dims[i] = x.dim() - 1 - static_cast<int64_t>(i);
      Tensor var;
      std::tie(var, mean) = at::var_mean(x.to(wide), dims, /*correction=*/0, /*keepdim=*/true);
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
    return once(grads[0], "LayerNorm", std::move(results));
  }

 private:
  static variable_list gradients(AutogradContext* ctx, const Tensor& g) {
    const Given given(*ctx, ctx->saved_data["given"].toInt());
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const int64_t batch = x.size(0), width = weight.numel();
    const int64_t positions = batch == 0 ? 1 : x.numel() / (batch * width);
    const auto rows = [&](const Tensor& t) { return t.reshape({batch, positions, width}); };
    const auto one = [&](const Tensor& t) { return t.reshape({batch, positions}); };
    const auto compute = [&](const auto& stats) {
      return stats(rows(g), rows(x), one(saved[2]), one(saved[3]), weight.reshape(-1),
                   given.wants(kX), given.wants(kWeight), given.wants(kBias), given.moments());
    };
    const auto [dx, dw, db, w_sq, b_sq, w_m2, b_m2] =
        route().here ? compute(layer_norm_stats) : compute(route().layer_norm);
    variable_list results(kInputs + 2);  // and nothing for what is no tensor
    if (given.wants(kX)) results[kX] = dx.reshape(x.sizes());
    put(results, given, kWeight, weight.sizes(), dw, w_sq, w_m2);
    put(results, given, kBias, weight.sizes(), db, b_sq, b_m2);
    return results;
  }
};

}  // namespace

Tensor layer_norm(const Tensor& x, IntArrayRef shape, const Tensor& weight,
                  const std::optional<Tensor>& bias, double eps, const Probe& of_weight,
                  const Probe& of_bias) {
  return LayerNormNode::apply(x, std::optional<Tensor>(weight), bias, of_weight.row, of_weight.m2,
                              of_bias.row, of_bias.m2, shape.vec(), eps);
}

}  // namespace gradstats::cpu
