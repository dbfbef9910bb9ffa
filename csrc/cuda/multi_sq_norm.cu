// Squared norms of a whole parameter list: (size_0), (size_1), ... -> (count). Every element is
// read once, in 16-byte loads, several of them in flight.

#include "multi_tensor.cuh"

namespace gradstats::cuda {
namespace {

struct SquaredNorm {
  template <typename T>
  static __device__ float sum(const Entry& entry, int64_t begin, int64_t size) {
    return sum_squares(static_cast<const T*>(entry.a) + begin, size, threadIdx.x, kMultiThreads);
  }
};

}  // namespace

int64_t multi_sq_norm_partials(const Span* spans, int count) { return chunks_of(spans, count); }

cudaError_t multi_sq_norm(const Span* spans, int count, float* partials, float* out,
                          cudaStream_t stream) {
  return over_tensors<SquaredNorm>(spans, nullptr, count, partials, out, stream);
}

}  // namespace gradstats::cuda
