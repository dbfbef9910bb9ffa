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

// out[i] = <a[i], b[i]>, spans of one size and dtype in pairs. Scratch and order as above.
int64_t multi_dot_partials(const Span* a, int count);
cudaError_t multi_dot(const Span* a, const Span* b, int count, float* partials, float* out,
                      cudaStream_t stream);

// out[b] = |g_b|^2 |x_b|^2, the squared norm of g_b x_b^T, for b < batch.
cudaError_t rank_one_sq_norm(Rows x, Rows g, int64_t batch, DType dtype, float* out,
                             cudaStream_t stream);

// Activations (B, T, width), rows of contiguous elements; strides in elements.
struct Samples {
  const void* data;
  int64_t stride_b, stride_t, width;
};

struct LinearFused {
  Samples x, g;  // widths I and O
  int64_t batch, len_t;
  DType dtype;
  bool moments;
};

// dW (O, I) in the inputs' dtype, sq_norm (B) and with moments m2 (O, I) of the linear layer, in
// one pass over x and g; B, T, I, O > 0. Bit-reproducible on one kind of device. For sm_90a only.
// refusal: why the current device or the strides rule it out, or nullptr. scratch: in floats.
const char* linear_fused_refusal(const LinearFused& call);
int64_t linear_fused_scratch(const LinearFused& call);
cudaError_t linear_fused(const LinearFused& call, float* scratch, void* dw, float* sq_norm,
                         float* m2, cudaStream_t stream);

}  // namespace gradstats::cuda
