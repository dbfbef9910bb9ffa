// Sum of squares of a contiguous range by a group of threads: device code shared by the kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace gradstats::cuda {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest load a thread can make
constexpr int kInFlight = 4;      // independent loads before the first use

// One element, and the two that a 32-bit word holds, squared in fp32.
template <typename T>
struct Squares;

template <>
struct Squares<float> {
  static __device__ float one(float v) { return v * v; }
  static __device__ float word(uint32_t w) { return one(__uint_as_float(w)); }
};

template <>
struct Squares<__nv_bfloat16> {
  static __device__ float one(__nv_bfloat16 v) {
    const float f = __bfloat162float(v);
    return f * f;
  }
  static __device__ float word(uint32_t w) {  // a bfloat16 is the upper half of a float
    const float low = __uint_as_float(w << 16), high = __uint_as_float(w & 0xffff0000u);
    return low * low + high * high;
  }
};

template <>
struct Squares<__half> {
  static __device__ float one(__half v) {
    const float f = __half2float(v);
    return f * f;
  }
  static __device__ float word(uint32_t w) {
    const float low = __half2float(__ushort_as_half(static_cast<unsigned short>(w)));
    const float high = __half2float(__ushort_as_half(static_cast<unsigned short>(w >> 16)));
    return low * low + high * high;
  }
};

template <typename T>
struct Vectors {
  static_assert(sizeof(T) == 4 || sizeof(T) == 2, "a 32-bit word must hold whole elements");
  static constexpr int kWidth = kVectorBytes / sizeof(T);
  static_assert(kWidth <= kWarp, "one element per thread must cover the head and the tail");

  static __device__ float squares(const uint4& v) {
    return (Squares<T>::word(v.x) + Squares<T>::word(v.y)) +
           (Squares<T>::word(v.z) + Squares<T>::word(v.w));
  }
};

// This thread's share, thread `lane` of `lanes` >= 32. Any alignment: elements before the first
// 16-byte boundary and after the last one are read singly.
template <typename T>
__device__ float sum_squares(const T* data, int64_t size, int lane, int lanes) {
  constexpr int kWidth = Vectors<T>::kWidth;
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(data) % kVectorBytes / sizeof(T));
  const int64_t head = min(static_cast<int64_t>((kWidth - past) % kWidth), size);
  const int64_t vectors = (size - head) / kWidth;
  const int64_t tail = head + vectors * kWidth;
  const uint4* body = reinterpret_cast<const uint4*>(data + head);

  float sums[kInFlight] = {};
  if (lane < head) sums[0] += Squares<T>::one(data[lane]);
  if (tail + lane < size) sums[1] += Squares<T>::one(data[tail + lane]);
  int64_t at = lane;
  for (; at + (kInFlight - 1) * lanes < vectors; at += kInFlight * lanes) {
    uint4 loaded[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) loaded[i] = __ldg(body + at + i * lanes);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) sums[i] += Vectors<T>::squares(loaded[i]);
  }
  for (; at < vectors; at += lanes) sums[0] += Vectors<T>::squares(__ldg(body + at));
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(~0u, v, offset);
  return v;
}

// The sum over a block, valid in thread 0. May be called again: it ends with a barrier.
template <int kThreads>
__device__ float block_sum(float v) {
  static_assert(kThreads % kWarp == 0 && kThreads <= kWarp * kWarp, "whole warps, one per lane");
  __shared__ float warps[kThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  v = warp_sum(v);
  if (lane == 0) warps[warp] = v;
  __syncthreads();
  v = warp_sum(threadIdx.x < kThreads / kWarp ? warps[lane] : 0.0f);
  __syncthreads();
  return v;
}

}  // namespace gradstats::cuda
