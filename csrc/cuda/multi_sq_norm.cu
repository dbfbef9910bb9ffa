// Squared norms of a whole parameter list: (size_0), (size_1), ... -> (count).
//
// One launch reads every tensor once, in chunks of equal size whatever tensor they belong to; the
// table of tensors travels as a kernel parameter, so nothing is copied to the device and a CUDA
// graph can hold the call. A second, tiny launch adds each tensor's partial sums in order.

#include <algorithm>

#include "ops.cuh"
#include "sum_squares.cuh"

namespace gradstats::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 32768;  // elements per block

struct Entry {
  const void* data;
  int64_t size;
  int32_t first_chunk;
  DType dtype;
};

template <int kCapacity>
struct Table {
  static constexpr int kMax = kCapacity;
  Entry entries[kCapacity];
  int32_t count;
  int32_t chunks;
};

using Small = Table<128>;  // what most models need; a parameter is copied at every launch
using Large = Table<1024>;
static_assert(sizeof(Small) <= 4000, "fits the parameters of any device");
static_assert(sizeof(Large) <= 32000, "fits the parameters of CUDA 12.1 and later, 32764 bytes");
static_assert(kChunk % (kThreads * kInFlight) == 0, "full chunks keep every thread busy");

int64_t chunks_of(const Span& span) { return (span.size + kChunk - 1) / kChunk; }

template <typename T>
__device__ float chunk_sum(const Entry& entry, int64_t chunk) {
  const int64_t begin = chunk * kChunk;
  const int64_t size = min(kChunk, entry.size - begin);
  return sum_squares(static_cast<const T*>(entry.data) + begin, size, threadIdx.x, kThreads);
}

template <typename TableT>
__global__ void __launch_bounds__(kThreads)
    partial_kernel(const __grid_constant__ TableT table, float* partials) {
  const int chunk = blockIdx.x;
  int found = 0;  // the last entry that begins at or before this chunk; empty ones are stepped over
  for (int end = table.count; end - found > 1;) {
    const int middle = (found + end) / 2;
    if (table.entries[middle].first_chunk <= chunk) {
      found = middle;
    } else {
      end = middle;
    }
  }
  const Entry& entry = table.entries[found];
  const int64_t local = chunk - entry.first_chunk;
  float sum = 0.0f;
  switch (entry.dtype) {
    case DType::kFloat32:
      sum = chunk_sum<float>(entry, local);
      break;
    case DType::kBFloat16:
      sum = chunk_sum<__nv_bfloat16>(entry, local);
      break;
    case DType::kFloat16:
      sum = chunk_sum<__half>(entry, local);
      break;
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partials[chunk] = sum;
}

template <typename TableT>
__global__ void __launch_bounds__(kThreads)
    total_kernel(const __grid_constant__ TableT table, const float* partials, float* out) {
  const int i = blockIdx.x;
  const int begin = table.entries[i].first_chunk;
  const int end = i + 1 < table.count ? table.entries[i + 1].first_chunk : table.chunks;
  float sum = 0.0f;
  for (int chunk = begin + threadIdx.x; chunk < end; chunk += kThreads) sum += partials[chunk];
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) out[i] = sum;
}

template <typename TableT>
cudaError_t launch(const Span* spans, int count, float* partials, float* out, cudaStream_t stream) {
  TableT table;
  int64_t chunks = 0;
  for (int i = 0; i < count; ++i) {
    table.entries[i] = {spans[i].data, spans[i].size, static_cast<int32_t>(chunks), spans[i].dtype};
    chunks += chunks_of(spans[i]);
  }
  if (chunks > INT32_MAX) return cudaErrorInvalidValue;
  table.count = count;
  table.chunks = static_cast<int32_t>(chunks);
  if (chunks > 0) partial_kernel<<<table.chunks, kThreads, 0, stream>>>(table, partials);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  total_kernel<<<count, kThreads, 0, stream>>>(table, partials, out);
  return cudaGetLastError();
}

}  // namespace

int64_t multi_sq_norm_partials(const Span* spans, int count) {
  int64_t chunks = 0;
  for (int i = 0; i < count; ++i) chunks += chunks_of(spans[i]);
  return chunks;
}

cudaError_t multi_sq_norm(const Span* spans, int count, float* partials, float* out,
                          cudaStream_t stream) {
  for (int done = 0; done < count;) {
    const int some = std::min(count - done, Large::kMax);
    const auto run = some <= Small::kMax ? launch<Small> : launch<Large>;
    const cudaError_t error = run(spans + done, some, partials, out + done, stream);
    if (error != cudaSuccess) return error;
    partials += multi_sq_norm_partials(spans + done, some);
    done += some;
  }
  return cudaSuccess;
}

}  // namespace gradstats::cuda
