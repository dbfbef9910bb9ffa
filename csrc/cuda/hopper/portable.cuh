// Arithmetic that kernels, launchers and tests share. What includes this and no CUDA header is
// compiled by the host's compiler too: tests/cuda/emulate.cpp runs it without a GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GRADSTATS_HD __host__ __device__
#else
#define GRADSTATS_HD
#endif

namespace gradstats::cuda {

template <typename Int>
GRADSTATS_HD constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

}  // namespace gradstats::cuda
