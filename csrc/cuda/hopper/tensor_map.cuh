// Tensor maps of (B, T, columns) activations, and the loads through them.
#pragma once

#include <cuda.h>  // types only: the function comes from the runtime, nothing links to libcuda
#include <cuda_runtime_api.h>

#include "barrier.cuh"
#include "layout.cuh"

namespace gradstats::cuda::hopper {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

inline EncodeTiled encode_tiled() {
  static const EncodeTiled found = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol,
                                                               12000, cudaEnableDefault, &status);
    const bool good = error == cudaSuccess && status == cudaDriverEntryPointSuccess;
    return good ? reinterpret_cast<EncodeTiled>(symbol) : nullptr;
  }();
  return found;
}

// B and T are dimensions of their own, so that rows past a sample's end are outside of the tensor
// and arrive as zeros instead of as the next sample's. Strides in elements.
inline cudaError_t encode(CUtensorMap* map, CUtensorMapDataType dtype, const void* data,
                          int64_t batch, int64_t len_t, int64_t columns, int64_t stride_b,
                          int64_t stride_t, int box_t) {
  const EncodeTiled encoder = encode_tiled();
  if (encoder == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(len_t),
                              static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(stride_t) * kElement,
                                static_cast<cuuint64_t>(stride_b) * kElement};
  const cuuint32_t box[] = {kBoxColumns, static_cast<cuuint32_t>(box_t), 1};
  const cuuint32_t steps[] = {1, 1, 1};
  const CUresult result =
      encoder(map, dtype, 3, const_cast<void*>(data), sizes, strides, box, steps,
              CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

__device__ inline void prefetch(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// One box from (column, t, sample) to `shared` of this block; its bytes count towards `barrier`.
__device__ inline void load(const CUtensorMap& map, uint32_t shared, uint64_t* barrier, int column,
                            int t, int sample) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(t), "r"(sample)
      : "memory");
}

// The same to every block of `mask`, at the same place and barrier in each.
__device__ inline void load_shared(const CUtensorMap& map, uint32_t shared, uint64_t* barrier,
                                   int column, int t, int sample, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(t), "r"(sample), "h"(mask)
      : "memory");
}

}  // namespace gradstats::cuda::hopper
