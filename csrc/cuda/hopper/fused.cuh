// What the fused dW kernel and its finishing launch hand to each other, and where it lies in
// scratch.
#pragma once

#include "scheduler.cuh"

namespace gradstats::cuda::hopper {

// Norms: one partial sum of each warp of each tile, (B, tiles, warps). Addresses are 64-bit.
GRADSTATS_HD constexpr int64_t slab_width(const Plan& plan) {
  return int64_t{plan.tiles()} * plan.cluster * kConsumerWarps;
}
GRADSTATS_HD constexpr int64_t slab_at(const Plan& plan, int sample, int tile, int rank, int warp) {
  return sample * slab_width(plan) + (int64_t{tile} * plan.cluster + rank) * kConsumerWarps + warp;
}

// The corner of dW that block `rank` of an item's cluster computes.
template <typename Traits>
GRADSTATS_HD constexpr int64_t first_row(const Item& item, int rank) {
  return (int64_t{item.tile_o} * Traits::kCluster + rank) * Traits::kTileO;
}
template <typename Traits>
GRADSTATS_HD constexpr int64_t first_column(const Item& item) {
  return int64_t{item.tile_i} * Traits::kTileI;
}

// Partial sums stay in the order of the registers, in vectors of four: consecutive threads,
// consecutive vectors. `tile` is slot * cluster + rank, a thread has `groups` vectors.
GRADSTATS_HD constexpr int64_t partial_at(int64_t tile, int groups, int group, int thread) {
  return (tile * groups + group) * (kConsumers * kWarpgroup) + thread;
}

// Floats of all slots' partial sums; M2 takes as many.
template <typename Traits>
GRADSTATS_HD constexpr int64_t partial_floats(const Plan& plan) {
  return int64_t{plan.slots()} * plan.cluster * Traits::kTileO * Traits::kTileI;
}

template <typename Traits>
GRADSTATS_HD constexpr int64_t scratch_floats(const Plan& plan) {
  return partial_floats<Traits>(plan) * (Traits::kMoments ? 2 : 1) + plan.batch * slab_width(plan);
}

#ifdef __CUDACC__
struct Arguments {
  Plan plan;
  Shape shape;
  void* dw;
  float* m2;
  float4* sums;     // partial, of the slots
  float4* spreads;  // and their M2
  float* slab;
};
#endif

}  // namespace gradstats::cuda::hopper
