#include "layer_node.h"

#include <ATen/Dispatch.h>

#include <algorithm>

namespace gradstats::cpu {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// A result that cannot be differentiated.
struct Once : torch::autograd::Function<Once> {
  static Tensor forward(AutogradContext* ctx, const Tensor& result, const char* layer) {
    ctx->saved_data["layer"] = std::string(layer);
    return result.alias();
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK(
        false,
        "trying to differentiate twice a function that was marked with @once_differentiable: "
        "the backward of a ",
        ctx->saved_data["layer"].toStringRef(), " layer that is measured");
  }
};

}  // namespace

Route& route() {
  static Route only;
  return only;
}

Tensor row_gradient(const Tensor& sq_norm) {
  const int64_t samples = sq_norm.size(0);
  const Tensor from = sq_norm.contiguous();
  Tensor row = at::empty({samples + 1}, sq_norm.options());
  AT_DISPATCH_FLOATING_TYPES(row.scalar_type(), "row_gradient", [&] {
    auto* const to = row.mutable_data_ptr<scalar_t>();
    std::copy_n(from.const_data_ptr<scalar_t>(), samples, to);
    to[samples] = 1;
  });
  return row;
}

void put(variable_list& results, const Wanted& wanted, Input parameter, IntArrayRef shape,
         const Tensor& grad, const Tensor& sq_norm, const Tensor& m2) {
  const bool weight = parameter == kWeight;
  const Input row = weight ? kRowOfWeight : kRowOfBias, of_m2 = weight ? kM2OfWeight : kM2OfBias;
  const auto shaped = [&](const Tensor& t) { return t.sizes() == shape ? t : t.reshape(shape); };
  if (wanted[parameter]) results[parameter] = shaped(grad);
  if (wanted[row]) results[row] = row_gradient(sq_norm);
  if (wanted[of_m2]) results[of_m2] = shaped(m2);
}

variable_list once(const Tensor& grad, const char* layer, variable_list results) {
  if (!grad.requires_grad() || !at::GradMode::is_enabled()) return results;
  for (Tensor& t : results) {
    if (t.defined()) t = Once::apply(t.detach().requires_grad_(), layer);
  }
  return results;
}

}  // namespace gradstats::cpu
