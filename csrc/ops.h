// Every statistics operation of the CPU backend, one line each; gradstats/reference.py defines
// them.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

namespace gradstats {

using at::IntArrayRef;
using at::Tensor;

// dw, db, w_sq_norm, b_sq_norm, w_m2, b_m2; what was not asked for has shape (0,).
using LinearStats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
// dx, then as LinearStats.
using NormStats = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

namespace cpu {

class GradNorms;

// `dw_sq_norm`, if asked for: |dw|^2, where it came with the product.
LinearStats linear_stats(const Tensor& x, const Tensor& g, bool weight, bool bias, bool moments,
                         std::optional<double>* dw_sq_norm = nullptr);

NormStats layer_norm_stats(const Tensor& g, const Tensor& x, const std::optional<Tensor>& mean,
                           const Tensor& rstd, const std::optional<Tensor>& scale, bool input,
                           bool weight, bool bias, bool moments);

NormStats group_norm_stats(const Tensor& g, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                           const std::optional<Tensor>& scale, bool input, bool weight, bool bias,
                           bool moments);

std::tuple<Tensor, Tensor, Tensor> embedding_stats(const Tensor& ids, const Tensor& g,
                                                   int64_t num_embeddings, int64_t padding_idx,
                                                   bool moments);

LinearStats conv_stats(const Tensor& x, const Tensor& g, IntArrayRef kernel_size,
                       IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                       int64_t groups, bool weight, bool bias, bool moments);

Tensor multi_sq_norm(const std::vector<Tensor>& tensors);

// Of a step in which every parameter, of these sizes, got a gradient, from its `rows` (P, N + 1) of
// squared norms and counts: square · norms (P, N), which were delivered as they should be (P,),
// grad_square · |p.grad|² (P,), and of those delivered the sums (N,), their mean, and the sum of
// the gradients'. Nothing where a gradient is missing or is of a kind that is not for here.
// Gradients whose norms are `known` are not read again.
using StepSums = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
std::optional<StepSums> step_sums(const Tensor& rows, const std::vector<Tensor>& params,
                                  const std::vector<int64_t>& sizes, double square,
                                  double grad_square, const GradNorms* known = nullptr);

}  // namespace cpu
}  // namespace gradstats
