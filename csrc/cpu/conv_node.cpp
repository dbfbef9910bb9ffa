// A convolution as an autograd function of C++: that of gradstats/rules/conv.py, without Python in
// its backward.
#include "conv_node.h"

#include <ATen/ATen.h>

#include <utility>

namespace gradstats::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct ConvNode : LayerNode<ConvNode, ConvOptions> {
  static constexpr const char* kLayer = "convolution";

  static Tensor run(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                    const std::optional<Tensor>& bias, const ConvOptions& options) {
    ctx->save_for_backward({x, weight});
    const auto& [stride, padding, dilation, groups] = options;
    const std::vector<int64_t> none(stride.size(), 0);
    return at::convolution(x, weight, bias, stride, padding, dilation, /*transposed=*/false,
                           /*output_padding=*/none, groups);
  }

  static void gradients(AutogradContext* ctx, const Tensor& g, const ConvOptions& options,
                        const Wanted& wanted, variable_list& results) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const auto& [stride, padding, dilation, groups] = options;
    if (wanted[kX]) {
      const std::vector<int64_t> none(stride.size(), 0);
      results[kX] = std::get<0>(at::convolution_backward(
          g, x, weight, at::OptionalIntArrayRef(), stride, padding, dilation, /*transposed=*/false,
          /*output_padding=*/none, groups, {true, false, false}));
    }
    if (!wanted[kWeight] && !wanted[kBias]) return;
    const auto compute = [&](const auto& stats) {
      return stats(x, g, weight.sizes().slice(2), options.stride, options.padding, options.dilation,
                   options.groups, wanted[kWeight], wanted[kBias], wanted.moments());
    };
    const auto [dw, db, w_sq, b_sq, w_m2, b_m2] =
        route().here ? compute(conv_stats) : compute(route().conv);
    put(results, wanted, kWeight, weight.sizes(), dw, w_sq, w_m2);
    put(results, wanted, kBias, weight.sizes().slice(0, 1), db, b_sq, b_m2);
  }
};

}  // namespace

Tensor conv(const LayerCall& call, ConvOptions options) {
  return ConvNode::of(call, std::move(options));
}

}  // namespace gradstats::cpu
