// The CUDA launchers as Python functions of the extension: checks, device, stream, launch errors.
// Compiled only against a CUDA build of torch, with GRADSTATS_WITH_CUDA defined for host.cpp.

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../ops.h"
#include "ops.cuh"

namespace gradstats {
namespace {

using at::Tensor;

void check_device(const char* op, const Tensor& t, const Tensor& first) {
  TORCH_CHECK_VALUE(t.is_cuda() && t.device() == first.device(), op,
                    " (cuda): expected tensors on one CUDA device, got ", first.device(), " and ",
                    t.device());
}

cuda::DType dtype_of(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return cuda::DType::kFloat32;
    case at::kBFloat16:
      return cuda::DType::kBFloat16;
    case at::kHalf:
      return cuda::DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, op, " (cuda): takes float32, bfloat16 and float16, got ",
                       t.scalar_type(), "; backend 'reference' takes the rest");
  }
}

// The order of the elements does not matter, only that each is there once.
cuda::Span span_of(const char* op, const Tensor& dense) {
  return {dense.const_data_ptr(), dense.numel(), dtype_of(op, dense)};
}

// tensors: any shapes and strides, on one device. Returns (n,) float32.
Tensor multi_sq_norm(const std::vector<Tensor>& tensors) {
  const char* op = "multi_sq_norm";
  if (tensors.empty()) return at::zeros({0}, at::kFloat);
  TORCH_CHECK_VALUE(tensors.size() <= std::numeric_limits<int>::max(), op, ": too many tensors");
  std::vector<Tensor> dense;  // keeps the copies alive until the launch is on the stream
  std::vector<cuda::Span> spans;
  dense.reserve(tensors.size());
  spans.reserve(tensors.size());
  for (const Tensor& t : tensors) check_device(op, t, tensors[0]);
  const c10::cuda::CUDAGuard guard(tensors[0].device());
  for (const Tensor& t : tensors) {
    dense.push_back(t.is_non_overlapping_and_dense() ? t : t.contiguous());
    spans.push_back(span_of(op, dense.back()));
  }
  const int count = static_cast<int>(spans.size());
  const auto options = tensors[0].options().dtype(at::kFloat);
  Tensor partials = at::empty({cuda::multi_sq_norm_partials(spans.data(), count)}, options);
  Tensor out = at::empty({count}, options);
  C10_CUDA_CHECK(cuda::multi_sq_norm(spans.data(), count, partials.mutable_data_ptr<float>(),
                                     out.mutable_data_ptr<float>(),
                                     c10::cuda::getCurrentCUDAStream()));
  return out;
}

// a, b: lists of tensors, shapes and dtypes alike in pairs, on one device. Returns (n,) float32.
Tensor multi_dot(const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  const char* op = "multi_dot";
  TORCH_CHECK_VALUE(a.size() == b.size(), op, ": expected lists of one length, got ", a.size(),
                    " and ", b.size());
  if (a.empty()) return at::zeros({0}, at::kFloat);
  TORCH_CHECK_VALUE(a.size() <= std::numeric_limits<int>::max(), op, ": too many tensors");
  std::vector<Tensor> dense;
  std::vector<cuda::Span> left, right;
  dense.reserve(2 * a.size());
  for (size_t i = 0; i < a.size(); ++i) {
    check_device(op, a[i], a[0]);
    check_device(op, b[i], a[0]);
    TORCH_CHECK_VALUE(a[i].sizes() == b[i].sizes() && a[i].scalar_type() == b[i].scalar_type(), op,
                      ": tensors ", i, " are ", a[i].sizes(), " ", a[i].scalar_type(), " and ",
                      b[i].sizes(), " ", b[i].scalar_type(), "; give both one shape and dtype");
  }
  const c10::cuda::CUDAGuard guard(a[0].device());
  for (size_t i = 0; i < a.size(); ++i) {
    // Elements are paired by where they lie, so both have to lie alike.
    const bool alike = a[i].is_non_overlapping_and_dense() && a[i].strides() == b[i].strides();
    for (const Tensor* t : {&a[i], &b[i]}) dense.push_back(alike ? *t : t->contiguous());
    left.push_back(span_of(op, dense[dense.size() - 2]));
    right.push_back(span_of(op, dense.back()));
  }
  const int count = static_cast<int>(left.size());
  const auto options = a[0].options().dtype(at::kFloat);
  Tensor partials = at::empty({cuda::multi_dot_partials(left.data(), count)}, options);
  Tensor out = at::empty({count}, options);
  C10_CUDA_CHECK(cuda::multi_dot(left.data(), right.data(), count,
                                 partials.mutable_data_ptr<float>(), out.mutable_data_ptr<float>(),
                                 c10::cuda::getCurrentCUDAStream()));
  return out;
}

