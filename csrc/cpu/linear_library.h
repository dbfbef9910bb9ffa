// Weight and bias gradient of a linear layer with per-sample statistics, from the library's
// products: two samples' contributions to a block of the gradient are left in the cache, where one
// pass squares them and adds them to the sum.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <ATen/ops/mm_cpu_dispatch.h>

#include <vector>

#include "linear_bias.h"
#include "linear_tile.h"
#include "scratch.h"
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
  // Samples that one pass takes: their sum is read and written once for all of them. The sum, M2
  // and two contributions still fit into the L2; a third gains nothing.
  static constexpr int64_t kTogether = 2;

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
    A* const contributions = at_line(scratch, kTogether * rows * columns);
    A* sums = weight_.sum + row * in_ + column;
    A* m2 = kMoments ? weight_.m2 + row * in_ + column : nullptr;
    const at::Tensor x = x_.select(0, 0).narrow(1, column, columns);
    const at::Tensor g = g_.select(0, 0).narrow(1, row, rows).t();
    at::Tensor first = at::from_blob(sums, {rows, columns}, {in_, 1}, x.options());
    const at::Tensor kept = at::from_blob(contributions, {kTogether, rows, columns}, x.options());
    at::Tensor later = kept.select(0, 0);
    const bool with_bias = j == 0 && bias_.sum != nullptr;
    Columns<A> biases(with_bias ? rows : 0, kMoments);
    double* const norms = weight_norms_.data() + (i * cut_.across + j) * samples_;
    const auto product = [&](int64_t b, at::Tensor& to) {
      move(x, x_, column, b);
      move(g, g_, row, b);
      at::cpu::mm_out(to, g, x);
      if (with_bias) {  // while the product has g in the cache
        bias_norms_[i * samples_ + b] = biases.add(g.const_data_ptr<A>(), g.stride(1), g.size(1));
      }
    };
    // What the next products read is asked for in a pass, which itself reads nothing but the L2.
    const Rows<A> x_rows{x_.const_data_ptr<A>(), x_.stride(0), x_.stride(1)};
    const Rows<A> g_rows{g_.const_data_ptr<A>(), g_.stride(0), g_.stride(1)};
    const int64_t positions = x_.size(1);
    const int64_t row_bytes = (rows + columns) * static_cast<int64_t>(sizeof(A));
    product(0, first);
    for (int64_t r = 0; r < rows; ++r) {
      norms[0] += sum_squares(sums + r * in_, columns);
      if constexpr (kMoments) std::fill_n(m2 + r * in_, columns, A(0));
    }
    for (int64_t b = 1; b < samples_; b += kTogether) {
      const int64_t count = std::min(kTogether, samples_ - b);
      for (int64_t k = 0; k < count; ++k) {
        later.unsafeGetTensorImpl()->set_storage_offset(k * rows * columns);
        product(b + k, later);
      }
      const int64_t next = b + count, left = std::min(kTogether, samples_ - next);
      const int64_t ahead = std::min(left * positions, kBlockBytes / row_bytes);
      int64_t asked = 0;
      for (int64_t r = 0; r < rows; ++r) {
        for (; asked < ahead * (r + 1) / rows; ++asked) {
          const int64_t sample = next + asked / positions, t = asked % positions;
          prefetch_row(x_rows.at(sample, t) + column, columns);
          prefetch_row(g_rows.at(sample, t) + row, rows);
        }
        const A* c = contributions + r * columns;
        A* const sum = sums + r * in_;
        A* const second = kMoments ? m2 + r * in_ : nullptr;
        if (count == kTogether) {
          add<kTogether>(c, rows * columns, sum, second, columns, b, norms);
        } else {
          add<1>(c, rows * columns, sum, second, columns, b, norms);
        }
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

  // A row of the contributions of samples b, b + 1, .., which lie `apart`: adds their squares to
  // `norms` and them, one after the other, to the sum of those before. For each, M2 grows by
  // d^2 n/(n+1), with d its distance from the mean of the n before it (Welford 1962).
  template <int64_t kCount>
  static void add(const A* c, int64_t apart, A* sum, A* m2, int64_t count, int64_t b,
                  double* norms) {
    Vec inverse[kCount], weight[kCount], square[kCount];
    for (int j = 0; j < kCount; ++j) {
      const double n = static_cast<double>(b + j);
      inverse[j] = Vec(static_cast<A>(1 / n));
      weight[j] = Vec(static_cast<A>(n / (n + 1)));
      square[j] = Vec(0);
    }
    auto step = [&](int64_t k, int size) C10_ALWAYS_INLINE_ATTRIBUTE {
      Vec total = Vec::loadu(sum + k, size), spread(0);
      if constexpr (kMoments) spread = Vec::loadu(m2 + k, size);
      c10::ForcedUnroll<kCount>{}([&](auto j) C10_ALWAYS_INLINE_ATTRIBUTE {
        const Vec v = Vec::loadu(c + j * apart + k, size);
        square[j] = at::vec::fmadd(v, v, square[j]);
        if constexpr (kMoments) {
          const Vec d = v - total * inverse[j];
          spread = at::vec::fmadd(d * weight[j], d, spread);
        }
        total = total + v;
      });
      total.store(sum + k, size);
      if constexpr (kMoments) spread.store(m2 + k, size);
    };
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) step(k, kLanes);
    if (k < count) step(k, static_cast<int>(count - k));
    for (int j = 0; j < kCount; ++j) norms[b + j] += lanes_sum(square[j]);
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
