// Weight and bias gradient of a linear layer with per-sample statistics, from the library's
// products: a sample's contribution to a block of the gradient is left in the cache, where one pass
// squares it and adds it to the sum.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <vector>

#include "linear_bias.h"
#include "sum_squares.h"

namespace gradstats::cpu::linear {

constexpr int64_t kBlockBytes = 1 << 19;    // a block, its sum and its M2 share a core's L2
constexpr int64_t kProduct = 1 << 20;       // multiply-adds that are worth another thread
constexpr int64_t kBlockRows = 64;          // the library slows down for fewer,
constexpr int64_t kBlockColumns = 1 << 10;  // and gains nothing from more

// Into how many blocks the gradient is cut: powers of two, more of them for more threads. The
// library adds up an element over positions alike wherever it is cut, and norms of blocks are added
// in double.
struct Cut {
  int64_t down = 1, across = 1;

  Cut(int64_t in, int64_t out, int64_t positions, int64_t bytes) {
    auto rows = [&] { return at::ceil_div(out, down); };
    auto columns = [&] { return at::ceil_div(in, across); };
    while (
        rows() * columns() * bytes > kBlockBytes ||
        (down * across < at::get_num_threads() && rows() * columns() * positions >= 2 * kProduct)) {
      (columns() > kBlockColumns || rows() < 2 * kBlockRows ? across : down) *= 2;
    }
  }
};

// Where one sum goes: the gradient, its M2 (null if not wanted), the squared norms (samples,).
template <typename A>
struct Result {
  A *sum, *m2, *sq_norm;
};

template <typename A, bool kMoments>
class Blocks {
  using Vec = at::vec::Vectorized<A>;
  static constexpr int64_t kLanes = Vec::size();

 public:
  // x (B, T, I), g (B, T, O), weight (O, I); bias (O,), its sum null if not wanted.
  Blocks(const at::Tensor& x, const at::Tensor& g, const Result<A>& weight, const Result<A>& bias)
      : x_(x),
        g_(g),
        weight_(weight),
        bias_(bias),
        samples_(x.size(0)),
        in_(x.size(2)),
        out_(g.size(2)),
        cut_(in_, out_, x.size(1), sizeof(A)),
        weight_norms_(cut_.down * cut_.across * samples_),
        bias_norms_(cut_.down * samples_) {}

  void run() {
    at::parallel_for(0, cut_.down * cut_.across, 1, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) block(k / cut_.across, k % cut_.across);
    });
    add_up(weight_norms_, weight_.sq_norm);
    if (bias_.sum != nullptr) add_up(bias_norms_, bias_.sq_norm);
  }

 private:
  void block(int64_t i, int64_t j) {
    const at::AutoDispatchBelowADInplaceOrView quick;  // no views for autograd
    static thread_local std::vector<A> scratch;        // kept from call to call
    const int64_t row = out_ * i / cut_.down, rows = out_ * (i + 1) / cut_.down - row;
    const int64_t column = in_ * j / cut_.across;
    const int64_t columns = in_ * (j + 1) / cut_.across - column;
    if (static_cast<int64_t>(scratch.size()) < rows * columns) scratch.resize(rows * columns);
    A* sums = weight_.sum + row * in_ + column;
    A* m2 = kMoments ? weight_.m2 + row * in_ + column : nullptr;
    const at::Tensor x = x_.select(0, 0).narrow(1, column, columns);
    const at::Tensor g = g_.select(0, 0).narrow(1, row, rows).t();
    at::Tensor first = at::from_blob(sums, {rows, columns}, {in_, 1}, x.options());
    at::Tensor later = at::from_blob(scratch.data(), {rows, columns}, x.options());
    const bool with_bias = j == 0 && bias_.sum != nullptr;
    Columns<A> biases(with_bias ? rows : 0, kMoments);
    for (int64_t b = 0; b < samples_; ++b) {
      move(x, x_, column, b);
      move(g, g_, row, b);
      at::cpu::mm_out(b == 0 ? first : later, g, x);
      double squares = 0;
      for (int64_t r = 0; r < rows; ++r) {
        if (b == 0) {
          squares += sum_squares(sums + r * in_, columns);
          if constexpr (kMoments) std::fill_n(m2 + r * in_, columns, A(0));
        } else {
          A* second = kMoments ? m2 + r * in_ : nullptr;
          squares += add(scratch.data() + r * columns, sums + r * in_, second, columns, b);
        }
      }
      weight_norms_[(i * cut_.across + j) * samples_ + b] = squares;
      if (with_bias) {  // while the product has g in the cache
        bias_norms_[i * samples_ + b] = biases.add(g.const_data_ptr<A>(), g.stride(1), g.size(1));
      }
    }
    if (with_bias) biases.write(bias_.sum + row, kMoments ? bias_.m2 + row : nullptr);
  }

  // Turns a view of some columns of `of` to sample b: new views would take as long as small
  // products.
  static void move(const at::Tensor& view, const at::Tensor& of, int64_t column, int64_t b) {
    const int64_t offset = of.storage_offset() + b * of.stride(0) + column * of.stride(2);
    view.unsafeGetTensorImpl()->set_storage_offset(offset);
  }

  // One row of sample b's contribution: its squared norm; the row is added to the sum of those
  // before it, M2 grows by d^2 b/(b+1), with d its distance from their mean (Welford 1962).
  static double add(const A* c, A* sum, A* m2, int64_t count, int64_t b) {
    const double n = static_cast<double>(b);
    const Vec inverse(static_cast<A>(1 / n)), weight(static_cast<A>(n / (n + 1)));
    Vec square[2] = {Vec(0), Vec(0)};
    int64_t k = 0;
    auto step = [&](Vec& square, int size) {
      const Vec v = Vec::loadu(c + k, size), before = Vec::loadu(sum + k, size);
      square = at::vec::fmadd(v, v, square);
      (before + v).store(sum + k, size);
      if constexpr (kMoments) {
        const Vec d = v - before * inverse;
        at::vec::fmadd(d * weight, d, Vec::loadu(m2 + k, size)).store(m2 + k, size);
      }
      k += size;
    };
    while (k + 2 * kLanes <= count) {
      step(square[0], kLanes);
      step(square[1], kLanes);
    }
    while (k < count) step(square[0], static_cast<int>(std::min(kLanes, count - k)));
    return lanes_sum(square[0] + square[1]);
  }

  // Over blocks, in fixed order.
  void add_up(const std::vector<double>& norms, A* out) const {
    for (int64_t b = 0; b < samples_; ++b) {
      double total = 0;
      for (size_t k = b; k < norms.size(); k += samples_) total += norms[k];
      out[b] = static_cast<A>(total);
    }
  }

  const at::Tensor &x_, &g_;
  const Result<A> weight_, bias_;
  const int64_t samples_, in_, out_;
  const Cut cut_;
  std::vector<double> weight_norms_, bias_norms_;
};

}  // namespace gradstats::cpu::linear
