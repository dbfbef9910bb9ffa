// What device code takes from the compiler and from CUDA's headers, on machine.h.
#pragma once

#include "machine.h"

#define __CUDACC__
#define __host__
#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx machine::current->thread_index
#define blockIdx machine::current->block_index

inline void __syncthreads() {
  machine::meet(machine::here().all, int(machine::threads.size() / machine::blocks.size()));
}
inline void __syncwarp() { machine::meet(machine::current->warp->meeting, 32); }
template <typename T>
T __shfl_sync(unsigned, T v, int from) {
  return machine::exchange(v, from);
}
template <typename T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return machine::exchange(v, (machine::current->thread_index.x % 32) ^ mask);
}
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline float __uint_as_float(uint32_t w) {
  float f;
  std::memcpy(&f, &w, 4);
  return f;
}
using std::min;
