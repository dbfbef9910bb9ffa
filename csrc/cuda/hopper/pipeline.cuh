// The two roles in a block of the fused dW kernel: one thread that loads, two warpgroups that
// multiply.
#pragma once

#include "../sum_squares.cuh"
#include "barrier.cuh"
#include "epilogue.cuh"
#include "fused.cuh"
#include "ring.cuh"
#include "tensor_map.cuh"
#include "wgmma.cuh"

namespace gradstats::cuda::hopper {

// A block's shared memory: the ring and its barriers.
template <typename Traits>
struct Shared {
  uint8_t* stages;  // aligned to the swizzle's pattern
  uint64_t* full;
  uint64_t* empty;

  __device__ explicit Shared(uint8_t* base) {
    stages = base + (-shared_address(base) & (kPatternBytes - 1));
    full = reinterpret_cast<uint64_t*>(stages + Traits::kStages * Traits::kStageBytes);
    empty = full + Traits::kStages;
  }
  __device__ uint32_t stage(int i) const {
    return shared_address(stages) + i * Traits::kStageBytes;
  }
};

// One thread. Every stage is the block's own columns of g and its share of the cluster's x.
template <typename Traits>
__device__ void produce(const CUtensorMap& x_map, const CUtensorMap& g_map, const Arguments& args,
                        const Shared<Traits>& shared, int worker, int rank) {
  constexpr uint16_t kEveryone = (1 << Traits::kCluster) - 1;
  const int blocks = blocks_of(args.shape.len_t);
  Ring<Traits::kStages> ring;
  for (int n = worker; n < args.plan.items(); n += args.plan.workers) {
    const Item item = args.plan.item(n);
    const int o = static_cast<int>(first_row<Traits>(item, rank));
    const int i = static_cast<int>(first_column<Traits>(item));
#pragma unroll 1
    for (int b = item.first; b < item.last; ++b) {
#pragma unroll 1
      for (int block = 0; block < blocks; ++block) {
        const int t = block_begin(block, blocks);
        uint64_t* full = shared.full + ring.stage;
        const uint32_t stage = shared.stage(ring.stage);
        wait_for(shared.empty + ring.stage, ring.writer_parity());
        arrive_expecting(full, Traits::kStageBytes);
        for (int box = 0; box < Traits::kBoxesO; ++box) {
          load(g_map, stage + Stage<Traits>::g_box(box), full, o + box * kBoxColumns, t, b);
        }
        for (int box = 0; box < Traits::kBoxesI; ++box) {
          const uint32_t to = stage + Stage<Traits>::x_share(box, rank);
          const int column = i + box * kBoxColumns, row = t + rank * Stage<Traits>::kShareT;
          if constexpr (Traits::kCluster == 1) {
            load(x_map, to, full, column, row, b);
          } else {
            load_shared(x_map, to, full, column, row, b, kEveryone);
          }
        }
        ring.advance();
      }
    }
  }
}

// An item's sums: into dW, or into its slot.
template <typename Traits, typename T, int kCount, int kSpread>
__device__ void store(const Arguments& args, const Item& item, int rank, int thread,
                      const float (&sum)[kCount], const float (&m2)[kSpread]) {
  if (item.slot >= 0) {
    const int64_t tile = int64_t{item.slot} * Traits::kCluster + rank;
    store_partial(args.sums, tile, thread, sum);
    if constexpr (Traits::kMoments) store_partial(args.spreads, tile, thread, m2);
    return;
  }
  const int64_t row = first_row<Traits>(item, rank);
  const int64_t column = first_column<Traits>(item);
  store_tile<T>({args.dw, args.shape.len_o, args.shape.len_i, row, column}, thread, sum);
  if constexpr (Traits::kMoments) {
    store_tile<float>({args.m2, args.shape.len_o, args.shape.len_i, row, column}, thread, m2);
  }
}

template <typename Traits, typename T>
__device__ void consume(const Arguments& args, const Shared<Traits>& shared, int worker, int rank) {
  constexpr int kCount = Traits::kAccumulators, kSteps = kBlockT / kWgmmaK;
  const int thread = threadIdx.x - kWarpgroup;              // among the consumers
  const int me = __shfl_sync(~0u, thread / kWarpgroup, 0);  // uniform, and the compiler knows
  const int lane = thread % kWarp;
  const int blocks = blocks_of(args.shape.len_t);
  const int short_steps = first_steps(args.shape.len_t);
  const auto turn = [](int whose) { return 1 + whose; };  // named barriers
  constexpr int kTurnThreads = kConsumers * kWarpgroup;

  float acc[kCount], sum[kCount], m2[Traits::kMoments ? kCount : 1];
  Ring<Traits::kStages> ring;
  float squares = 0.0f;      // of the last sample, not yet written: the shuffles can wait until
  float* pending = nullptr;  // the next product is on its way
  const auto flush = [&] {
    if (pending == nullptr) return;
    const float total = warp_sum(squares);
    if (lane == 0) *pending = total;
    pending = nullptr;
  };

  if (me == 1) named_arrive(turn(0), kTurnThreads);  // the first turn is warpgroup 0's
  for (int n = worker; n < args.plan.items(); n += args.plan.workers) {
    const Item item = args.plan.item(n);
#pragma unroll
    for (int k = 0; k < kCount; ++k) sum[k] = 0.0f;
#pragma unroll
    for (int k = 0; k < (Traits::kMoments ? kCount : 1); ++k) m2[k] = 0.0f;

#pragma unroll 1
    for (int b = item.first; b < item.last; ++b) {
#pragma unroll 1
      for (int block = 0; block < blocks;) {
        const int count = turn_blocks<Traits::kTurnBlocks>(block, blocks, short_steps < kSteps);
        Ring<Traits::kStages> read = ring;
        named_wait(turn(me), kTurnThreads);
#pragma unroll 1
        for (int j = 0; j < count; ++j) {
          wait_for(shared.full + read.stage, read.reader_parity());
          const uint32_t stage = shared.stage(read.stage);
          const uint64_t g = descriptor(stage + Stage<Traits>::g_box(0) + me * kBoxBytes, 0);
          const uint64_t x = descriptor(stage + Stage<Traits>::x_box(0), 0);
          const bool fresh = block + j == 0;  // the sample's first product replaces the last's sum
          if (!fresh || short_steps == kSteps) {
            wgmma_begin();
#pragma unroll
            for (int step = 0; step < kSteps; ++step) {
              multiply<T>(acc, g + field(step * kStepBytes), x + field(step * kStepBytes),
                          step > 0 || !fresh);
            }
            wgmma_commit();
          } else {  // few positions
#pragma unroll 1
            for (int step = 0; step < short_steps; ++step) {
              wgmma_begin();
              multiply<T>(acc, g + field(step * kStepBytes), x + field(step * kStepBytes),
                          step > 0);
              wgmma_commit();
            }
          }
          read.advance();
        }
        named_arrive(turn(1 - me), kTurnThreads);
        flush();
        // Whoever wrote a stage's parts may write again, stage by stage.
        const auto release = [&] {
          if (lane < Traits::kCluster) arrive_at(shared.empty + ring.stage, lane);
          ring.advance();
        };
        if constexpr (Traits::kMostBlocks == 3) {
          if (count == 3) {
            wgmma_wait<2>();
            release();
          }
        }
        if (count >= 2) {
          wgmma_wait<1>();
          release();
        }
        wgmma_wait_all(acc);
        release();
        block += count;
      }
      squares = absorb<Traits::kMoments>(acc, sum, m2, b - item.first);
      pending = args.slab + slab_at(args.plan, b, item.tile, rank, thread / kWarp);
    }
    store<Traits, T>(args, item, rank, thread, sum, m2);
  }
  flush();
  if (me == 0) named_wait(turn(0), kTurnThreads);  // the arrival that is left over
}

// All of a block; base: its dynamic shared memory.
template <typename Traits, typename T>
__device__ void run_block(const CUtensorMap& x_map, const CUtensorMap& g_map, const Arguments& args,
                          uint8_t* base) {
  const Shared<Traits> shared(base);
  const int rank = Traits::kCluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int worker = blockIdx.x / Traits::kCluster;
  if (threadIdx.x == 0) {
    prefetch(x_map);
    prefetch(g_map);
    for (int i = 0; i < Traits::kStages; ++i) {
      barrier_init(shared.full + i, 1);
      barrier_init(shared.empty + i, Traits::kCluster * kConsumerWarps);
    }
    barrier_init_fence();
  }
  const auto everyone = [] { Traits::kCluster > 1 ? cluster_sync() : __syncthreads(); };
  everyone();  // no barrier is used before it is there
  if (threadIdx.x < kWarpgroup) {
    shrink_registers<kProducerRegisters>();
    if (threadIdx.x == 0) produce(x_map, g_map, args, shared, worker, rank);
    __syncwarp();  // the barrier below takes whole warps
  } else {
    grow_registers<kConsumerRegisters>();
    consume<Traits, T>(args, shared, worker, rank);
  }
  everyone();  // nor is a block gone that another one still writes to
}

}  // namespace gradstats::cuda::hopper
