// What happens to a sample's accumulators, and how a tile leaves the registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fused.cuh"
#include "layout.cuh"
#include "moments.cuh"

namespace gradstats::cuda::hopper {

// One sample's tile into the sums, after `seen` samples; returns this thread's sum of squares.
template <bool kMoments, int kCount, int kSpread>
__device__ inline float absorb(const float (&acc)[kCount], float (&sum)[kCount],
                               float (&m2)[kSpread], int seen) {
  constexpr int kChains = 4;  // additions that wait for each other take 4 cycles
  float squares[kChains] = {};
  const Welford welford(seen);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    squares[i % kChains] += acc[i] * acc[i];
    if constexpr (kMoments) {
      welford.add(acc[i], sum[i], m2[i]);
    } else {
      sum[i] += acc[i];
    }
  }
  return (squares[0] + squares[1]) + (squares[2] + squares[3]);
}

// Where a tile goes. Addresses are 64-bit from here on: O x I passes 2^31 elements.
struct Target {
  void* data;
  int64_t len_o, len_i;
  int64_t first_o, first_i;
};

template <typename T>
struct Pair;  // of neighbouring columns

template <>
struct Pair<float> {
  using Vector = float2;
  static __device__ Vector make(float a, float b) { return {a, b}; }
};
template <>
struct Pair<__nv_bfloat16> {
  using Vector = __nv_bfloat162;
  static __device__ Vector make(float a, float b) { return __floats2bfloat162_rn(a, b); }
};
template <>
struct Pair<__half> {
  using Vector = __half2;
  static __device__ Vector make(float a, float b) { return __floats2half2_rn(a, b); }
};

// Two columns of a row; `even`: rows are an even number of elements long, so that pairs are whole.
template <typename T>
__device__ inline void store_pair(T* to, float a, float b, bool even, bool both) {
  const typename Pair<T>::Vector pair = Pair<T>::make(a, b);
  if (even) {
    *reinterpret_cast<typename Pair<T>::Vector*>(to) = pair;
  } else {
    to[0] = pair.x;
    if (both) to[1] = pair.y;
  }
}

// Four accumulators, those of one group of 8 columns, to a row-major (O, I) matrix. Four threads
// write 8 neighbouring columns of a row: half of a sector or, in fp32, a whole one.
template <typename T>
__device__ inline void store_group(const Target& target, int thread, int group, const float4& v) {
  const int64_t column = target.first_i + fragment_column(thread % kWarpgroup, group * 4);
  const int64_t row =
      target.first_o + thread / kWarpgroup * kWgmmaM + fragment_row(thread % kWarpgroup, 0);
  if (column >= target.len_i) return;
  const bool even = target.len_i % 2 == 0, both = column + 1 < target.len_i;
  T* to = static_cast<T*>(target.data) + row * target.len_i + column;
  if (row < target.len_o) store_pair(to, v.x, v.y, even, both);
  if (row + 8 < target.len_o) store_pair(to + 8 * target.len_i, v.z, v.w, even, both);
}

template <int kCount>
__device__ inline float4 group_of(const float (&v)[kCount], int group) {
  return {v[group * 4], v[group * 4 + 1], v[group * 4 + 2], v[group * 4 + 3]};
}

template <typename T, int kCount>
__device__ inline void store_tile(const Target& target, int thread, const float (&v)[kCount]) {
#pragma unroll
  for (int group = 0; group < kCount / 4; ++group) {
    store_group<T>(target, thread, group, group_of(v, group));
  }
}

template <int kCount>
__device__ inline void store_partial(float4* slots, int64_t tile, int thread,
                                     const float (&v)[kCount]) {
#pragma unroll
  for (int group = 0; group < kCount / 4; ++group) {
    slots[partial_at(tile, kCount / 4, group, thread)] = group_of(v, group);
  }
}

}  // namespace gradstats::cuda::hopper
