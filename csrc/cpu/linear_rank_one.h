// One position to a sample: its gradient has rank one, and the products are the library's.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>

#include <vector>

#include "linear_fused.h"
#include "linear_squares.h"

namespace gradstats::cpu::linear {

// The sum of squares less the squared mean loses digits where all samples nearly agree. Rows with
// an element below this fraction of its sum of squares are computed again, sample by sample.
constexpr double kAgree = 1.0 / 64;
constexpr double kAgreeOnTiles = 1.0 / 16;  // whose squares are some ten times as far off

// Squared norms of the samples' rows of x (where `in` is not zero) and g, one after the other.
template <typename In>
std::vector<double> row_norms(const Rows<In>& x, int64_t in, const Rows<In>& g, int64_t out,
                              int64_t samples) {
  std::vector<double> norms(2 * samples);
  const int64_t grain = at::ceil_div<int64_t>(1 << 15, std::max<int64_t>(1, in + out));
  at::parallel_for(0, samples, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      norms[b] = in == 0 ? 0 : sum_squares(x.data + b * x.sample_stride, in);
      norms[samples + b] = sum_squares(g.data + b * g.sample_stride, out);
    }
  });
  return norms;
}

// m2 -= sum^2 / samples, not below zero; whether an element lost digits.
template <typename A>
bool centre(const A* sum, A* m2, int64_t count, int64_t samples) {
  using Vec = at::vec::Vectorized<A>;
  const Vec zero(0), inverse(A(1) / static_cast<A>(samples)), least(static_cast<A>(kAgree));
  Vec worst(0);
  for (int64_t k = 0; k < count; k += Vec::size()) {
    const int n = static_cast<int>(std::min<int64_t>(Vec::size(), count - k));
    const Vec total = Vec::loadu(sum + k, n), squares = Vec::loadu(m2 + k, n);
    const Vec deviations = squares - total * (total * inverse);
    worst = at::vec::minimum(worst, deviations - least * squares);
    at::vec::maximum(deviations, zero).store(m2 + k, n);
  }
  A lanes[Vec::size()];
  worst.store(lanes);
  return std::any_of(lanes, lanes + Vec::size(), [](A v) { return v < 0; });
}

// Where matrix tiles serve: m2 from dw's sums, on them; whether it did. `norms`: of x, then of g.
template <typename In>
bool squares_on_tiles(const Problem<In>& p, const std::vector<double>& norms, const Acc<In>* sums,
                      std::vector<char>& lost) {
#ifdef GRADSTATS_TILES
  if constexpr (std::is_same_v<Acc<In>, float>) {
    if (!SquaresOnTiles::fits(p.samples, p.in, p.out)) return false;
    const auto middle = norms.begin() + p.samples;
    const double x = *std::max_element(norms.begin(), middle);
    const double g = *std::max_element(middle, norms.end());
    // Not finite, or nothing but zeros: as the library has it.
    if (!std::all_of(norms.begin(), norms.end(), [](double v) { return std::isfinite(v); }) ||
        x == 0 || g == 0) {
      return false;
    }
    SquaresOnTiles(p.samples, p.in, p.out, x, g)
        .run(p.x, p.g, sums, p.m2, static_cast<float>(kAgreeOnTiles), lost);
    return true;
  }
#endif
  return false;
}

// dw and m2 of a problem with one position to a sample: x (B, I), g (B, O), dw and m2 (O, I).
template <typename In>
void rank_one_moments(const Problem<In>& p, const at::Tensor& x, const at::Tensor& g,
                      const std::vector<double>& norms, at::Tensor& dw, at::Tensor& m2) {
  using A = Acc<In>;
  const auto wide = m2.scalar_type();
  const at::Tensor x_wide = x.to(wide), g_wide = g.to(wide);
  at::Tensor sum = dw.scalar_type() == wide ? dw : at::empty_like(m2);
  at::mm_out(sum, g_wide.t(), x_wide);
  if (!sum.is_same(dw)) dw.copy_(sum);
  const A* sums = sum.const_data_ptr<A>();
  std::vector<char> lost(p.out, 0);
  if (!squares_on_tiles(p, norms, sums, lost)) {
    at::mm_out(m2, g_wide.square().t(), x_wide.square());
    const int64_t grain = at::ceil_div<int64_t>(1 << 14, p.in);
    at::parallel_for(0, p.out, grain, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        lost[o] = centre(sums + o * p.in, p.m2 + o * p.in, p.in, p.samples);
      }
    });
  }
  for (int64_t begin = 0, end; begin < p.out; begin = end + 1) {
    for (end = begin; end < p.out && lost[end]; ++end) {
    }
    if (begin == end) continue;
    Problem<In> again = p;
    again.g.data += begin;
    again.m2 += begin * p.in;
    again.out = end - begin;
    again.dw = nullptr;
    Pass<In, true>(again).run();
  }
}

}  // namespace gradstats::cpu::linear
