// One position to a sample: the rows of x and g are read once, for their squared norms and for the
// sums of g's columns, which are the bias gradient.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>

#include <algorithm>
#include <vector>

#include "linear_tile.h"

namespace gradstats::cpu::linear {

struct RowSums {
  std::vector<double> x, g;                 // squared norms of the rows
  std::vector<double> columns, of_squares;  // of g and of its squares, (out,); empty if not wanted
};

// Four rows at a time, so that a column's sum is loaded and stored once for four elements; sixteen
// rows are added up as they are, everything else in double.
template <typename In, bool squares>
class ColumnSums {
  using A = Acc<In>;
  using Vec = at::vec::Vectorized<A>;
  static constexpr int64_t kRows = 4, kAsTheyAre = 16, kBlock = 4096;
  static constexpr int kHalves = std::is_same_v<In, A> ? 1 : 2;  // vectors of A in one of In
  static constexpr int64_t kStep = kHalves * Vec::size();

 public:
  explicit ColumnSums(int64_t out) : out_(out), sums_(out), squares_(squares ? out : 0) {}

  // Adds rows to `columns` and `of_squares`, (out,) each; writes their squared norms.
  void add(const In* rows, int64_t stride, int64_t count, double* norms, double* columns,
           double* of_squares) {
    for (int64_t begin = 0; begin < count; begin += kAsTheyAre) {
      const int64_t end = std::min(count, begin + kAsTheyAre);
      std::fill(sums_.begin(), sums_.end(), A(0));
      std::fill(squares_.begin(), squares_.end(), A(0));
      int64_t b = begin;
      for (; b + kRows <= end; b += kRows) add_rows<kRows>(rows + b * stride, stride, norms + b);
      for (; b < end; ++b) add_rows<1>(rows + b * stride, stride, norms + b);
      for (int64_t c = 0; c < out_; ++c) columns[c] += sums_[c];
      if constexpr (squares) {
        for (int64_t c = 0; c < out_; ++c) of_squares[c] += squares_[c];
      }
    }
  }

 private:
  template <int kCount>
  void add_rows(const In* rows, int64_t stride, double* norms) {
    std::fill_n(norms, kCount, 0.0);
    for (int64_t begin = 0; begin < out_; begin += kBlock) {
      const int64_t end = std::min(out_, begin + kBlock);
      Vec norm[kCount];
      for (Vec& n : norm) n = Vec(0);
      int64_t c = begin;
      for (; c + kStep <= end; c += kStep) {
        Vec sum[kHalves], square[kHalves];
        for (int h = 0; h < kHalves; ++h) {
          sum[h] = Vec::loadu(sums_.data() + c + h * Vec::size());
          if constexpr (squares) square[h] = Vec::loadu(squares_.data() + c + h * Vec::size());
        }
        for (int r = 0; r < kCount; ++r) {
          Vec v[kHalves];
          load(rows + r * stride + c, v);
          for (int h = 0; h < kHalves; ++h) {
            sum[h] = sum[h] + v[h];
            norm[r] = at::vec::fmadd(v[h], v[h], norm[r]);
            if constexpr (squares) square[h] = at::vec::fmadd(v[h], v[h], square[h]);
          }
        }
        for (int h = 0; h < kHalves; ++h) {
          sum[h].store(sums_.data() + c + h * Vec::size());
          if constexpr (squares) square[h].store(squares_.data() + c + h * Vec::size());
        }
      }
      for (int r = 0; r < kCount; ++r) norms[r] += static_cast<double>(lanes_sum(norm[r]));
      for (; c < end; ++c) {
        for (int r = 0; r < kCount; ++r) {
          const A v = static_cast<A>(rows[r * stride + c]);
          sums_[c] += v;
          if constexpr (squares) squares_[c] += v * v;
          norms[r] += static_cast<double>(v * v);
        }
      }
    }
  }

  static void load(const In* p, Vec (&v)[kHalves]) {
    if constexpr (kHalves == 1) {
      v[0] = Vec::loadu(p);
    } else {
      std::tie(v[0], v[1]) = at::vec::convert_to_float<In>(at::vec::Vectorized<In>::loadu(p));
    }
  }

  const int64_t out_;
  std::vector<A> sums_, squares_;
};

// x (where `in` is not zero) and g of samples with one row each. Pieces do not depend on the number
// of threads, so neither does the result.
template <bool squares, typename In>
RowSums row_sums(const Rows<In>& x, int64_t in, const Rows<In>& g, int64_t out, int64_t samples,
                 bool columns) {
  RowSums found{std::vector<double>(samples), std::vector<double>(samples), {}, {}};
  const int64_t piece = std::max<int64_t>(32, at::ceil_div<int64_t>(samples, 32));
  const int64_t pieces = at::ceil_div(samples, piece), width = columns ? out : 0;
  std::vector<double> sums(pieces * width), of_squares(squares ? pieces * width : 0);
  const int64_t grain = at::ceil_div<int64_t>(1 << 15, std::max<int64_t>(1, piece * (in + out)));
  at::parallel_for(0, pieces, grain, [&](int64_t begin, int64_t end) {
    ColumnSums<In, squares> of_columns(width);
    for (int64_t k = begin; k < end; ++k) {
      const int64_t first = k * piece, count = std::min(piece, samples - first);
      for (int64_t b = first; b < first + count; ++b) {
        if (in != 0) found.x[b] = sum_squares(x.data + b * x.sample_stride, in);
        if (!columns) found.g[b] = sum_squares(g.data + b * g.sample_stride, out);
      }
      if (columns) {
        of_columns.add(g.data + first * g.sample_stride, g.sample_stride, count,
                       found.g.data() + first, sums.data() + k * width,
                       squares ? of_squares.data() + k * width : nullptr);
      }
    }
  });
  for (int64_t k = 1; k < pieces; ++k) {
    for (int64_t c = 0; c < width; ++c) sums[c] += sums[k * width + c];
    for (int64_t c = 0; squares && c < width; ++c) of_squares[c] += of_squares[k * width + c];
  }
  sums.resize(width);
  of_squares.resize(squares ? width : 0);
  found.columns = std::move(sums);
  found.of_squares = std::move(of_squares);
  return found;
}

}  // namespace gradstats::cpu::linear
