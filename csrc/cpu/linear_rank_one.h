// One position to a sample: its gradient has rank one, and the products are the library's.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>

#include <cmath>
#include <optional>
#include <vector>

#include "linear_fused.h"
#include "linear_gradient.h"
#include "linear_rows.h"
#include "linear_squares.h"

namespace gradstats::cpu::linear {

// The sum of squares less the squared mean loses digits where all samples nearly agree. Rows with
// an element below this fraction of its sum of squares are computed again, sample by sample.
constexpr double kAgree = 1.0 / 64;
constexpr double kAgreeOnTiles = 1.0 / 16;  // whose squares are some ten times as far off

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

// Where matrix tiles serve: m2 from dw's sums, on them; whether it did.
template <typename In>
bool squares_on_tiles(const Problem<In>& p, const RowSums& rows, const Acc<In>* sums,
                      std::vector<char>& lost) {
#ifdef GRADSTATS_TILES
  if constexpr (std::is_same_v<Acc<In>, float>) {
    if (!SquaresOnTiles::fits(p.samples, p.in, p.out)) return false;
    const double x = *std::max_element(rows.x.begin(), rows.x.end());
    const double g = *std::max_element(rows.g.begin(), rows.g.end());
    // Not finite, or nothing but zeros: as the library has it.
    const auto finite = [](double v) { return std::isfinite(v); };
    if (!std::all_of(rows.x.begin(), rows.x.end(), finite) ||
        !std::all_of(rows.g.begin(), rows.g.end(), finite) || x == 0 || g == 0) {
      return false;
    }
    SquaresOnTiles(p.samples, p.in, p.out, x, g)
        .run(p.x, p.g, sums, p.m2, static_cast<float>(kAgreeOnTiles), lost);
    return true;
  }
#endif
  return false;
}

// dw and m2 of a problem with one position to a sample: x (B, I), g (B, O), dw and m2 (O, I). dw's
// squared norm, where that was had.
template <typename In>
std::optional<double> rank_one_moments(const Problem<In>& p, const at::Tensor& x,
                                       const at::Tensor& g, const RowSums& rows, at::Tensor& dw,
                                       at::Tensor& m2) {
  using A = Acc<In>;
  const auto wide = m2.scalar_type();
  const at::Tensor x_wide = x.to(wide), g_wide = g.to(wide);
  at::Tensor sum = dw.scalar_type() == wide ? dw : at::empty_like(m2);
  std::optional<double> sq_norm = squared_gradient<A>(x_wide, g_wide, sum);
  if (!sum.is_same(dw)) {
    dw.copy_(sum);
    sq_norm.reset();  // of what was rounded then
  }
  const A* sums = sum.const_data_ptr<A>();
  std::vector<char> lost(p.out, 0);
  if (!squares_on_tiles(p, rows, sums, lost)) {
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
  return sq_norm;
}

// db, its squared norms and m2 (or nothing) of a bias with one position to a sample. False where an
// element lost digits; nothing is valid then.
template <typename In>
bool rank_one_bias(const RowSums& rows, In* db, Acc<In>* sq_norm, Acc<In>* m2) {
  const auto samples = static_cast<double>(rows.g.size());
  const int64_t out = rows.columns.size();
  for (int64_t c = 0; m2 != nullptr && c < out; ++c) {
    const double sum = rows.columns[c], spread = rows.of_squares[c] - sum * sum / samples;
    if (spread < kAgree * rows.of_squares[c]) return false;
    m2[c] = static_cast<Acc<In>>(spread);
  }
  for (int64_t c = 0; c < out; ++c) db[c] = static_cast<In>(rows.columns[c]);
  std::copy(rows.g.begin(), rows.g.end(), sq_norm);
  return true;
}

}  // namespace gradstats::cpu::linear
