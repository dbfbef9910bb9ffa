// The CUDA launchers as Python functions of the extension: checks, device, stream, launch errors.
// Compiled only against a CUDA build of torch, with GRADSTATS_WITH_CUDA defined for host.cpp.

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>

#include <limits>
#include <vector>

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
    // The order of the elements does not matter, only that each is there once.
    dense.push_back(t.is_non_overlapping_and_dense() ? t : t.contiguous());
    spans.push_back({dense.back().const_data_ptr(), t.numel(), dtype_of(op, t)});
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

}  // namespace

void bind_cuda(pybind11::module_& m) {
  const auto no_gil = pybind11::call_guard<pybind11::gil_scoped_release, at::NoGradGuard>();
  m.def("multi_sq_norm_cuda", &multi_sq_norm, pybind11::arg("tensors"), no_gil);
  m.def("rank_one_sq_norm_cuda", &rank_one_sq_norm, pybind11::arg("x"), pybind11::arg("g"), no_gil);
}

}  // namespace gradstats
