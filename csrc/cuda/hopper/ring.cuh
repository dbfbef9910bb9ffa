// The ring of stages: who waits for which phase of which barrier.
//
// full[s] completes when the stage's bytes are there, empty[s] when every reader has let go of it.
// A barrier's phases alternate between parity 0 and 1, and a wait for parity p returns once the
// phase of that parity is over. Readers wait on full for `parity`; the writer waits on empty for
// the other one, which in the first round is the phase before the first, over from the beginning.
#pragma once

#include "portable.cuh"

namespace gradstats::cuda::hopper {

template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  GRADSTATS_HD constexpr void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1u;
    }
  }
  GRADSTATS_HD constexpr uint32_t reader_parity() const { return parity; }
  GRADSTATS_HD constexpr uint32_t writer_parity() const { return parity ^ 1u; }
};

// Stages in the next turn of a sample that has `blocks` and is at `block`: the short turn comes
// first, so that the last one is long enough to hide the other warpgroup's squaring.
template <int kTurnBlocks>
GRADSTATS_HD constexpr int turn_blocks(int block, int blocks) {
  return block == 0 ? (blocks - 1) % kTurnBlocks + 1 : kTurnBlocks;
}

}  // namespace gradstats::cuda::hopper
