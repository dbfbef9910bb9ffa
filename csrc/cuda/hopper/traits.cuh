// Tiles of the fused dW kernel, and the budgets that they come from.
//
// A block computes kTileO x kTileI of dW. Two consumer warpgroups take 64 rows each; a thread holds
// kTileI / 2 accumulators of the sample at hand, as many of the running sum, and with moments as
// many of M2: 2 x 96 or 3 x 64 of the 232 registers that setmaxnreg gives it. Wider tiles do not
// fit, and sums in shared memory cost more than squaring: 8 bytes an element at 128 bytes a cycle.
#pragma once

#include "portable.cuh"

namespace gradstats::cuda::hopper {

constexpr int kConsumers = 2;    // warpgroups that multiply
constexpr int kWarpgroup = 128;  // threads
constexpr int kConsumerWarps = kConsumers * kWarpgroup / 32;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kEntryRegisters = 168;  // a thread's at launch: of 65536, in steps of 8
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kSharedLimit = 232448;  // 227 KiB: what a block can ask for

constexpr int kWgmmaM = 64, kWgmmaK = 16;
constexpr int kElement = 2;      // bytes of a bfloat16 or float16
constexpr int kBoxColumns = 64;  // 128 bytes, the swizzle's width: a box of one TMA load
constexpr int kBlockT = 64;      // positions in a stage
constexpr int kBoxBytes = kBlockT * kBoxColumns * kElement;

// Columns of a tile: wide where its sums fit, narrow with moments and for small outputs.
constexpr int kWide = 192, kNarrow = 128;

template <bool kWithMoments, int kClusterSize, int kColumns = kWithMoments ? kNarrow : kWide>
struct Traits {
  static constexpr bool kMoments = kWithMoments;
  static constexpr int kCluster = kClusterSize;  // blocks that share the columns of x
  static constexpr int kTileO = kConsumers * kWgmmaM;
  static constexpr int kTileI = kColumns;
  static constexpr int kStages = kTileI == kWide ? 5 : 6;
  // Stages that a warpgroup multiplies before the other one's turn. Its squaring, 2 instructions an
  // element or 5 with moments, must be no longer than the other's turn: 192 < 384 cycles of
  // m64n192 on 64 positions; 320 > 256 of m64n128, hence two.
  static constexpr int kTurnBlocks = kMoments ? 2 : 1;

  static constexpr int kAccumulators = kWgmmaM * kTileI / kWarpgroup;
  static constexpr int kBoxesO = kTileO / kBoxColumns, kBoxesI = kTileI / kBoxColumns;
  static constexpr int kStageBytes = (kBoxesO + kBoxesI) * kBoxBytes;
  static constexpr int kSharedBytes = 1024 + kStages * (kStageBytes + 2 * 8);

  // Cycles that a position of a tile takes: of the tensor cores, at 2048 products a cycle, or of
  // shared memory, at 128 bytes a cycle: wgmmas read 64 columns of g and all of x, TMA writes both.
  static constexpr int kProductCycles = kTileO * kTileI / 2048;
  static constexpr int kSharedCycles =
      (kConsumers * (kWgmmaM + kTileI) + kTileO + kTileI) * kElement / 128;
  static constexpr int kCycles = kSharedCycles > kProductCycles ? kSharedCycles : kProductCycles;

  static_assert(kTileI % kBoxColumns == 0 && kTileI <= 256, "whole boxes, one wgmma wide");
  static_assert(kBlockT % (kCluster * 8) == 0, "a block's share of x is whole swizzle patterns");
  static_assert(kSharedBytes <= kSharedLimit, "the ring fits");
  static constexpr int kMostBlocks = kTurnBlocks == 1 ? 2 : 2 * kTurnBlocks - 1;  // of any turn
  static_assert(2 * kMostBlocks <= kStages, "while a turn is read, the next one is on its way");
  static_assert((kMoments ? 3 : 2) * kAccumulators + 40 <= kConsumerRegisters, "sums fit");
};

static_assert(
    kThreads * kEntryRegisters <= 65536 && kThreads * (kEntryRegisters + 8) > 65536,
    "what the compiler leaves each thread of a block that has a multiprocessor to itself");
static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                  (1 + kConsumers) * kEntryRegisters,
              "warpgroups take what others gave back, or would wait for ever");
static_assert(kProducerRegisters % 8 == 0 && kConsumerRegisters % 8 == 0, "as setmaxnreg takes");

}  // namespace gradstats::cuda::hopper