cuda::Rows rows_of(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.size(1)}; }

// x: (B, I), g: (B, O), any strides, one dtype. Returns (B,) float32.
Tensor rank_one_sq_norm(const Tensor& x, const Tensor& g) {
  const char* op = "rank_one_sq_norm";
  TORCH_CHECK_VALUE(x.dim() == 2 && g.dim() == 2 && x.size(0) == g.size(0), op,
                    ": expected (B, I) and (B, O), got ", x.sizes(), " and ", g.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == g.scalar_type(), op, ": x is ", x.scalar_type(), ", g is ",
                   g.scalar_type(), "; give both one dtype");
  check_device(op, g, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor x_rows = x.stride(1) == 1 ? x : x.contiguous();
  const Tensor g_rows = g.stride(1) == 1 ? g : g.contiguous();
  Tensor out = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
  C10_CUDA_CHECK(cuda::rank_one_sq_norm(rows_of(x_rows), rows_of(g_rows), x.size(0),
                                        dtype_of(op, x), out.mutable_data_ptr<float>(),
                                        c10::cuda::getCurrentCUDAStream()));
  return out;
}

#ifdef GRADSTATS_WITH_SM90A

// (sum, sq_norm, m2) of contributions (B, n) in float32; reference.py: sum_stats.
std::tuple<Tensor, Tensor, Tensor> sum_stats(const Tensor& c, bool moments) {
  const Tensor total = c.sum(0);
  Tensor m2 = at::empty({0}, c.options());
  if (moments) m2 = (c - total / std::max<int64_t>(c.size(0), 1)).square().sum(0);
  return {total, c.square().sum(1), m2};
}

// (B, T, width) as TMA can describe it: as it is, or copied to rows of whole 16 bytes. The padding
// is outside of the tensor map and never read.
Tensor describable(const Tensor& t) {
  const int64_t width = t.size(2), padded = (width + 7) / 8 * 8;
  const int64_t rows = t.stride(1), samples = t.stride(0);
  const bool nested = t.stride(2) == 1 && rows >= width && rows % 8 == 0 &&
                      samples >= rows * t.size(1) && samples % rows == 0;
  if (nested && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0) return t;
  Tensor copy = at::empty({t.size(0), t.size(1), padded}, t.options()).narrow(2, 0, width);
  copy.copy_(t);
  return copy;
}

cuda::Samples samples_of(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.size(2)};
}

