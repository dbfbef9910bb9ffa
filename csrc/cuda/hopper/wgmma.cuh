// wgmma: one warpgroup multiplies 16 positions of its 64 columns of g by kN columns of x.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "layout.cuh"

namespace gradstats::cuda::hopper {

// Before the first wgmma that reads registers or shared memory which other instructions wrote.
__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most kLeft of this warp's groups are under way.
template <int kLeft>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// Waits for all of them. The accumulators are written behind the compiler's back until then, so
// they pass through here: nothing that reads them can be moved before the wait.
template <int kCount>
__device__ inline void wgmma_wait_all(float (&acc)[kCount]) {
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// clang-format off
#define GRADSTATS_OUT_64                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                        \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "              \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "              \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GRADSTATS_OUT_96                                                                          \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                        \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "              \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "              \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "              \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "              \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define GRADSTATS_ACC_8(i) "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), \
  "+f"(acc[i + 4]), "+f"(acc[i + 5]), "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define GRADSTATS_ACC_32(i) \
  GRADSTATS_ACC_8(i), GRADSTATS_ACC_8(i + 8), GRADSTATS_ACC_8(i + 16), GRADSTATS_ACC_8(i + 24)

// Scales of A and B are 1; the two trailing 1s say that A is M-major and B is N-major.
#define GRADSTATS_WGMMA(n, type, out, a, b, keep, ...)                                            \
  asm volatile(                                                                                   \
      "{\n"                                                                                       \
      ".reg .pred add;\n"                                                                         \
      "setp.ne.b32 add, " keep ", 0;\n"                                                           \
      "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " {" out "}, "               \
      a ", " b ", add, 1, 1, 1, 1;\n"                                                             \
      "}\n"                                                                                       \
      : __VA_ARGS__                                                                               \
      : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(accumulate)))
// clang-format on

// acc = (accumulate ? acc : 0) + g^T x over the 16 positions that the descriptors name.
template <typename T>
__device__ inline void multiply(float (&acc)[64], uint64_t a_descriptor, uint64_t b_descriptor,
                                bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    GRADSTATS_WGMMA("128", "f16", GRADSTATS_OUT_64, "%64", "%65", "%66", GRADSTATS_ACC_32(0),
                    GRADSTATS_ACC_32(32));
  } else {
    GRADSTATS_WGMMA("128", "bf16", GRADSTATS_OUT_64, "%64", "%65", "%66", GRADSTATS_ACC_32(0),
                    GRADSTATS_ACC_32(32));
  }
}

template <typename T>
__device__ inline void multiply(float (&acc)[96], uint64_t a_descriptor, uint64_t b_descriptor,
                                bool accumulate) {
  if constexpr (std::is_same_v<T, __half>) {
    GRADSTATS_WGMMA("192", "f16", GRADSTATS_OUT_96, "%96", "%97", "%98", GRADSTATS_ACC_32(0),
                    GRADSTATS_ACC_32(32), GRADSTATS_ACC_32(64));
  } else {
    GRADSTATS_WGMMA("192", "bf16", GRADSTATS_OUT_96, "%96", "%97", "%98", GRADSTATS_ACC_32(0),
                    GRADSTATS_ACC_32(32), GRADSTATS_ACC_32(64));
  }
}

#undef GRADSTATS_WGMMA
#undef GRADSTATS_ACC_32
#undef GRADSTATS_ACC_8
#undef GRADSTATS_OUT_96
#undef GRADSTATS_OUT_64

}  // namespace gradstats::cuda::hopper
