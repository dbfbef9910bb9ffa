// csrc/cuda/hopper/barrier.cuh, function by function, on machine.h.
#pragma once

#include "machine.h"

namespace gradstats::cuda::hopper {

inline uint32_t shared_address(const void* p) {
  const uint8_t* byte = static_cast<const uint8_t*>(p);
  const auto& memory = machine::here().memory;
  CHECK(byte >= memory.data() && byte < memory.data() + memory.size(), "not in shared memory");
  return static_cast<uint32_t>(byte - memory.data());
}

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  const uint32_t at = shared_address(barrier);
  CHECK(at % 8 == 0, "a barrier's address");
  const int n = static_cast<int>(arrivals);
  CHECK(machine::here().barriers.insert({at, {n, n}}).second, "a barrier is there already");
}
inline void barrier_init_fence() {
  for (auto& [at, barrier] : machine::here().barriers) barrier.fenced = true;
}

inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
  machine::MBarrier& b = machine::barrier_at(machine::current->rank, shared_address(barrier));
  CHECK(b.pending > 0, "more arrivals than the phase expects");
  b.bytes += static_cast<int>(bytes);
  --b.pending;
  machine::settle(b);
}

inline void arrive_at(const uint64_t* barrier, uint32_t rank) {
  machine::MBarrier& b = machine::barrier_at(static_cast<int>(rank), shared_address(barrier));
  CHECK(b.pending > 0, "more arrivals than the phase expects");
  --b.pending;
  machine::settle(b);
}

inline void wait_for(const uint64_t* barrier, uint32_t parity) {
  machine::MBarrier& b = machine::barrier_at(machine::current->rank, shared_address(barrier));
  machine::wait_until([&] { return (b.phase & 1) != static_cast<int64_t>(parity); });
}

inline void named_wait(int barrier, int threads) {
  machine::meet(machine::here().named[barrier], threads);
}
inline void named_arrive(int barrier, int threads) {
  machine::arrive(machine::here().named[barrier], threads);
}

inline uint32_t cluster_rank() { return static_cast<uint32_t>(machine::current->rank); }
inline void cluster_sync() {
  machine::meet(machine::cluster, static_cast<int>(machine::threads.size()));
}

template <int kRegisters>
void shrink_registers() {}
template <int kRegisters>
void grow_registers() {}

}  // namespace gradstats::cuda::hopper
