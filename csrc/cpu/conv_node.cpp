// A convolution as an autograd function of C++: that of gradstats/rules/conv.py, without Python in
// its backward.
#include "conv_node.h"

#include <ATen/ATen.h>

#include <utility>

namespace gradstats::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct ConvNode : torch::autograd::Function<ConvNode> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& row_w,
                        const std::optional<Tensor>& m2_w, const std::optional<Tensor>& row_b,
                        const std::optional<Tensor>& m2_b, const std::vector<int64_t>& stride,
                        const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                        int64_t groups) {
    ctx->save_for_backward({x, *weight});
    ctx->saved_data["given"] = Given::pack({&weight, &bias, &row_w, &m2_w, &row_b, &m2_b});
    ctx->saved_data["stride"] = stride;
    ctx->saved_data["padding"] = padding;
    ctx->saved_data["dilation"] = dilation;
    ctx->saved_data["groups"] = groups;
    const at::AutoDispatchBelowADInplaceOrView below;
    const std::vector<int64_t> none(stride.size(), 0);
    return at::convolution(x, *weight, bias, stride, padding, dilation, /*transposed=*/false,
                           /*output_padding=*/none, groups);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list results;
    {
      const at::AutoGradMode off(false);
      results = gradients(ctx, grads[0]);
    }
    return once(grads[0], "convolution", std::move(results));
  }

 private:
  static variable_list gradients(AutogradContext* ctx, const Tensor& g) {
    const Given given(*ctx, ctx->saved_data["given"].toInt());
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const auto stride = ctx->saved_data["stride"].toIntVector();
    const auto padding = ctx->saved_data["padding"].toIntVector();
    const auto dilation = ctx->saved_data["dilation"].toIntVector();
    const int64_t groups = ctx->saved_data["groups"].toInt();
    variable_list results(kInputs + 4);  // and nothing for what is no tensor
    if (given.wants(kX)) {
      const std::vector<int64_t> none(stride.size(), 0);
      results[kX] = std::get<0>(at::convolution_backward(
          g, x, weight, at::OptionalIntArrayRef(), stride, padding, dilation, /*transposed=*/false,
          /*output_padding=*/none, groups, {true, false, false}));
    }
    const bool of_weight = given.wants(kWeight), of_bias = given.wants(kBias);
    if (!of_weight && !of_bias) return results;
    const auto compute = [&](const auto& stats) {
      return stats(x, g, weight.sizes().slice(2), stride, padding, dilation, groups, of_weight,
                   of_bias, given.moments());
    };
    const auto [dw, db, w_sq, b_sq, w_m2, b_m2] =
        route().here ? compute(conv_stats) : compute(route().conv);
    put(results, given, kWeight, weight.sizes(), dw, w_sq, w_m2);
    put(results, given, kBias, weight.sizes().slice(0, 1), db, b_sq, b_m2);
    return results;
  }
};

}  // namespace

Tensor conv(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
            const ConvOptions& options, const Probe& of_weight, const Probe& of_bias) {
  return ConvNode::apply(x, std::optional<Tensor>(weight), bias, of_weight.row, of_weight.m2,
                         of_bias.row, of_bias.m2, options.stride, options.padding, options.dilation,
                         options.groups);
}

}  // namespace gradstats::cpu
