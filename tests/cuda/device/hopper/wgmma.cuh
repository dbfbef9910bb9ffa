// csrc/cuda/hopper/wgmma.cuh, function by function, on machine.h: every thread computes its own
// accumulators, at once or not before it waits.
#pragma once

#include "layout.cuh"
#include "machine.h"

namespace gradstats::cuda::hopper {

inline void compute(const machine::Product& p) {
  emulation::SharedMemory& shared = machine::here().shared;
  const int thread = machine::current->thread_index.x % kWarpgroup;
  for (int k = 0; k < kWgmmaK; ++k) {
    const float left[] = {emulation::wgmma_read(shared, p.a, fragment_row(thread, 0), k),
                          emulation::wgmma_read(shared, p.a, fragment_row(thread, 2), k)};
    const bool keep = k > 0 || p.accumulate;
    for (int i = 0; i < p.count; ++i) {
      if (i % 4 >= 2) continue;  // two rows share a column
      const float right = emulation::wgmma_read(shared, p.b, fragment_column(thread, i), k);
      p.acc[i] = (keep ? p.acc[i] : 0.0f) + left[0] * right;
      p.acc[i + 2] = (keep ? p.acc[i + 2] : 0.0f) + left[1] * right;
    }
  }
}

inline void wgmma_begin() {}
inline void wgmma_commit() {
  machine::current->groups.push_back(std::move(machine::current->open));
  machine::current->open.clear();
}

template <int kLeft>
void wgmma_wait() {
  CHECK(machine::current->open.empty(), "a wgmma is in no group");
  auto& groups = machine::current->groups;
  machine::yield();
  while (groups.size() > kLeft) {
    for (const machine::Product& p : groups.front()) compute(p);
    groups.pop_front();
  }
}
template <int kCount>
void wgmma_wait_all(float (&)[kCount]) {
  wgmma_wait<0>();
}

template <typename T, int kCount>
void multiply(float (&acc)[kCount], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
  const machine::Product p{acc, kCount, a_descriptor, b_descriptor, accumulate};
  if (machine::read_late) {
    machine::current->open.push_back(p);
  } else {
    compute(p);
  }
}

}  // namespace gradstats::cuda::hopper