std::tuple<Tensor, Tensor, Tensor> weight_stats(const char* op, const Tensor& x, const Tensor& g,
                                                bool moments) {
  const int64_t batch = x.size(0), len_i = x.size(2), len_o = g.size(2);
  const auto wide = x.options().dtype(at::kFloat);
  Tensor m2 = at::empty({0}, wide);
  if (x.numel() == 0 || g.numel() == 0) {  // nothing to add up
    if (moments) m2 = at::zeros({len_o, len_i}, wide);
    return {at::zeros({len_o, len_i}, x.options()), at::zeros({batch}, wide), m2};
  }
  if (x.size(1) == 1 && !moments) {  // rank one: the library's product and two norms
    const Tensor x_rows = x.select(1, 0), g_rows = g.select(1, 0);
    return {at::mm(g_rows.t(), x_rows), rank_one_sq_norm(x_rows, g_rows), m2};
  }
  const Tensor rows_x = describable(x), rows_g = describable(g);
  const cuda::LinearFused call{samples_of(rows_x), samples_of(rows_g), batch,
                               x.size(1),          dtype_of(op, x),    moments};
  const char* refusal = cuda::linear_fused_refusal(call);
  TORCH_CHECK_NOT_IMPLEMENTED(refusal == nullptr, op, " (cuda): ", refusal, "; x is ", x.sizes(),
                              " with strides ", x.strides(), ", g is ", g.sizes(), " with strides ",
                              g.strides(), "; backend 'triton' takes it");
  Tensor dw = at::empty({len_o, len_i}, x.options());
  Tensor sq_norm = at::empty({batch}, wide);
  Tensor scratch = at::empty({cuda::linear_fused_scratch(call)}, wide);
  if (moments) m2 = at::empty({len_o, len_i}, wide);
  C10_CUDA_CHECK(cuda::linear_fused(call, scratch.mutable_data_ptr<float>(), dw.mutable_data_ptr(),
                                    sq_norm.mutable_data_ptr<float>(),
                                    moments ? m2.mutable_data_ptr<float>() : nullptr,
                                    c10::cuda::getCurrentCUDAStream()));
  return {dw, sq_norm, m2};
}

// x: (B, T, I), g: (B, T, O), bfloat16 or float16. Outputs as reference.py: linear_stats.
LinearStats linear_stats(const Tensor& x, const Tensor& g, bool weight, bool bias, bool moments) {
  const char* op = "linear_stats";
  TORCH_CHECK_VALUE(
      x.dim() == 3 && g.dim() == 3 && x.size(0) == g.size(0) && x.size(1) == g.size(1), op,
      " (cuda): expected (B, T, I) and (B, T, O), got ", x.sizes(), " and ", g.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == g.scalar_type() &&
                       (x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf),
                   op, " (cuda): takes bfloat16 and float16, x is ", x.scalar_type(), ", g is ",
                   g.scalar_type(), "; backend 'triton' takes float32");
  check_device(op, x, x);
  check_device(op, g, x);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto wide = x.options().dtype(at::kFloat);
  const auto none = [](const at::TensorOptions& options) { return at::empty({0}, options); };
  Tensor dw = none(x.options()), w_sq_norm = none(wide), w_m2 = none(wide);
  Tensor db = none(g.options()), b_sq_norm = none(wide), b_m2 = none(wide);
  if (weight) std::tie(dw, w_sq_norm, w_m2) = weight_stats(op, x, g, moments);
  if (bias) {
    std::tie(db, b_sq_norm, b_m2) = sum_stats(g.sum(1, /*keepdim=*/false, at::kFloat), moments);
    db = db.to(g.scalar_type());
  }
  return {dw, db, w_sq_norm, b_sq_norm, w_m2, b_m2};
}

#endif  // GRADSTATS_WITH_SM90A

}  // namespace

void bind_cuda(pybind11::module_& m) {
  const auto no_gil = pybind11::call_guard<pybind11::gil_scoped_release, at::NoGradGuard>();
  m.def("multi_sq_norm_cuda", &multi_sq_norm, pybind11::arg("tensors"), no_gil);
  m.def("rank_one_sq_norm_cuda", &rank_one_sq_norm, pybind11::arg("x"), pybind11::arg("g"), no_gil);
  m.def("multi_dot_cuda", &multi_dot, pybind11::arg("a"), pybind11::arg("b"), no_gil);
#ifdef GRADSTATS_WITH_SM90A
  m.def("linear_stats_cuda", &linear_stats, pybind11::arg("x"), pybind11::arg("g"),
        pybind11::arg("weight"), pybind11::arg("bias"), pybind11::arg("moments"), no_gil);
#endif
}

}  // namespace gradstats
