// Normalisations as autograd functions of C++: those of gradstats/rules/norm.py, without Python in
// their backward, which takes as long as the arithmetic of a short batch.
#include "norm_nodes.h"

#include <ATen/ATen.h>

#include <array>
#include <tuple>

#include "../checks.h"

namespace gradstats::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Shape = std::array<int64_t, 3>;

// Saves what a backward needs, and returns the first of `normed`: the result, then the means and
// inverse deviations of that many parts of x, which lie one after the other.
Tensor keep(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
            std::tuple<Tensor, Tensor, Tensor> normed, double eps) {
  auto [out, mean, rstd] = std::move(normed);
  const auto wide = stats_dtype(x.scalar_type());
  if (mean.scalar_type() != wide) {  // a pure bfloat16 layer rounds them; the statistics do not
    const int64_t parts = mean.numel(), size = parts == 0 ? 0 : x.numel() / parts;
    const Tensor rows = x.to(wide).reshape({parts, size});
    const auto [var, means] = at::var_mean(rows, {-1}, /*correction=*/0);
    rstd = at::rsqrt(var + eps).reshape(mean.sizes());
    mean = means.reshape(mean.sizes());
  }
  ctx->save_for_backward({x, weight, mean, rstd});
  return out;
}

// Puts what `stats` makes of a backward into its results.
template <typename Stats>
void put_all(variable_list& results, const Wanted& wanted, const Stats& stats, const Tensor& g,
             const Tensor& x, const Shape& shape, const Tensor& mean, const Tensor& rstd,
             const Tensor& weight) {
  const auto [dx, dw, db, w_sq, b_sq, w_m2, b_m2] =
      stats(g.reshape(shape), x.reshape(shape), mean, rstd, weight.flatten(), wanted[kX],
            wanted[kWeight], wanted[kBias], wanted.moments());
  if (wanted[kX]) results[kX] = dx.reshape(x.sizes());
  put(results, wanted, kWeight, weight.sizes(), dw, w_sq, w_m2);
  put(results, wanted, kBias, weight.sizes(), db, b_sq, b_m2);
}

struct LayerNormNode : LayerNode<LayerNormNode, double> {
  static constexpr const char* kLayer = "LayerNorm";

  static Tensor run(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                    const std::optional<Tensor>& bias, double eps) {
    return keep(ctx, x, weight, at::native_layer_norm(x, weight.sizes(), weight, bias, eps), eps);
  }

  static void gradients(AutogradContext* ctx, const Tensor& g, double, const Wanted& wanted,
                        variable_list& results) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const Tensor mean = saved[2].flatten(1), rstd = saved[3].flatten(1);
    const Shape rows{x.size(0), mean.size(1), weight.numel()};
    const auto with = [&](const auto& stats) {
      put_all(results, wanted, stats, g, x, rows, mean, rstd, weight);
    };
    route().here ? with(layer_norm_stats) : with(route().layer_norm);
  }
};

struct GroupNormNode : LayerNode<GroupNormNode, GroupNormOptions> {
  static constexpr const char* kLayer = "GroupNorm";

  static Tensor run(AutogradContext* ctx, const Tensor& input, const Tensor& weight,
                    const std::optional<Tensor>& bias, const GroupNormOptions& options) {
    const Tensor x = input.contiguous();
    const auto [batch, channels, positions] = flat(x);
    return keep(ctx, x, weight,
                at::native_group_norm(x, weight, bias, batch, channels, positions, options.groups,
                                      options.eps),
                options.eps);
  }

  static void gradients(AutogradContext* ctx, const Tensor& g, const GroupNormOptions&,
                        const Wanted& wanted, variable_list& results) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const auto with = [&](const auto& stats) {
      put_all(results, wanted, stats, g, x, flat(x), saved[2], saved[3], weight);
    };
    route().here ? with(group_norm_stats) : with(route().group_norm);
  }

 private:
  static Shape flat(const Tensor& x) {
    return {x.size(0), x.size(1), c10::multiply_integers(x.sizes().slice(2))};
  }
};

}  // namespace

Tensor layer_norm(const LayerCall& call, double eps) { return LayerNormNode::of(call, eps); }

Tensor group_norm(const LayerCall& call, GroupNormOptions options) {
  return GroupNormNode::of(call, options);
}

}  // namespace gradstats::cpu
