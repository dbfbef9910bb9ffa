// The launch after the fused kernel: partial sums of tiles that were split over samples become dW
// and M2, partial squared norms become norms. Every sum in a fixed order.
#pragma once

#include "../sum_squares.cuh"
#include "epilogue.cuh"
#include "fused.cuh"

namespace gradstats::cuda::hopper {

constexpr int kFinishThreads = kConsumers * kWarpgroup;  // one for each thread that had the sums
constexpr int kFinishGroups =
    4;  // groups of accumulators a block merges: enough blocks, wide loads

template <typename Traits>
constexpr int64_t merge_blocks(const Plan& plan) {
  static_assert(Traits::kAccumulators / 4 % kFinishGroups == 0, "whole blocks");
  return int64_t{plan.split_tiles()} * plan.cluster * (Traits::kAccumulators / 4 / kFinishGroups);
}

template <typename Traits, typename T>
__device__ void merge_tiles(const Arguments& args, int index) {
  constexpr int kGroups = Traits::kAccumulators / 4;
  constexpr int kParts = kGroups / kFinishGroups;
  const int tile = index / kParts / Traits::kCluster;  // among those that are split
  const int rank = index / kParts % Traits::kCluster;
  const Item item = args.plan.item(args.plan.whole + tile);
  const int64_t row = first_row<Traits>(item, rank);
  const int64_t column = first_column<Traits>(item);
  const Target dw{args.dw, args.shape.len_o, args.shape.len_i, row, column};
  const Target m2{args.m2, args.shape.len_o, args.shape.len_i, row, column};
  const int thread = threadIdx.x;
#pragma unroll
  for (int k = 0; k < kFinishGroups; ++k) {
    const int group = index % kParts * kFinishGroups + k;
    float4 sum{}, spread{};
    for (int split = 0; split < args.plan.splits; ++split) {
      const int64_t slot =
          (int64_t{split} * args.plan.split_tiles() + tile) * Traits::kCluster + rank;
      const int64_t at = partial_at(slot, kGroups, group, thread);
      const float4 more = args.sums[at];
      if constexpr (Traits::kMoments) {
        const float4 m = args.spreads[at];
        if (split == 0) {
          sum = more;
          spread = m;
          continue;
        }
        const int before = args.plan.split_begin(split);
        const Chan chan(before, args.plan.split_begin(split + 1) - before);
        chan.merge(sum.x, spread.x, more.x, m.x);
        chan.merge(sum.y, spread.y, more.y, m.y);
        chan.merge(sum.z, spread.z, more.z, m.z);
        chan.merge(sum.w, spread.w, more.w, m.w);
      } else {
        sum = {sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w};
      }
    }
    store_group<T>(dw, thread, group, sum);
    if constexpr (Traits::kMoments) store_group<float>(m2, thread, group, spread);
  }
}

template <typename Traits, typename T>
__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const __grid_constant__ Arguments args, int merges, float* sq_norm) {
  const int block = blockIdx.x;
  if (block < merges) {
    merge_tiles<Traits, T>(args, block);
    return;
  }
  const int64_t sample = block - merges;
  const int64_t width = slab_width(args.plan);
  float sum = 0.0f;
  for (int64_t k = threadIdx.x; k < width; k += kFinishThreads) {
    sum += args.slab[sample * width + k];
  }
  sum = block_sum<kFinishThreads>(sum);
  if (threadIdx.x == 0) sq_norm[sample] = sum;
}

}  // namespace gradstats::cuda::hopper
