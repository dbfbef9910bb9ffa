// Inner products of two parameter lists in pairs: out_i = <a_i, b_i>. Both lists are read once, in
// 16-byte loads, several of each in flight.

#include "dot.cuh"
#include "multi_tensor.cuh"

namespace gradstats::cuda {
namespace {

struct InnerProduct {
  template <typename T>
  static __device__ float sum(const Entry& entry, int64_t begin, int64_t size) {
    return dot(static_cast<const T*>(entry.a) + begin, static_cast<const T*>(entry.b) + begin, size,
               threadIdx.x, kMultiThreads);
  }
};

}  // namespace

int64_t multi_dot_partials(const Span* a, int count) { return chunks_of(a, count); }

cudaError_t multi_dot(const Span* a, const Span* b, int count, float* partials, float* out,
                      cudaStream_t stream) {
  for (int i = 0; i < count; ++i) {
    if (a[i].size != b[i].size || a[i].dtype != b[i].dtype) return cudaErrorInvalidValue;
  }
  return over_tensors<InnerProduct>(a, b, count, partials, out, stream);
}

}  // namespace gradstats::cuda
