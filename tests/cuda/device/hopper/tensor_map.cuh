// csrc/cuda/hopper/tensor_map.cuh, function by function, on machine.h.
#pragma once

#include "barrier.cuh"
#include "layout.cuh"

namespace gradstats::cuda::hopper {

inline void prefetch(const CUtensorMap&) {}

inline void load_shared(const CUtensorMap& map, uint32_t shared, uint64_t* barrier, int column,
                        int t, int sample, uint16_t mask) {
  for (int rank = 0; rank < static_cast<int>(machine::blocks.size()); ++rank) {
    if (mask >> rank & 1) {
      machine::loads.push_back({map, rank, shared, shared_address(barrier), column, t, sample});
    }
  }
}

inline void load(const CUtensorMap& map, uint32_t shared, uint64_t* barrier, int column, int t,
                 int sample) {
  const auto mine = static_cast<uint16_t>(1 << machine::current->rank);
  load_shared(map, shared, barrier, column, t, sample, mine);
}

}  // namespace gradstats::cuda::hopper
