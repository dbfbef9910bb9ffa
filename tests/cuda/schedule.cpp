// Every sample of every tile is computed once, whatever the shape; partial sums are where the
// finishing launch looks for them.
#include <set>
#include <utility>
#include <vector>

#include "check.h"
#include "hopper/fused.cuh"
#include "hopper/ring.cuh"

using namespace gradstats::cuda::hopper;

template <typename Traits>
void schedule(const Shape& shape, int multiprocessors) {
  const Plan plan = make_plan<Traits>(shape, multiprocessors);
  const int batch = static_cast<int>(shape.batch);
  CHECK(plan.workers >= 1 && plan.workers * Traits::kCluster <= multiprocessors + 1, "workers");
  CHECK(plan.splits >= 1 && plan.splits <= batch, "splits");
  std::vector<int> taken(plan.items());
  std::set<std::pair<int, int>> places;
  std::vector<int> visits(size_t(plan.tiles()) * batch);
  std::set<int> slots;
  for (int worker = 0; worker < plan.workers; ++worker) {
    for (int n = worker; n < plan.items(); n += plan.workers) {
      ++taken[n];
      const Item item = plan.item(n);
      CHECK(item.tile >= 0 && item.tile < plan.tiles(), "tile %d", item.tile);
      CHECK(item.tile_o >= 0 && item.tile_o < plan.tiles_o, "tile_o %d", item.tile_o);
      CHECK(item.tile_i >= 0 && item.tile_i < plan.tiles_i, "tile_i %d", item.tile_i);
      CHECK(item.first < item.last && item.last <= batch, "an item has samples");
      places.insert({item.tile_o, item.tile_i});
      for (int b = item.first; b < item.last; ++b) ++visits[size_t(item.tile) * batch + b];
      if (item.slot >= 0) {
        CHECK(item.slot < plan.slots() && slots.insert(item.slot).second, "slot %d", item.slot);
        const int split = item.slot / plan.split_tiles();  // as finish.cuh finds it
        CHECK(item.slot == split * plan.split_tiles() + (item.tile - plan.whole), "order");
        CHECK(item.first == plan.split_begin(split), "the split's samples");
      } else {
        CHECK(item.first == 0 && item.last == batch, "a tile that writes dW has all samples");
      }
    }
  }
  for (int n = 0; n < plan.items(); ++n)
    CHECK(taken[n] == 1, "item %d taken %d times", n, taken[n]);
  for (int v : visits) CHECK(v == 1, "a sample of a tile computed %d times", v);
  CHECK(int(places.size()) == plan.tiles(), "every place has a tile");
  CHECK(int(slots.size()) == plan.slots(), "every slot is written");
  CHECK(plan.split_begin(0) == 0 && plan.split_begin(plan.splits) == batch, "splits cover");
  CHECK(int64_t{plan.tiles_o} * Traits::kCluster * Traits::kTileO >= shape.len_o, "covers O");
  CHECK(int64_t{plan.tiles_i} * Traits::kTileI >= shape.len_i, "covers I");
  CHECK(scratch_floats<Traits>(plan) >= 0, "scratch");
}

// The slab and the slots have a place for everything and none twice.
template <typename Traits>
void places() {
  const Plan plan = make_plan<Traits>({5, 4096, 500, 700}, 132);
  std::set<int64_t> slab, partial;
  for (int b = 0; b < 5; ++b)
    for (int tile = 0; tile < plan.tiles(); ++tile)
      for (int rank = 0; rank < plan.cluster; ++rank)
        for (int warp = 0; warp < kConsumerWarps; ++warp)
          CHECK(slab.insert(slab_at(plan, b, tile, rank, warp)).second, "slab");
  CHECK(int64_t(slab.size()) == 5 * slab_width(plan) && *slab.begin() == 0 &&
            *slab.rbegin() + 1 == int64_t(slab.size()),
        "the slab is full");
  CHECK(plan.slots() > 0, "this shape is split");
  constexpr int kGroups = Traits::kAccumulators / 4;
  for (int tile = 0; tile < plan.slots() * plan.cluster; ++tile)
    for (int group = 0; group < kGroups; ++group)
      for (int thread = 0; thread < kConsumers * kWarpgroup; ++thread)
        CHECK(partial.insert(partial_at(tile, kGroups, group, thread)).second, "slots");
  CHECK(int64_t(partial.size()) * 4 == partial_floats<Traits>(plan), "the slots are full");
}

// Addresses of large layers and batches do not fit in 32 bits.
template <typename Traits>
void large() {
  const Plan plan = make_plan<Traits>({100000, 64, 16384, 131072}, 132);
  const int rank = plan.cluster - 1, last = plan.tiles() - 1;
  CHECK(slab_at(plan, 99999, last, rank, kConsumerWarps - 1) + 1 == 100000 * slab_width(plan),
        "the slab's last place");
  CHECK(100000 * slab_width(plan) > INT64_C(1) << 31, "and it is far");
  constexpr int kGroups = Traits::kAccumulators / 4;
  const int64_t at = partial_at(INT64_C(1) << 20, kGroups, 0, 0);
  CHECK(at == (INT64_C(1) << 20) * kGroups * kConsumers * kWarpgroup, "a far slot");
}

template <typename Traits>
void all() {
  large<Traits>();
  Random random(7);
  const int64_t known[][4] = {{16, 1024, 768, 3072},  {8, 2048, 4096, 4096}, {4, 4096, 4096, 11008},
                              {16, 1024, 768, 50304}, {32, 64, 1024, 1024},  {32, 197, 4096, 4096},
                              {1, 1, 1, 1},           {4096, 1, 64, 64},     {3, 7, 129, 257}};
  for (const auto& s : known) schedule<Traits>({s[0], s[1], s[2], s[3]}, 132);
  for (int k = 0; k < 3000; ++k) {
    const Shape shape{1 + random.below(70), 1 + random.below(600), 1 + random.below(3000),
                      1 + random.below(3000)};
    schedule<Traits>(shape, 1 + random.below(150));
  }
  places<Traits>();
  // Every position is in one block, and the steps reach it.
  for (int len_t = 1; len_t < 400; ++len_t) {
    std::vector<int> covered(len_t);
    for (int block = 0; block < blocks_of(len_t); ++block) {
      const int steps = block == 0 ? first_steps(len_t) : kBlockT / kWgmmaK;
      CHECK(steps >= 1 && steps <= kBlockT / kWgmmaK, "steps");
      for (int k = 0; k < steps * kWgmmaK; ++k) {
        const int t = block_begin(block, blocks_of(len_t)) + k;
        if (t < len_t) ++covered[t];
      }
    }
    for (int times : covered) CHECK(times == 1, "a position of %d is added %d times", len_t, times);
  }
  // Turns: all blocks once, none too short but where a sample is.
  for (int blocks = 1; blocks < 20; ++blocks) {
    for (bool short_first : {false, true}) {
      int block = 0;
      while (block < blocks) {
        const int count = turn_blocks<Traits::kTurnBlocks>(block, blocks, short_first);
        CHECK(count >= 1 && count <= Traits::kMostBlocks, "turn of %d", count);
        CHECK(count == blocks || count >= Traits::kTurnBlocks, "too short to hide squaring");
        block += count;
      }
      CHECK(block == blocks, "turns cover a sample");
    }
  }
}

int main() {
  all<Traits<false, 1>>();
  all<Traits<false, 2>>();
  all<Traits<false, 2, kNarrow>>();
  all<Traits<true, 1>>();
  all<Traits<true, 2>>();
  std::printf("schedule ok\n");
}
