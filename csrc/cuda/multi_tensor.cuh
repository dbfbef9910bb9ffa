// One launch over a whole list of tensors, in chunks of equal size whatever tensor they belong to.
//
// The table of tensors travels as a kernel parameter, so nothing is copied to the device and a CUDA
// graph can hold the call. A second, tiny launch adds each tensor's partial sums in order.
#pragma once

#include <algorithm>

#include "ops.cuh"
#include "sum_squares.cuh"

namespace gradstats::cuda {

constexpr int kMultiThreads = 256;
constexpr int64_t kChunk = 32768;  // elements per block

struct Entry {
  const void* a;
  const void* b;  // of products in pairs
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

using SmallTable = Table<120>;  // what most models need; a parameter is copied at every launch
using LargeTable = Table<1000>;
static_assert(sizeof(SmallTable) <= 4000, "fits the parameters of any device");
static_assert(sizeof(LargeTable) <= 32100,
              "fits the parameters of CUDA 12.1 and later, 32764 bytes");
static_assert(kChunk % (kMultiThreads * kInFlight) == 0, "full chunks keep every thread busy");

inline int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

inline int64_t chunks_of(const Span* spans, int count) {
  int64_t chunks = 0;
  for (int i = 0; i < count; ++i) chunks += chunks_of(spans[i].size);
  return chunks;
}

// Op::sum(entry of type T, begin, size, thread, threads) is one thread's share of a chunk's sum.
template <typename Op, typename TableT>
__global__ void __launch_bounds__(kMultiThreads)
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
  const int64_t begin = (chunk - entry.first_chunk) * kChunk;
  const int64_t size = min(kChunk, entry.size - begin);
  float sum = 0.0f;
  switch (entry.dtype) {
    case DType::kFloat32:
      sum = Op::template sum<float>(entry, begin, size);
      break;
    case DType::kBFloat16:
      sum = Op::template sum<__nv_bfloat16>(entry, begin, size);
      break;
    case DType::kFloat16:
      sum = Op::template sum<__half>(entry, begin, size);
      break;
  }
  sum = block_sum<kMultiThreads>(sum);
  if (threadIdx.x == 0) partials[chunk] = sum;
}

template <typename TableT>
__global__ void __launch_bounds__(kMultiThreads)
    total_kernel(const __grid_constant__ TableT table, const float* partials, float* out) {
  const int i = blockIdx.x;
  const int begin = table.entries[i].first_chunk;
  const int end = i + 1 < table.count ? table.entries[i + 1].first_chunk : table.chunks;
  float sum = 0.0f;
  for (int chunk = begin + threadIdx.x; chunk < end; chunk += kMultiThreads) sum += partials[chunk];
  sum = block_sum<kMultiThreads>(sum);
  if (threadIdx.x == 0) out[i] = sum;
}

template <typename Op, typename TableT>
cudaError_t launch_table(const Span* a, const Span* b, int count, float* partials, float* out,
                         cudaStream_t stream) {
  TableT table;
  int64_t chunks = 0;
  for (int i = 0; i < count; ++i) {
    table.entries[i] = {a[i].data, b == nullptr ? nullptr : b[i].data, a[i].size,
                        static_cast<int32_t>(chunks), a[i].dtype};
    chunks += chunks_of(a[i].size);
  }
  if (chunks > INT32_MAX) return cudaErrorInvalidValue;
  table.count = count;
  table.chunks = static_cast<int32_t>(chunks);
  if (chunks > 0) partial_kernel<Op><<<table.chunks, kMultiThreads, 0, stream>>>(table, partials);
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  total_kernel<<<count, kMultiThreads, 0, stream>>>(table, partials, out);
  return cudaGetLastError();
}

// b: nullptr where Op takes one tensor. As many launches as tables are needed.
template <typename Op>
cudaError_t over_tensors(const Span* a, const Span* b, int count, float* partials, float* out,
                         cudaStream_t stream) {
  for (int done = 0; done < count;) {
    const int some = std::min(count - done, LargeTable::kMax);
    const auto run =
        some <= SmallTable::kMax ? launch_table<Op, SmallTable> : launch_table<Op, LargeTable>;
    const Span* others = b == nullptr ? nullptr : b + done;
    const cudaError_t error = run(a + done, others, some, partials, out + done, stream);
    if (error != cudaSuccess) return error;
    partials += chunks_of(a + done, some);
    done += some;
  }
  return cudaSuccess;
}

}  // namespace gradstats::cuda
