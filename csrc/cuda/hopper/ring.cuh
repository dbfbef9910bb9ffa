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

// Stages in the next turn of a sample that has `blocks` and is at `block`. Turns alternate
// strictly, so a sample's first turn hides one warpgroup's squaring and its last turn the other's:
// what is left over, a block or a short one, is added to the first turn instead of being a turn of
// its own.
template <int kTurnBlocks>
GRADSTATS_HD constexpr int turn_blocks(int block, int blocks, bool short_first) {
  if (block > 0) return kTurnBlocks;
  const int more = kTurnBlocks == 1 ? static_cast<int>(short_first) : blocks % kTurnBlocks;
  return blocks < kTurnBlocks + more ? blocks : kTurnBlocks + more;
}

}  // namespace gradstats::cuda::hopper
