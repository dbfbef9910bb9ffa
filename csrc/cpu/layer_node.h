// What the autograd functions of measured layers have in common.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <atomic>
#include <functional>
#include <optional>

#include "../ops.h"

namespace gradstats::cpu {

// Where a parameter's statistics go: leaves whose gradients they become (gradstats/probes.py).
struct Probe {
  std::optional<Tensor> row, m2;
};

// The gradient of a row, (B + 1,): the squared norms (B,) and the count of this delivery.
Tensor row_gradient(const Tensor& sq_norm);

// Where a backend was asked for by name, it computes what a backward needs, through these.
struct Route {
  std::atomic<bool> here{true};
  // Set once, when the module is made.
  std::function<LinearStats(const Tensor&, const Tensor&, bool, bool, bool)> linear;
  std::function<NormStats(const Tensor&, const Tensor&, const std::optional<Tensor>&, const Tensor&,
                          const std::optional<Tensor>&, bool, bool, bool, bool)>
      layer_norm;
  std::function<NormStats(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const std::optional<Tensor>&, bool, bool, bool, bool)>
      group_norm;
  std::function<LinearStats(const Tensor&, const Tensor&, IntArrayRef, IntArrayRef, IntArrayRef,
                            IntArrayRef, int64_t, bool, bool, bool)>
      conv;
};
Route& route();

// The inputs of such a function, in this order.
enum Input : size_t {
  kX,
  kWeight,
  kBias,
  kRowOfWeight,
  kM2OfWeight,
  kRowOfBias,
  kM2OfBias,
  kInputs
};

// Which inputs a function was given: autograd does not count what is absent.
class Given {
 public:
  using Optional = const std::optional<Tensor>*;

  // Of all but x, which is always there.
  static int64_t pack(const std::array<Optional, kInputs - 1>& others) {
    int64_t packed = 0, number = 1;
    for (const Optional t : others) packed = packed * 8 + (t->has_value() ? number++ : 0);
    return packed;
  }

  Given(const torch::autograd::AutogradContext& ctx, int64_t packed) : ctx_(ctx) {
    for (size_t i = kInputs; i-- > 1; packed /= 8) numbers_[i] = packed % 8;
  }

  // Whether the backward that runs wants the gradient of an input.
  bool wants(Input i) const {
    return (i == kX || numbers_[i] > 0) && ctx_.needs_input_grad(numbers_[i]);
  }

  bool moments() const { return wants(kM2OfWeight) || wants(kM2OfBias); }

 private:
  const torch::autograd::AutogradContext& ctx_;
  std::array<int64_t, kInputs> numbers_{};
};

// Puts where they belong, as far as they are wanted: the gradient of the weight or bias, as that is
// shaped, and what its probe gets.
void put(torch::autograd::variable_list& results, const Given& given, Input parameter,
         IntArrayRef shape, const Tensor& grad, const Tensor& sq_norm, const Tensor& m2);

// The results of a backward, from `gradients()`: those of a function that is not differentiated
// twice, `layer`, which says so where somebody tries.
torch::autograd::variable_list once(const Tensor& grad, const char* layer,
                                    torch::autograd::variable_list results);

}  // namespace gradstats::cpu
