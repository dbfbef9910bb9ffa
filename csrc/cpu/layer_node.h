// What the autograd functions of measured layers have in common.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <atomic>
#include <functional>
#include <optional>
#include <utility>

#include "../ops.h"

namespace gradstats::cpu {

// Where a parameter's statistics go: leaves whose gradients they become (gradstats/probes.py).
struct Probe {
  std::optional<Tensor> row, m2;
};

// A layer's tensors, x (B, …) first, and where its statistics go.
struct LayerCall {
  const Tensor &x, &weight;
  std::optional<Tensor> bias;
  Probe of_weight, of_bias;
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

// The inputs whose gradients the backward that runs wants.
class Wanted {
 public:
  // `others`: which inputs from the bias on were given; autograd does not count what is absent.
  using Others = std::array<bool, kInputs - kBias>;

  Wanted(const torch::autograd::AutogradContext& ctx, const Others& others)
      : wanted_{ctx.needs_input_grad(kX), ctx.needs_input_grad(kWeight)} {
    size_t next = kBias;
    for (size_t i = kBias; i < kInputs; ++i) {
      wanted_[i] = others[i - kBias] && ctx.needs_input_grad(next++);
    }
  }

  bool operator[](Input i) const { return wanted_[i]; }
  bool moments() const { return wanted_[kM2OfWeight] || wanted_[kM2OfBias]; }

 private:
  std::array<bool, kInputs> wanted_;
};

// Puts where they belong, as far as they are wanted: the gradient of the weight or bias, as that is
// shaped, and what its probe gets.
void put(torch::autograd::variable_list& results, const Wanted& wanted, Input parameter,
         IntArrayRef shape, const Tensor& grad, const Tensor& sq_norm, const Tensor& m2);

// The results of a backward, from `gradients()`: those of a function that is not differentiated
// twice, `layer`, which says so where somebody tries.
torch::autograd::variable_list once(const Tensor& grad, const char* layer,
                                    torch::autograd::variable_list results);

// A layer as an autograd function. A Node has its name in errors, `kLayer`, and
//   Tensor run(ctx, x, weight, bias, options), which saves what its backward needs,
//   void gradients(ctx, g, options, wanted, results), for g, the gradient of that.
template <typename Node, typename Options>
struct LayerNode : torch::autograd::Function<Node> {
  using Context = torch::autograd::AutogradContext;
  using Tensors = torch::autograd::variable_list;

  // What a node remembers beside its tensors, in one place: each name is looked up in the backward.
  struct Memory : torch::CustomClassHolder {
    explicit Memory(Options of) : options(std::move(of)) {}
    Options options;
    Wanted::Others given{};
  };

  static Tensor of(const LayerCall& call, Options options) {
    return Node::apply(call.x, call.weight, call.bias, call.of_weight.row, call.of_weight.m2,
                       call.of_bias.row, call.of_bias.m2,
                       c10::make_intrusive<Memory>(std::move(options)));
  }

  static Tensor forward(Context* ctx, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& row_w,
                        const std::optional<Tensor>& m2_w, const std::optional<Tensor>& row_b,
                        const std::optional<Tensor>& m2_b,
                        const c10::intrusive_ptr<Memory>& memory) {
    memory->given = {bias.has_value(), row_w.has_value(), m2_w.has_value(), row_b.has_value(),
                     m2_b.has_value()};
    ctx->saved_data["memory"] = c10::IValue::make_capsule(memory);
    const at::AutoDispatchBelowADInplaceOrView below;  // a result in place of a view of one
    return Node::run(ctx, x, weight, bias, memory->options);
  }

  static Tensors backward(Context* ctx, const Tensors& grads) {
    Tensors results(kInputs + 1);  // and nothing for the memory
    {
      const at::AutoGradMode off(false);
      const auto held = ctx->saved_data["memory"].toCapsule();
      const auto& memory = static_cast<const Memory&>(*held);
      Node::gradients(ctx, grads[0], memory.options, Wanted(*ctx, memory.given), results);
    }
    return once(grads[0], Node::kLayer, std::move(results));
  }
};

}  // namespace gradstats::cpu
