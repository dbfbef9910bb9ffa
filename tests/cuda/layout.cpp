// Every element that a wgmma descriptor leads to is the one that the product needs.
#include "hopper/layout.cuh"

#include <set>
#include <utility>

#include "shared_memory.h"

using namespace gradstats::cuda::hopper;
using namespace emulation;

// One stage of every block of a cluster, loaded as the producers do, read as the consumers do.
template <typename Traits>
void stage(int batch, int len_t, int len_i, int len_o, int first_o, int first_i, int t, int b) {
  Tensor x(batch, len_t, len_i), g(batch, len_t, len_o);
  for (size_t k = 0; k < x.values.size(); ++k) x.values[k] = float(k + 1);
  for (size_t k = 0; k < g.values.size(); ++k) g.values[k] = -float(k + 1);
  constexpr uint32_t base = 3 * Traits::kStageBytes + 1024;  // any stage, aligned
  std::vector<SharedMemory> blocks(Traits::kCluster, SharedMemory(base + Traits::kStageBytes));
  for (int rank = 0; rank < Traits::kCluster; ++rank) {
    const int o = first_o + rank * Traits::kTileO;
    for (int box = 0; box < Traits::kBoxesO; ++box) {
      tma_load(blocks[rank], base + Stage<Traits>::g_box(box), g, o + box * kBoxColumns, t, b,
               kBlockT);
    }
    for (int box = 0; box < Traits::kBoxesI; ++box) {
      for (SharedMemory& to : blocks) {  // multicast
        tma_load(to, base + Stage<Traits>::x_share(box, rank), x, first_i + box * kBoxColumns,
                 t + rank * Stage<Traits>::kShareT, b, Stage<Traits>::kShareT);
      }
    }
  }
  for (int rank = 0; rank < Traits::kCluster; ++rank) {
    for (uint32_t a = base; a < base + Traits::kStageBytes; a += 2) {
      CHECK(blocks[rank].at(a) != kUnwritten, "byte %u of the stage was not loaded", a - base);
    }
    for (int step = 0; step < kBlockT / kWgmmaK; ++step) {
      for (int k = 0; k < kWgmmaK; ++k) {
        const int at = t + step * kWgmmaK + k;
        for (int m = 0; m < Traits::kTileO; ++m) {
          const int group = m / kWgmmaM;
          const uint64_t d = descriptor(base + Stage<Traits>::g_box(0) + group * kBoxBytes, step);
          const float found = wgmma_read(blocks[rank], d, m % kWgmmaM, k);
          const float wanted = g.read(b, at, first_o + rank * Traits::kTileO + m);
          CHECK(found == wanted, "g: step %d k %d m %d: %f, not %f", step, k, m, found, wanted);
        }
        const uint64_t d = descriptor(base + Stage<Traits>::x_box(0), step);
        for (int n = 0; n < Traits::kTileI; ++n) {
          const float found = wgmma_read(blocks[rank], d, n, k);
          const float wanted = x.read(b, at, first_i + n);
          CHECK(found == wanted, "x: step %d k %d n %d: %f, not %f", step, k, n, found, wanted);
        }
      }
    }
    // The kernel adds a step to the descriptor instead of making it anew.
    for (int step = 0; step < kBlockT / kWgmmaK; ++step) {
      CHECK(descriptor(base, 0) + field(step * kStepBytes) == descriptor(base, step), "carry");
    }
  }
}

template <typename Traits>
void all() {
  stage<Traits>(2, 64, 256, 256, 0, 0, 0, 1);
  stage<Traits>(2, 300, 500, 520, 256, 192, 128, 0);
  stage<Traits>(3, 70, 200, 150, 0, Traits::kTileI, 64, 1);  // past T, I and O
  stage<Traits>(1, 5, 8, 8, 0, 0, 0, 0);
  stage<Traits>(2, 64, 64, 64, 256, 0, 0, 1);  // a tile that is outside of O altogether
  // The registers of a warpgroup hold every element of its tile once.
  std::set<std::pair<int, int>> seen;
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    for (int i = 0; i < Traits::kAccumulators; ++i) {
      const int row = fragment_row(thread, i), column = fragment_column(thread, i);
      CHECK(row >= 0 && row < kWgmmaM && column >= 0 && column < Traits::kTileI, "fragment");
      CHECK(seen.insert({row, column}).second, "thread %d index %d again", thread, i);
    }
  }
  // PTX ISA, "Register fragments": d0, d1 beside each other, d2 8 rows on, d4 8 columns on.
  CHECK(fragment_row(37, 0) == 17 && fragment_column(37, 0) == 2, "warp 1, lane 5, d0");
  CHECK(fragment_row(37, 7) == 25 && fragment_column(37, 7) == 11, "warp 1, lane 5, d7");
}

int main() {
  all<Traits<false, 1>>();
  all<Traits<false, 2>>();
  all<Traits<false, 2, kNarrow>>();
  all<Traits<true, 1>>();
  all<Traits<true, 2>>();
  for (uint32_t a = 0; a < 4096; a += 16) CHECK(swizzle(swizzle(a)) == a, "an involution");
  std::printf("layout ok\n");
}
