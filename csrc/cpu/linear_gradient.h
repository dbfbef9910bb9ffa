// The weight gradient alone, by the library: cut between threads by rows, each of which squares its
// own while they are still in its cache.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "sum_squares.h"

namespace gradstats::cpu::linear {

constexpr int64_t kLeastRows = 256;   // of a thread: the library slows down for fewer
constexpr int64_t kSquaredRows = 64;  // at a time, so that sums do not depend on who has which rows

// dw = gᵀ x for x (N, I), g (N, O), dw (O, I) without gaps; its squared norm, where that was had.
template <typename A>
std::optional<double> squared_gradient(const at::Tensor& x, const at::Tensor& g, at::Tensor& dw) {
  const int64_t out = dw.size(0), in = dw.size(1), threads = at::get_num_threads();
  if (out < threads * kLeastRows) {
    at::mm_out(dw, g.t(), x);
    return std::nullopt;
  }
  const int64_t pieces = at::ceil_div(out, kSquaredRows);
  const auto row_of = [&](int64_t piece) { return std::min(out, piece * kSquaredRows); };
  A* const data = dw.data_ptr<A>();
  std::vector<double> squares(pieces);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView quick;  // no views for autograd
    const int64_t first = pieces * begin / threads, last = pieces * end / threads;
    const int64_t row = row_of(first), rows = row_of(last) - row;
    at::Tensor part = dw.narrow(0, row, rows);
    at::cpu::mm_out(part, g.narrow(1, row, rows).t(), x);
    for (int64_t k = first; k < last; ++k) {
      squares[k] = sum_squares(data + row_of(k) * in, (row_of(k + 1) - row_of(k)) * in);
    }
  });
  return std::accumulate(squares.begin(), squares.end(), 0.0);
}

}  // namespace gradstats::cpu::linear
