// Inner product of two contiguous ranges by a group of threads.
#pragma once

#include "sum_squares.cuh"

namespace gradstats::cuda {

template <typename T>
__device__ inline float widen(T v) {
  if constexpr (sizeof(T) == 4) {
    return v;
  } else if constexpr (__is_same(T, __half)) {
    return __half2float(v);
  } else {
    return __bfloat162float(v);
  }
}

// The products of the elements that two 32-bit words hold, in fp32.
template <typename T>
__device__ inline float word_dot(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(a) * __uint_as_float(b);
  } else if constexpr (__is_same(T, __half)) {
    const auto low = [](uint32_t w) {
      return __half2float(__ushort_as_half(static_cast<unsigned short>(w)));
    };
    return low(a) * low(b) + low(a >> 16) * low(b >> 16);
  } else {  // a bfloat16 is the upper half of a float
    return __uint_as_float(a << 16) * __uint_as_float(b << 16) +
           __uint_as_float(a & 0xffff0000u) * __uint_as_float(b & 0xffff0000u);
  }
}

template <typename T>
__device__ inline float vector_dot(const uint4& a, const uint4& b) {
  return (word_dot<T>(a.x, b.x) + word_dot<T>(a.y, b.y)) +
         (word_dot<T>(a.z, b.z) + word_dot<T>(a.w, b.w));
}

// This thread's share, thread `lane` of `lanes` >= 32. Any alignment: elements before the first
// 16-byte boundary and after the last one are read singly, and all of them where a and b are not
// aligned alike.
template <typename T>
__device__ float dot(const T* a, const T* b, int64_t size, int lane, int lanes) {
  constexpr int kWidth = kVectorBytes / sizeof(T);
  constexpr int kPairs = 2 * kInFlight;  // loads before the first use, of either
  const auto past = [](const T* p) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(p) % kVectorBytes / sizeof(T));
  };
  const bool alike = past(a) == past(b);
  const int64_t head = alike ? min(static_cast<int64_t>((kWidth - past(a)) % kWidth), size) : size;
  const int64_t vectors = (size - head) / kWidth;
  const int64_t tail = head + vectors * kWidth;
  const uint4* body_a = reinterpret_cast<const uint4*>(a + head);
  const uint4* body_b = reinterpret_cast<const uint4*>(b + head);

  float sums[kInFlight] = {};
  for (int64_t i = lane; i < head; i += lanes) sums[0] += widen(a[i]) * widen(b[i]);
  if (tail + lane < size) sums[1] += widen(a[tail + lane]) * widen(b[tail + lane]);
  int64_t at = lane;
  for (; at + (kInFlight - 1) * lanes < vectors; at += kInFlight * lanes) {
    uint4 loaded[kPairs];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      loaded[2 * i] = __ldg(body_a + at + i * lanes);
      loaded[2 * i + 1] = __ldg(body_b + at + i * lanes);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) sums[i] += vector_dot<T>(loaded[2 * i], loaded[2 * i + 1]);
  }
  for (; at < vectors; at += lanes)
    sums[0] += vector_dot<T>(__ldg(body_a + at), __ldg(body_b + at));
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace gradstats::cuda
