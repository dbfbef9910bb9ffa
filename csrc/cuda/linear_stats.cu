// Per-sample squared norms of a linear layer's weight gradient where T = 1:
// x (batch, I), g (batch, O) -> out (batch), out_b = |g_b|^2 |x_b|^2 (arXiv:1510.01799).

#include "ops.cuh"
#include "sum_squares.cuh"

namespace gradstats::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kWideRows = 4096;  // elements of x and g together that keep a whole block busy

// A sample is read by a block where rows are long, by a warp where they are short.
template <typename T, bool kBlockPerSample>
__global__ void __launch_bounds__(kThreads)
    rank_one_kernel(Rows x, Rows g, int64_t batch, float* out) {
  constexpr int kLanes = kBlockPerSample ? kThreads : kWarp;
  static_assert(kThreads % kLanes == 0, "whole samples per block");
  const int lane = threadIdx.x % kLanes;
  const int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / kLanes) + threadIdx.x / kLanes;
  if (b >= batch) return;  // whole warps, or no thread at all
  float xx = sum_squares(static_cast<const T*>(x.data) + b * x.stride, x.width, lane, kLanes);
  float gg = sum_squares(static_cast<const T*>(g.data) + b * g.stride, g.width, lane, kLanes);
  if constexpr (kBlockPerSample) {
    xx = block_sum<kThreads>(xx);
    gg = block_sum<kThreads>(gg);
  } else {
    xx = warp_sum(xx);
    gg = warp_sum(gg);
  }
  if (lane == 0) out[b] = xx * gg;
}

template <typename T>
cudaError_t launch(Rows x, Rows g, int64_t batch, float* out, cudaStream_t stream) {
  const bool wide = x.width + g.width >= kWideRows;
  const int64_t per_block = wide ? 1 : kThreads / kWarp;
  const int64_t blocks = (batch + per_block - 1) / per_block;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  const auto kernel = wide ? rank_one_kernel<T, true> : rank_one_kernel<T, false>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(x, g, batch, out);
  return cudaGetLastError();
}

}  // namespace

cudaError_t rank_one_sq_norm(Rows x, Rows g, int64_t batch, DType dtype, float* out,
                             cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  switch (dtype) {
    case DType::kFloat32:
      return launch<float>(x, g, batch, out, stream);
    case DType::kBFloat16:
      return launch<__nv_bfloat16>(x, g, batch, out, stream);
    case DType::kFloat16:
      return launch<__half>(x, g, batch, out, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace gradstats::cuda
