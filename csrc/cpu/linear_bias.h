// Bias gradient of a linear layer with per-sample statistics: a block of columns at a time, whose
// samples are walked in order. What a block holds of them stays in registers and the L1 cache.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>

#include <vector>

#include "linear_tile.h"

namespace gradstats::cpu::linear {

constexpr int64_t kColumnBlock = 64;

// sums[c] = sum over t of row t's column c. In double: these sums often cancel, over positions and
// over samples, and reading the numbers takes longer than widening them.
template <typename In>
void column_sums(const In* rows, int64_t stride, int64_t positions, int64_t count, double* sums) {
  std::fill_n(sums, count, 0.0);
  int64_t t = 0;
  for (; t + 4 <= positions; t += 4) {
    const In *p = rows + t * stride, *q = p + stride, *u = q + stride, *v = u + stride;
    for (int64_t c = 0; c < count; ++c) {
      sums[c] += (double(Acc<In>(p[c])) + double(Acc<In>(q[c]))) +
                 (double(Acc<In>(u[c])) + double(Acc<In>(v[c])));
    }
  }
  for (; t < positions; ++t) {
    for (int64_t c = 0; c < count; ++c) sums[c] += double(Acc<In>(rows[t * stride + c]));
  }
}

// db and m2: (out,), m2 may be null; sq_norm: (samples,). m2 grows by d^2 * b / (b + 1) with d the
// distance of sample b from the mean of those before it (Welford 1962), so it is never negative.
template <typename In>
void bias_stats(const Rows<In>& g, int64_t samples, int64_t positions, int64_t out, In* db,
                Acc<In>* sq_norm, Acc<In>* m2) {
  using A = Acc<In>;
  const int64_t blocks = at::ceil_div(out, kColumnBlock);
  std::vector<double> partial(samples * blocks);
  const int64_t work = samples * positions * std::min(out, kColumnBlock);
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, work));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t c0 = k * kColumnBlock, count = std::min(kColumnBlock, out - c0);
      double each[kColumnBlock], sum[kColumnBlock] = {}, mean[kColumnBlock] = {},
                                 spread[kColumnBlock] = {};
      for (int64_t b = 0; b < samples; ++b) {
        column_sums(g.data + b * g.sample_stride + c0, g.row_stride, positions, count, each);
        double squares = 0;
        for (int64_t c = 0; c < count; ++c) squares += each[c] * each[c];
        partial[b * blocks + k] = squares;
        if (m2 != nullptr) {
          const double n = static_cast<double>(b), part = n / (n + 1), step = 1 / (n + 1);
          for (int64_t c = 0; c < count; ++c) {
            const double d = each[c] - mean[c];
            spread[c] += d * d * part;
            mean[c] += d * step;
          }
        }
        for (int64_t c = 0; c < count; ++c) sum[c] += each[c];
      }
      for (int64_t c = 0; c < count; ++c) db[c0 + c] = static_cast<In>(sum[c]);
      if (m2 == nullptr) continue;
      for (int64_t c = 0; c < count; ++c) m2[c0 + c] = static_cast<A>(spread[c]);
    }
  });
  for (int64_t b = 0; b < samples; ++b) {
    double total = 0;
    for (int64_t k = 0; k < blocks; ++k) total += partial[b * blocks + k];
    sq_norm[b] = static_cast<A>(total);
  }
}

}  // namespace gradstats::cpu::linear
