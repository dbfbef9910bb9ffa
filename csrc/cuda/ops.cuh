// Every launcher of the CUDA backend; gradstats/reference.py defines them. No torch header: raw
// pointers on the current device, the caller's stream, and the launch's error as the result.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gradstats::cuda {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// `size` contiguous elements; aligned to their own size at least.
struct Span {
  const void* data;
  int64_t size;
  DType dtype;
};

// Rows of `width` contiguous elements, `stride` elements apart.
struct Rows {
  const void* data;
  int64_t stride;
  int64_t width;
};

// out[i] = squared norm of spans[i], for i < count. `partials` is scratch of as many floats as
// multi_sq_norm_partials says. Bit-reproducible: partial sums are added in a fixed order.
int64_t multi_sq_norm_partials(const Span* spans, int count);
cudaError_t multi_sq_norm(const Span* spans, int count, float* partials, float* out,
                          cudaStream_t stream);

// out[b] = |g_b|^2 |x_b|^2, the squared norm of g_b x_b^T, for b < batch.
cudaError_t rank_one_sq_norm(Rows x, Rows g, int64_t batch, DType dtype, float* out,
                             cudaStream_t stream);

}  // namespace gradstats::cuda
