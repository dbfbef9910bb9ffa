// Bias gradient of a linear layer with per-sample statistics: sums over positions, then over
// samples, a block of columns at a time so that every block's sums stay in the L1 cache.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>

#include <vector>

#include "linear_tile.h"

namespace gradstats::cpu::linear {

constexpr int64_t kColumnBlock = 512;

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

// db and m2: (out,), m2 may be null; sq_norm: (samples,). The samples are walked in order.
template <typename In>
void bias_stats(const Rows<In>& g, int64_t samples, int64_t positions, int64_t out, In* db,
                Acc<In>* sq_norm, Acc<In>* m2) {
  using A = Acc<In>;
  const int64_t blocks = at::ceil_div(out, kColumnBlock);
  const Tensor sums =
      at::empty({samples, out}, at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value));
  A* s = sums.data_ptr<A>();
  std::vector<double> partial(samples * blocks);
  const int64_t work = positions * std::min(out, kColumnBlock);
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, work));
  at::parallel_for(0, samples * blocks, grain, [&](int64_t begin, int64_t end) {
    double total[kColumnBlock];
    for (int64_t k = begin; k < end; ++k) {
      const int64_t b = k / blocks, c = k % blocks * kColumnBlock;
      const int64_t count = std::min(kColumnBlock, out - c);
      A* dst = s + b * out + c;
      column_sums(g.data + b * g.sample_stride + c, g.row_stride, positions, count, total);
      for (int64_t i = 0; i < count; ++i) dst[i] = static_cast<A>(total[i]);
      partial[k] = sum_squares(dst, count);
    }
  });
  for (int64_t b = 0; b < samples; ++b) {
    double total = 0;
    for (int64_t k = 0; k < blocks; ++k) total += partial[b * blocks + k];
    sq_norm[b] = static_cast<A>(total);
  }
  const int64_t column_grain = at::ceil_div<int64_t>(1 << 16, kColumnBlock * samples);
  at::parallel_for(0, blocks, column_grain, [&](int64_t begin, int64_t end) {
    double total[kColumnBlock];
    for (int64_t k = begin; k < end; ++k) {
      const int64_t c0 = k * kColumnBlock, count = std::min(kColumnBlock, out - c0);
      column_sums(s + c0, out, samples, count, total);
      for (int64_t c = 0; c < count; ++c) db[c0 + c] = static_cast<In>(total[c]);
      if (m2 == nullptr) continue;
      A mean[kColumnBlock];
      for (int64_t c = 0; c < count; ++c) mean[c] = static_cast<A>(total[c] / samples);
      std::fill_n(m2 + c0, count, A(0));
      for (int64_t b = 0; b < samples && samples > 1; ++b) {
        const A* row = s + b * out + c0;
        for (int64_t c = 0; c < count; ++c) {
          const A d = row[c] - mean[c];
          m2[c0 + c] += d * d;
        }
      }
    }
  });
}

}  // namespace gradstats::cpu::linear
