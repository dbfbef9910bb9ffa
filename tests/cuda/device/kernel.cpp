// The fused kernel's own code, run on machine.h, against exact sums: the inputs are small integers.
#include "cuda_names.h"
// The order matters: this stands in for the compiler of CUDA.
#include "hopper/finish.cuh"
#include "hopper/pipeline.cuh"

using namespace gradstats::cuda;
using namespace gradstats::cuda::hopper;
using emulation::Tensor;

namespace {

template <typename Traits>
void one(int batch, int len_t, int len_i, int len_o, int multiprocessors, uint64_t seed,
         bool split = false) {
  Random random(seed);
  Tensor x(batch, len_t, len_i), g(batch, len_t, len_o);
  for (float& v : x.values) v = float(random.below(7) - 3);
  for (float& v : g.values) v = float(random.below(5) - 2);
  const Shape shape{batch, len_t, len_i, len_o};
  const Plan plan = make_plan<Traits>(shape, multiprocessors);
  CHECK((plan.splits > 1) == split, "split in %d", plan.splits);
  const size_t size = size_t(len_o) * len_i;
  std::vector<float> dw(size, NAN), m2(size, NAN), sq_norm(batch, NAN);
  std::vector<float> slab(batch * slab_width(plan), NAN);
  std::vector<float4> sums(partial_floats<Traits>(plan) / 4, float4{NAN, NAN, NAN, NAN});
  std::vector<float4> spreads(sums);
  const Arguments args{plan, shape, dw.data(), m2.data(), sums.data(), spreads.data(), slab.data()};
  const CUtensorMap x_map{&x, Stage<Traits>::kShareT}, g_map{&g, kBlockT};
  for (int worker = 0; worker < plan.workers; ++worker) {
    machine::run(Traits::kCluster, worker * Traits::kCluster, kThreads, Traits::kSharedBytes,
                 seed + worker, [&] {
                   uint8_t* base = machine::here().memory.data() + machine::kBase;
                   run_block<Traits, float>(x_map, g_map, args, base);
                 });
  }
  const int merges = int(merge_blocks<Traits>(plan));
  for (int block = 0; block < merges + batch; ++block) {
    machine::run(1, block, kFinishThreads, 0, seed,
                 [&] { finish_kernel<Traits, float>(args, merges, sq_norm.data()); });
  }

  std::vector<double> sum(size), spread(size), sample(size);
  for (int b = 0; b < batch; ++b) {
    double squares = 0.0;
    for (int o = 0; o < len_o; ++o) {
      for (int i = 0; i < len_i; ++i) {
        const size_t at = size_t(o) * len_i + i;
        double v = 0.0;
        for (int t = 0; t < len_t; ++t) v += double(g.at(b, t, o)) * x.at(b, t, i);
        const double d = v - (b ? sum[at] / b : 0.0);
        spread[at] += d * d * b / (b + 1);
        sum[at] += v;
        squares += v * v;
      }
    }
    CHECK(std::fabs(sq_norm[b] - squares) <= 1e-6 * squares, "norm %d: %g, not %g", b, sq_norm[b],
          squares);
  }
  for (size_t k = 0; k < size; ++k) {
    CHECK(dw[k] == float(sum[k]), "dw[%zu] is %g, not %g", k, dw[k], sum[k]);
    if (Traits::kMoments) {
      CHECK(std::fabs(m2[k] - spread[k]) <= 1e-5 * spread[k] + 1e-3, "m2[%zu] is %g, not %g", k,
            m2[k], spread[k]);
    }
  }
}

template <typename Traits>
void all() {
  one<Traits>(3, 70, 200, 130, 2, 10);  // tails of everything; products read at once
  one<Traits>(3, 70, 200, 130, 2, 11);  // and read late
  one<Traits>(2, 330, 35, 20, 2, 13);   // more blocks than stages, an odd number of columns
  one<Traits>(5, 64, 40, 300, 2, 15);   // one block a sample, an odd tile of O
}

}  // namespace

int main() {
  all<Traits<false, 2>>();
  one<Traits<false, 2>>(3, 700, 9, 10, 8, 17, true);  // split over samples
#ifndef ONE_TILE                                      // compiles sooner
  all<Traits<false, 1>>();
  all<Traits<false, 2, kNarrow>>();
  all<Traits<true, 1>>();
  all<Traits<true, 2>>();
  one<Traits<true, 1>>(4, 410, 33, 330, 2, 19, true);  // whole tiles, and one that is split
#endif
  std::printf("kernel ok\n");
}
