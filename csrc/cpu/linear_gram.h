// Per-sample squared norms of a linear layer's weight gradient from inner products of positions.
//
// |sum_t g_t x_t^T|^2 = sum_ts (x_t . x_s)(g_t . g_s), in blocks of kSide x kSide positions whose
// inner products never leave the registers; the lower triangle of blocks counts twice.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>

#include <vector>

#include "linear_tile.h"
#include "scratch.h"

namespace gradstats::cpu::linear {

constexpr int kSide = 4;
constexpr int kEntries = kSide * kSide;  // of a block; entry k is that of row k / kSide

// Rounding grows with how far the positions of a sample cancel each other: the Gram sum adds terms
// as large as sum_t |x_t|^2 |g_t|^2. A norm below this fraction of it is computed again, fused.
constexpr double kCancelled = 1.0 / 16;

// Adds the sum over the lanes of each vector to `out`, all vectors at once: neighbouring lanes are
// added, which makes one vector of two, until each lane holds a sum.
template <int lanes, typename A, int n>
C10_ALWAYS_INLINE void add_lanes(const at::vec::Vectorized<A> (&v)[n], double* out) {
  using Vec = at::vec::Vectorized<A>;
  if constexpr (lanes > 1) {
    static_assert(n % 2 == 0);
    Vec halves[n / 2];
    c10::ForcedUnroll<n / 2>{}([&](auto k) C10_ALWAYS_INLINE_ATTRIBUTE {
      const auto [even, odd] = at::vec::deinterleave2(v[2 * k], v[2 * k + 1]);
      halves[k] = even + odd;
    });
    add_lanes<lanes / 2, A>(halves, out);
  } else {
    alignas(64) A sums[n * Vec::size()];
    for (int k = 0; k < n; ++k) v[k].store(sums + k * Vec::size());
    for (int k = 0; k < n * Vec::size(); ++k) out[k] += sums[k];
  }
}

// out[r * kSide + c] = a_r . b_c; of a block on the diagonal, where b is a, c <= r. The rest of
// `out` is zero.
template <int rows, bool diagonal, typename A>
void inner_products(const A* a, const A* b, int64_t ld, int64_t n, double (&out)[kEntries]) {
  using Vec = at::vec::Vectorized<A>;
  constexpr int cols = diagonal ? rows : kSide;
  constexpr int64_t kLanes = Vec::size(), kRun = 256 * kLanes;  // a run is summed in A
  std::fill(std::begin(out), std::end(out), 0.0);
  for (int64_t begin = 0; begin < n; begin += kRun) {
    const int64_t end = std::min(n, begin + kRun);
    Vec acc[kEntries];
    c10::ForcedUnroll<kEntries>{}([&](auto k) { acc[k] = Vec(0); });
    auto step = [&](auto load) C10_ALWAYS_INLINE_ATTRIBUTE {
      Vec right[cols];
      c10::ForcedUnroll<cols>{}([&](auto c) { right[c] = load(b + c * ld); });
      c10::ForcedUnroll<rows>{}([&](auto r) {
        const Vec left = diagonal ? right[r < cols ? r : 0] : load(a + r * ld);
        c10::ForcedUnroll<(diagonal ? r + 1 : cols)>{}([&](auto c) {
          acc[r * kSide + c] = at::vec::fmadd(left, right[c], acc[r * kSide + c]);
        });
      });
    };
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) step([&](const A* p) { return Vec::loadu(p + i); });
    if (i < end) {
      step([&](const A* p) { return Vec::loadu(p + i, static_cast<int>(end - i)); });
    }
    add_lanes<kLanes, A>(acc, out);
  }
}

// Of `rows` positions from a on with those from b on.
template <bool diagonal, typename A>
void inner_products(int64_t rows, const A* a, const A* b, int64_t ld, int64_t n,
                    double (&out)[kEntries]) {
  switch (rows) {
    case 1:
      return inner_products<1, diagonal>(a, b, ld, n, out);
    case 2:
      return inner_products<2, diagonal>(a, b, ld, n, out);
    case 3:
      return inner_products<3, diagonal>(a, b, ld, n, out);
    default:
      return inner_products<kSide, diagonal>(a, b, ld, n, out);
  }
}

// Rows of one sample in A, where they lie if they are that already.
template <typename In, typename A = Acc<In>>
const A* widen(const Rows<In>& rows, int64_t sample, int64_t count, int64_t n, int64_t& ld,
               std::vector<A>& scratch) {
  const In* data = rows.at(sample, 0);
  if constexpr (std::is_same_v<In, A>) {
    ld = rows.row_stride;
    return data;
  } else {
    ld = n;
    A* const wide = at_line(scratch, count * n);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t i = 0; i < n; ++i) wide[t * n + i] = data[t * rows.row_stride + i];
    }
    return wide;
  }
}

// Squared norms of all samples into sq_norm; returns the samples that cancel too far.
template <typename In>
std::vector<int64_t> gram_norms(const Rows<In>& x, const Rows<In>& g, int64_t samples,
                                int64_t positions, int64_t in, int64_t out, Acc<In>* sq_norm) {
  std::vector<char> cancelled(samples, 0);
  const int64_t work = positions * positions * (in + out) / 2;
  const int64_t grain = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, work));
  const int64_t tiles = at::ceil_div<int64_t>(positions, kSide), blocks = tiles * (tiles + 1) / 2;
  at::parallel_for(0, samples, grain, [&](int64_t begin, int64_t end) {
    std::vector<Acc<In>> x_wide, g_wide;
    double xx[kEntries], gg[kEntries];
    for (int64_t b = begin; b < end; ++b) {
      int64_t ldx = 0, ldg = 0;
      const auto* xb = widen(x, b, positions, in, ldx, x_wide);
      const auto* gb = widen(g, b, positions, out, ldg, g_wide);
      double below[kEntries] = {}, on[kEntries] = {};  // of blocks below the diagonal and on it
      int64_t block = 0, asked = 0;
      auto ask_ahead = [&] {
        for (const int64_t until = positions * ++block / blocks; asked < until; ++asked) {
          prefetch_row(x.at(b + 1, asked), in);
          prefetch_row(g.at(b + 1, asked), out);
        }
      };
      for (int64_t t = 0; t < positions; t += kSide) {
        const int64_t rows = std::min<int64_t>(kSide, positions - t);
        const auto *xt = xb + t * ldx, *gt = gb + t * ldg;
        for (int64_t s = 0; s < t; s += kSide) {
          if (b + 1 < end) ask_ahead();
          inner_products<false>(rows, xt, xb + s * ldx, ldx, in, xx);
          inner_products<false>(rows, gt, gb + s * ldg, ldg, out, gg);
          for (int k = 0; k < kEntries; ++k) below[k] += xx[k] * gg[k];
        }
        if (b + 1 < end) ask_ahead();
        inner_products<true>(rows, xt, xt, ldx, in, xx);
        inner_products<true>(rows, gt, gt, ldg, out, gg);
        for (int k = 0; k < kEntries; ++k) on[k] += xx[k] * gg[k];
      }
      double lower = 0, diagonal = 0;
      for (int k = 0; k < kEntries; ++k) lower += below[k] + on[k];
      for (int r = 0; r < kSide; ++r) diagonal += on[r * kSide + r];
      const double total = 2 * lower - diagonal;
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
