// The fused kernel from end to end on the CPU: the plan's items, stages as TMA fills them, products
// through the descriptors into accumulators where the threads hold them, sums, slots, slab and the
// finishing launch; against dW, norms and M2 in float64.
#include <cmath>
#include <vector>

#include "hopper/fused.cuh"
#include "hopper/layout.cuh"
#include "hopper/moments.cuh"
#include "shared_memory.h"

using namespace gradstats::cuda;
using namespace gradstats::cuda::hopper;
using namespace emulation;

namespace {

constexpr int kConsumerThreads = kConsumers * kWarpgroup;

struct Result {
  std::vector<double> dw, m2, sq_norm;
};

Result truth(const Tensor& x, const Tensor& g) {
  const size_t size = size_t(g.columns) * x.columns;
  Result r{std::vector<double>(size), std::vector<double>(size), std::vector<double>(x.batch)};
  std::vector<double> one(size);
  for (int b = 0; b < x.batch; ++b) {
    std::fill(one.begin(), one.end(), 0.0);
    for (int t = 0; t < x.len_t; ++t)
      for (int o = 0; o < g.columns; ++o)
        for (int i = 0; i < x.columns; ++i)
          one[size_t(o) * x.columns + i] += double(g.read(b, t, o)) * x.read(b, t, i);
    for (size_t k = 0; k < size; ++k) {
      r.sq_norm[b] += one[k] * one[k];
      const double d = one[k] - (b ? r.dw[k] / b : 0.0);
      r.m2[k] += d * d * b / (b + 1);
      r.dw[k] += one[k];
    }
  }
  return r;
}

template <typename Traits>
struct Kernel {
  static constexpr int kCount = Traits::kAccumulators, kGroups = kCount / 4;
  const Tensor &x, &g;
  Shape shape;
  Plan plan;
  std::vector<float> sums, spreads, slab;
  Result out;

  Kernel(const Tensor& x, const Tensor& g, int multiprocessors)
      : x(x),
        g(g),
        shape{x.batch, x.len_t, x.columns, g.columns},
        plan(make_plan<Traits>(shape, multiprocessors)),
        sums(partial_floats<Traits>(plan)),
        spreads(sums.size()),
        slab(size_t(x.batch) * slab_width(plan)) {
    const size_t size = size_t(g.columns) * x.columns;
    out = {std::vector<double>(size, NAN), std::vector<double>(size, NAN), {}};
    out.sq_norm.resize(x.batch);
  }

  // acc of warpgroup `me`, as [thread * kCount + index].
  void product(const Item& item, int rank, int me, int b, std::vector<float>& acc) const {
    const int o = int(first_row<Traits>(item, rank)), i = int(first_column<Traits>(item));
    const int blocks = blocks_of(x.len_t);
    for (int block = 0; block < blocks; ++block) {
      SharedMemory shared(Traits::kStageBytes);
      const int t = block_begin(block, blocks);
      for (int box = 0; box < Traits::kBoxesO; ++box) {
        tma_load(shared, Stage<Traits>::g_box(box), g, o + box * kBoxColumns, t, b, kBlockT);
      }
      for (int from = 0; from < Traits::kCluster; ++from) {
        for (int box = 0; box < Traits::kBoxesI; ++box) {
          tma_load(shared, Stage<Traits>::x_share(box, from), x, i + box * kBoxColumns,
                   t + from * Stage<Traits>::kShareT, b, Stage<Traits>::kShareT);
        }
      }
      const int steps = block == 0 ? first_steps(x.len_t) : kBlockT / kWgmmaK;
      for (int step = 0; step < steps; ++step) {
        if (step == 0 && block == 0) std::fill(acc.begin(), acc.end(), 0.0f);
        const uint64_t a = descriptor(Stage<Traits>::g_box(0) + me * kBoxBytes, step);
        const uint64_t d = descriptor(Stage<Traits>::x_box(0), step);
        for (int k = 0; k < kWgmmaK; ++k) {
          float left[kWgmmaM], right[Traits::kTileI];
          for (int m = 0; m < kWgmmaM; ++m) left[m] = wgmma_read(shared, a, m, k);
          for (int n = 0; n < Traits::kTileI; ++n) right[n] = wgmma_read(shared, d, n, k);
          for (int thread = 0; thread < kWarpgroup; ++thread)
            for (int c = 0; c < kCount; ++c)
              acc[thread * kCount + c] +=
                  left[fragment_row(thread, c)] * right[fragment_column(thread, c)];
        }
      }
    }
  }

  void write(const Item& item, int rank, int thread, int index, float sum, float m2) {
    const int64_t row = first_row<Traits>(item, rank) + thread / kWarpgroup * kWgmmaM +
                        fragment_row(thread % kWarpgroup, index);
    const int64_t column = first_column<Traits>(item) + fragment_column(thread % kWarpgroup, index);
    if (row >= shape.len_o || column >= shape.len_i) {
      CHECK(sum == 0.0f, "what is outside of dW is zero");
      return;
    }
    const size_t at = size_t(row * shape.len_i + column);
    CHECK(std::isnan(out.dw[at]), "written twice");
    out.dw[at] = sum;
    out.m2[at] = m2;
  }

