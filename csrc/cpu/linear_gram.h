// Per-sample squared norms of a linear layer's weight gradient from inner products of positions.
//
// |sum_t g_t x_t^T|^2 = sum_ts (x_t . x_s)(g_t . g_s), in blocks of kSide x kSide positions whose
// inner products never leave the registers; the lower triangle of blocks counts twice.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "linear_tile.h"

namespace gradstats::cpu::linear {

constexpr int kSide = 4;

// Rounding grows with how far the positions of a sample cancel each other: the Gram sum adds terms
// as large as sum_t |x_t|^2 |g_t|^2. A norm below this fraction of it is computed again, fused.
constexpr double kCancelled = 1.0 / 16;

// out[r][c] = a_r . b_c
template <int rows, int cols, typename A>
void inner_products(const A* a, int64_t lda, const A* b, int64_t ldb, int64_t n,
                    double (&out)[kSide][kSide]) {
  using Vec = at::vec::Vectorized<A>;
  constexpr int64_t kLanes = Vec::size(), kRun = 256 * kLanes;  // a run is summed in A
  for (auto& row : out) std::fill(std::begin(row), std::end(row), 0.0);
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = std::min(n, begin + kRun);
    Vec acc[rows][cols];
    c10::ForcedUnroll<rows * cols>{}([&](auto k) { acc[k / cols][k % cols] = Vec(0); });
    auto step = [&](auto load) C10_ALWAYS_INLINE_ATTRIBUTE {
      Vec right[cols];
      c10::ForcedUnroll<cols>{}([&](auto c) { right[c] = load(b + c * ldb); });
      c10::ForcedUnroll<rows>{}([&](auto r) {
        const Vec left = load(a + r * lda);
        c10::ForcedUnroll<cols>{}(
            [&](auto c) { acc[r][c] = at::vec::fmadd(left, right[c], acc[r][c]); });
      });
    };
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) step([&](const A* p) { return Vec::loadu(p + i); });
    if (i < end) {
      step([&](const A* p) { return Vec::loadu(p + i, static_cast<int>(end - i)); });
    }
    c10::ForcedUnroll<rows * cols>{}(
        [&](auto k) { out[k / cols][k % cols] += lanes_sum(acc[k / cols][k % cols]); });
  }
}

template <typename A>
void inner_products(int64_t rows, int64_t cols, const A* a, int64_t lda, const A* b, int64_t ldb,
                    int64_t n, double (&out)[kSide][kSide]) {
  auto with_side = [](int64_t side, auto f) {
    switch (side) {
      case 1:
        return f(std::integral_constant<int, 1>{});
      case 2:
        return f(std::integral_constant<int, 2>{});
      case 3:
        return f(std::integral_constant<int, 3>{});
      default:
        return f(std::integral_constant<int, 4>{});
    }
  };
  with_side(rows, [&](auto r) {
    with_side(cols, [&](auto c) { inner_products<r(), c()>(a, lda, b, ldb, n, out); });
  });
}

// Rows of one sample in A, where they lie if they are that already.
template <typename In>
const Acc<In>* widen(const Rows<In>& rows, int64_t sample, int64_t count, int64_t n, int64_t& ld,
                     std::vector<Acc<In>>& scratch) {
  const In* data = rows.data + sample * rows.sample_stride;
  if constexpr (std::is_same_v<In, Acc<In>>) {
    ld = rows.row_stride;
    return data;
  } else {
    ld = n;
    scratch.resize(count * n);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t i = 0; i < n; ++i) scratch[t * n + i] = data[t * rows.row_stride + i];
    }
    return scratch.data();
  }
}

// Squared norms of all samples into sq_norm; returns the samples that cancel too far.
template <typename In>
std::vector<int64_t> gram_norms(const Rows<In>& x, const Rows<In>& g, int64_t samples,
                                int64_t positions, int64_t in, int64_t out, Acc<In>* sq_norm) {
  std::vector<char> cancelled(samples, 0);
  const int64_t work = positions * positions * (in + out) / 2;
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, work));
  at::parallel_for(0, samples, grain, [&](int64_t begin, int64_t end) {
    std::vector<Acc<In>> x_wide, g_wide;
    double xx[kSide][kSide], gg[kSide][kSide];
    for (int64_t b = begin; b < end; ++b) {
      int64_t ldx = 0, ldg = 0;
      const auto* xb = widen(x, b, positions, in, ldx, x_wide);
      const auto* gb = widen(g, b, positions, out, ldg, g_wide);
      double total = 0, diagonal = 0;
      for (int64_t t = 0; t < positions; t += kSide) {
        const int64_t rows = std::min<int64_t>(kSide, positions - t);
        for (int64_t s = 0; s <= t; s += kSide) {
          const int64_t cols = std::min<int64_t>(kSide, positions - s);
          inner_products(rows, cols, xb + t * ldx, ldx, xb + s * ldx, ldx, in, xx);
          inner_products(rows, cols, gb + t * ldg, ldg, gb + s * ldg, ldg, out, gg);
          double sum = 0;
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < cols; ++c) sum += xx[r][c] * gg[r][c];
            if (s == t) diagonal += xx[r][r] * gg[r][r];
          }
          total += s == t ? sum : 2 * sum;
        }
      }
      cancelled[b] = total < kCancelled * diagonal;
      sq_norm[b] = static_cast<Acc<In>>(std::max(total, 0.0));
    }
  });
  std::vector<int64_t> result;
  for (int64_t b = 0; b < samples; ++b) {
    if (cancelled[b]) result.push_back(b);
  }
  return result;
}

}  // namespace gradstats::cpu::linear
