// Which block computes which samples of which tile, a pure function of the shape.
//
// A cluster is one worker. It takes items worker, worker + workers, ...; an item is one tile of dW
// (kCluster tiles of kTileO rows beside each other) over consecutive samples. Tiles that fill the
// card in whole waves go over all samples and write dW; those of the last, incomplete wave are
// split over samples, write partial sums to a slot each, and a second launch merges the slots in
// order. All workers begin at the first sample of their item at about the same time and need the
// same samples of x and g, which is what keeps them in L2: cutting the tiles' samples into equal
// shares regardless of tiles would balance better and read everything from memory.
#pragma once

#include "traits.cuh"

namespace gradstats::cuda::hopper {

// Writing and reading a partial tile takes as long as this many positions of its product: 8 bytes
// an element at 4.8 TB/s over 132 multiprocessors, 21 bytes a cycle, against 2048 products a cycle.
constexpr int64_t kMergePositions = 800;
constexpr int kMaxSplits = 32;
constexpr int kGroupO = 4;  // clusters' rows of tiles that neighbouring workers stay in

struct Shape {
  int64_t batch, len_t, len_i, len_o;
};

struct Item {
  int tile;            // among the plan's tiles
  int tile_o, tile_i;  // where it is; tile_o counts clusters
  int first, last;     // samples
  int slot;            // of the partial sums, or -1: the item writes dW
};

// Counts stay below 2^31, addresses made of them do not.
struct Plan {
  int tiles_o, tiles_i;  // tiles_o counts clusters
  int whole;             // tiles that are not split
  int workers, cluster, splits;
  int batch;

  GRADSTATS_HD constexpr int tiles() const { return tiles_o * tiles_i; }
  GRADSTATS_HD constexpr int split_tiles() const { return tiles() - whole; }
  GRADSTATS_HD constexpr int slots() const { return split_tiles() * splits; }
  GRADSTATS_HD constexpr int items() const { return whole + slots(); }
  GRADSTATS_HD constexpr int split_begin(int split) const {
    const int rest = batch % splits;  // the first splits take one sample more
    return batch / splits * split + (split < rest ? split : rest);
  }

  // Tiles in bands of kGroupO rows, column by column inside a band.
  GRADSTATS_HD constexpr void place(Item& item) const {
    const int band = item.tile / (kGroupO * tiles_i);
    const int in_band = item.tile % (kGroupO * tiles_i);
    const int rest = tiles_o - band * kGroupO;
    const int rows = rest < kGroupO ? rest : kGroupO;
    item.tile_o = band * kGroupO + in_band % rows;
    item.tile_i = in_band / rows;
  }

  GRADSTATS_HD constexpr Item item(int n) const {
    Item item{n, 0, 0, 0, batch, -1};
    if (n >= whole) {
      item.slot = n - whole;  // split by split, so that a wave is in few samples
      const int split = item.slot / split_tiles();
      item.tile = whole + item.slot % split_tiles();
      item.first = split_begin(split);
      item.last = split_begin(split + 1);
    }
    place(item);
    return item;
  }
};

GRADSTATS_HD constexpr int blocks_of(int64_t len_t) {
  return static_cast<int>(ceil_div<int64_t>(len_t, kBlockT));
}

// A sample's last positions come first: should they be few, their short product is not the one that
// has to hide the other warpgroup's squaring.
GRADSTATS_HD constexpr int block_begin(int block, int blocks) {
  return (block == 0 ? blocks - 1 : block - 1) * kBlockT;
}

// Products of kWgmmaK positions in a sample's first block; the others are full.
GRADSTATS_HD constexpr int first_steps(int64_t len_t) {
  const int64_t rest = len_t - int64_t{blocks_of(len_t) - 1} * kBlockT;
  return static_cast<int>(ceil_div<int64_t>(rest, kWgmmaK));
}

// Positions' worth of time that the slowest worker needs for `tiles` split in `splits`.
constexpr int64_t split_cost(const Shape& shape, int64_t tiles, int splits, int workers) {
  const int64_t waves = ceil_div<int64_t>(tiles * splits, workers);
  const int64_t merge = splits > 1 ? kMergePositions : 0;
  return waves * (ceil_div<int64_t>(shape.batch, splits) * shape.len_t + merge);
}

// Clusters of two halve the reads of x; an odd tile left over is computed for nothing.
constexpr int choose_cluster(int64_t tiles_o) { return tiles_o % 2 == 0 || tiles_o >= 8 ? 2 : 1; }

template <typename Traits>
constexpr int64_t count_tiles(const Shape& shape) {
  return ceil_div<int64_t>(shape.len_o, int64_t{Traits::kTileO} * Traits::kCluster) *
         ceil_div<int64_t>(shape.len_i, Traits::kTileI);
}

// For shapes whose samples and tiles, times kMaxSplits, are below 2^31.
template <typename Traits>
constexpr Plan make_plan(const Shape& shape, int multiprocessors) {
  Plan plan{};
  plan.cluster = Traits::kCluster;
  plan.tiles_i = static_cast<int>(ceil_div<int64_t>(shape.len_i, Traits::kTileI));
  plan.tiles_o = static_cast<int>(count_tiles<Traits>(shape) / plan.tiles_i);
  plan.batch = static_cast<int>(shape.batch);
  const int clusters = multiprocessors / Traits::kCluster;
  const int at_once = clusters > 0 ? clusters : 1;
  const int rest = plan.tiles() % at_once;
  plan.splits = 1;
  for (int s = 2; s <= kMaxSplits && s <= plan.batch; ++s) {
    if (split_cost(shape, rest, s, at_once) < split_cost(shape, rest, plan.splits, at_once)) {
      plan.splits = s;
    }
  }
  plan.whole = plan.splits > 1 ? plan.tiles() - rest : plan.tiles();
  plan.workers = plan.items() < at_once ? plan.items() : at_once;
  return plan;
}

// Cycles of the slowest worker, to choose between tiles.
template <typename Traits>
constexpr int64_t plan_cost(const Shape& shape, int multiprocessors) {
  const Plan plan = make_plan<Traits>(shape, multiprocessors);
  const int64_t positions = shape.batch * shape.len_t;
  int64_t cost = ceil_div(plan.whole, plan.workers) * positions;
  if (plan.splits > 1) cost += split_cost(shape, plan.split_tiles(), plan.splits, plan.workers);
  return cost * Traits::kCycles;
}

}  // namespace gradstats::cuda::hopper