  void run() {
    for (int n = 0; n < plan.items(); ++n) {
      const Item item = plan.item(n);
      for (int rank = 0; rank < Traits::kCluster; ++rank) {
        for (int me = 0; me < kConsumers; ++me) {
          std::vector<float> acc(kWarpgroup * kCount, NAN), sum(acc.size()), m2(acc.size());
          for (int b = item.first; b < item.last; ++b) {
            product(item, rank, me, b, acc);
            const Welford welford(b - item.first);
            for (int thread = 0; thread < kWarpgroup; ++thread) {
              const int warp = me * kWarpgroup / 32 + thread / 32;
              float& squares = slab[slab_at(plan, b, item.tile, rank, warp)];
              for (int c = 0; c < kCount; ++c) {
                const int k = thread * kCount + c;
                squares += acc[k] * acc[k];
                welford.add(acc[k], sum[k], m2[k]);
              }
            }
          }
          for (int thread = 0; thread < kWarpgroup; ++thread) {
            for (int c = 0; c < kCount; ++c) {
              const int k = thread * kCount + c, who = me * kWarpgroup + thread;
              if (item.slot < 0) {
                write(item, rank, who, c, sum[k], m2[k]);
              } else {
                const int64_t tile = int64_t{item.slot} * Traits::kCluster + rank;
                const int64_t at = partial_at(tile, kGroups, c / 4, who) * 4 + c % 4;
                sums[at] = sum[k];
                spreads[at] = m2[k];
              }
            }
          }
        }
      }
    }
    finish();
  }

  void finish() {
    for (int tile = 0; tile < plan.split_tiles(); ++tile) {
      const Item item = plan.item(plan.whole + tile);
      for (int rank = 0; rank < Traits::kCluster; ++rank) {
        for (int who = 0; who < kConsumerThreads; ++who) {
          for (int c = 0; c < kCount; ++c) {
            float sum = 0.0f, m2 = 0.0f;
            for (int split = 0; split < plan.splits; ++split) {
              const int64_t slot =
                  (int64_t{split} * plan.split_tiles() + tile) * Traits::kCluster + rank;
              const int64_t at = partial_at(slot, kGroups, c / 4, who) * 4 + c % 4;
              const int before = plan.split_begin(split);
              if (split == 0) {
                sum = sums[at], m2 = spreads[at];
              } else {
                Chan(before, plan.split_begin(split + 1) - before)
                    .merge(sum, m2, sums[at], spreads[at]);
              }
            }
            write(item, rank, who, c, sum, m2);
          }
        }
      }
    }
    for (int b = 0; b < x.batch; ++b)
      for (int64_t k = 0; k < slab_width(plan); ++k)
        out.sq_norm[b] += slab[b * slab_width(plan) + k];
  }
};

void compare(const char* what, const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 1e-30, worst = 0.0;
  for (double v : b) largest = std::fmax(largest, std::fabs(v));
  for (size_t k = 0; k < a.size(); ++k) {
    CHECK(!std::isnan(a[k]), "%s: element %zu was not written", what, k);
    worst = std::fmax(worst, std::fabs(a[k] - b[k]) / largest);
  }
  CHECK(worst < 2e-6, "%s is off by %.1e", what, worst);
}

template <typename Traits>
void one(int batch, int len_t, int len_i, int len_o, int multiprocessors, bool split) {
  Random random(batch * 1000 + len_t);
  Tensor x(batch, len_t, len_i), g(batch, len_t, len_o);
  for (float& v : x.values) v = random.uniform();
  for (float& v : g.values) v = random.uniform();
  Kernel<Traits> kernel(x, g, multiprocessors);
  CHECK((kernel.plan.splits > 1) == split, "splits %d", kernel.plan.splits);
  kernel.run();
  const Result wanted = truth(x, g);
  compare("dw", kernel.out.dw, wanted.dw);
  compare("sq_norm", kernel.out.sq_norm, wanted.sq_norm);
  compare("m2", kernel.out.m2, wanted.m2);
}

template <typename Traits>
void all() {
  one<Traits>(3, 70, 200, 150, 1, false);  // tails of T, I and O
  one<Traits>(2, 129, 64, 300, 2, false);  // an odd tile of O
  one<Traits>(5, 1, 9, 17, 2, false);
  one<Traits>(4, 600, 33, 40, 8, true);  // a small output: split over samples
  // Whole tiles, and one that is split.
  one<Traits>(4, 500, 33, 3 * 128 * Traits::kCluster - 50, 2 * Traits::kCluster, true);
}

}  // namespace

int main() {
  all<Traits<false, 1>>();
  all<Traits<false, 2>>();
  all<Traits<false, 2, kNarrow>>();
  all<Traits<true, 1>>();
  all<Traits<true, 2>>();
  std::printf("whole ok\n");
}
