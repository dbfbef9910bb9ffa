// Backward of LayerNorm and RMSNorm with per-sample statistics: one pass over the rows computes dx
// and, aligned with the samples, the sums Σ_t g x̂ and Σ_t g.
#include <ATen/Dispatch.h>
#include <c10/util/Unroll.h>

#include "../checks.h"
#include "../ops.h"
#include "sample_stats.h"

namespace gradstats::cpu {
namespace {

constexpr int64_t kRows = 2;     // rows taken together: the sums are loaded and stored once for all
constexpr int64_t kBlock = 256;  // rows summed before they are added on: bounds rounding errors
constexpr int64_t kMinShare = 64;  // a sample is not cut into fewer rows than this

template <typename T>
struct Row {
  const T *x, *g;
  T* dx;
  T mean, rstd;
};

// `Rows` rows of D numbers: adds their g x̂ to `dw` and their g to `db`, writes dx where wanted.
// The lambdas must be inlined: a call would keep the running sums in memory.
template <typename T, int64_t Rows, bool Center, bool Bias>
void rows_backward(const Row<T>* rows, const T* scale, int64_t d, bool input, T* dw, T* db) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const Vec zero(T(0));
  Vec gx_sum[kRows] = {zero, zero}, gxx_sum[kRows] = {zero, zero};
  const Row<T> row[kRows] = {rows[0], rows[Rows > 1]};
  const auto centered = [&](auto r, int64_t k, int64_t n) C10_ALWAYS_INLINE_ATTRIBUTE {
    const Vec x = Vec::loadu(row[r].x + k, n);
    return Center ? x - Vec(row[r].mean) : x;
  };
  const auto sums = [&](int64_t k, int64_t n) C10_ALWAYS_INLINE_ATTRIBUTE {
    const Vec gamma = scale == nullptr ? Vec(T(1)) : Vec::loadu(scale + k, n);
    Vec w = Vec::loadu(dw + k, n), b = Bias ? Vec::loadu(db + k, n) : zero;
    c10::ForcedUnroll<Rows>{}([&](auto r) C10_ALWAYS_INLINE_ATTRIBUTE {
      const Vec g = Vec::loadu(row[r].g + k, n), xhat = centered(r, k, n) * Vec(row[r].rstd);
      const Vec gx = g * gamma;
      w = at::vec::fmadd(g, xhat, w);
      if constexpr (Bias) b = b + g;
      if constexpr (Center) gx_sum[r] = gx_sum[r] + gx;
      gxx_sum[r] = at::vec::fmadd(gx, xhat, gxx_sum[r]);
    });
    w.store(dw + k, n);
    if constexpr (Bias) b.store(db + k, n);
  };
  const int64_t whole = d / kLanes * kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) sums(k, kLanes);
  if (whole < d) sums(whole, d - whole);
  if (!input) return;
  // dx = rstd g γ + slope (x − mean) + offset
  Vec slope[kRows] = {zero, zero}, offset[kRows] = {zero, zero};
  c10::ForcedUnroll<Rows>{}([&](auto r) C10_ALWAYS_INLINE_ATTRIBUTE {
    const T per = row[r].rstd / static_cast<T>(d);
    slope[r] = Vec(-sum_lanes(gxx_sum[r]) * row[r].rstd * per);
    if constexpr (Center) offset[r] = Vec(-sum_lanes(gx_sum[r]) * per);
  });
  const auto grads = [&](int64_t k, int64_t n) C10_ALWAYS_INLINE_ATTRIBUTE {
    const Vec gamma = scale == nullptr ? Vec(T(1)) : Vec::loadu(scale + k, n);
    c10::ForcedUnroll<Rows>{}([&](auto r) C10_ALWAYS_INLINE_ATTRIBUTE {
      const Vec gx = Vec::loadu(row[r].g + k, n) * gamma;
      const Vec inner = at::vec::fmadd(centered(r, k, n), slope[r], offset[r]);
      at::vec::fmadd(gx, Vec(row[r].rstd), inner).store(row[r].dx + k, n);
    });
  };
  for (int64_t k = 0; k < whole; k += kLanes) grads(k, kLanes);
  if (whole < d) grads(whole, d - whole);
}

// Where the rows of a (B, T, D) tensor lie; asking the tensor costs more than a short row's sums.
template <typename Scalar>
struct Rows {
  Scalar* data = nullptr;
  int64_t sample = 0, position = 0;

  Rows() = default;
  explicit Rows(const Tensor& t)
      : data(const_cast<Scalar*>(t.const_data_ptr<std::remove_const_t<Scalar>>())),
        sample(t.stride(0)),
        position(t.stride(1)) {}
  Scalar* at(int64_t b, int64_t t) const { return data + b * sample + t * position; }
};

template <typename Scalar>
class LayerNorm {
 public:
  using T = Wide<Scalar>;

  LayerNorm(const Tensor& g, const Tensor& x, const Tensor& mean, const Tensor& rstd,
            const Tensor& scale, const Tensor& dx, bool bias)
      : g_(g),
        x_(x),
        rstd_(rstd.const_data_ptr<T>()),
        length_(x.size(1)),
        d_(x.size(2)),
        kernel_(pick(mean.defined(), bias, false)),
        single_(pick(mean.defined(), bias, true)) {
    if (dx.defined()) dx_ = Rows<Scalar>(dx);
    if (mean.defined()) mean_ = mean.const_data_ptr<T>();
    if (scale.defined()) scale_ = scale.const_data_ptr<T>();
  }

  // Rows [begin, end) of sample b: the sums go to sums (dw (D), db (D)), whatever was there before.
  void run(int64_t b, int64_t begin, int64_t end, T* sums, std::vector<T>& scratch) const {
    T *block = at_line(scratch, (2 + 3 * kRows) * d_), *wide = block + 2 * d_;
    const bool one = end - begin <= kBlock;
    std::fill_n(sums, 2 * d_, T(0));
    for (int64_t t = begin; t < end; t += kBlock) {
      if (!one) std::fill_n(block, 2 * d_, T(0));
      T* into = one ? sums : block;
      const int64_t stop = std::min(end, t + kBlock);
      int64_t r = t;
      for (; r + kRows <= stop; r += kRows) step(b, r, kRows, into, wide);
      for (; r < stop; ++r) step(b, r, 1, into, wide);
      if (!one) {
        for (int64_t k = 0; k < 2 * d_; ++k) sums[k] += block[k];
      }
    }
  }

 private:
  using Kernel = void (*)(const Row<T>*, const T*, int64_t, bool, T*, T*);

  static Kernel pick(bool center, bool bias, bool single) {
    if (single) {
      return center ? (bias ? rows_backward<T, 1, true, true> : rows_backward<T, 1, true, false>)
                    : (bias ? rows_backward<T, 1, false, true> : rows_backward<T, 1, false, false>);
    }
    return center
               ? (bias ? rows_backward<T, kRows, true, true> : rows_backward<T, kRows, true, false>)
               : (bias ? rows_backward<T, kRows, false, true>
                       : rows_backward<T, kRows, false, false>);
  }

  void step(int64_t b, int64_t t, int64_t count, T* sums, T* wide) const {
    Row<T> rows[kRows];
    constexpr bool kSame = std::is_same_v<Scalar, T>;
    const bool input = dx_.data != nullptr;
    for (int64_t r = 0; r < count; ++r) {
      T* own = wide + 3 * r * d_;
      const int64_t at = b * length_ + t + r;
      rows[r].x = widen(x_.at(b, t + r), d_, own);
      rows[r].g = widen(g_.at(b, t + r), d_, own + d_);
      rows[r].dx = own + 2 * d_;
      if constexpr (kSame) rows[r].dx = input ? dx_.at(b, t + r) : nullptr;
      rows[r].mean = mean_ == nullptr ? T(0) : mean_[at];
      rows[r].rstd = rstd_[at];
    }
    (count == 1 ? single_ : kernel_)(rows, scale_, d_, input, sums, sums + d_);
    if constexpr (!kSame) {
      for (int64_t r = 0; input && r < count; ++r) {
        at::vec::convert(rows[r].dx, dx_.at(b, t + r), d_);
      }
    }
  }

  Rows<const Scalar> g_, x_;
  Rows<Scalar> dx_;
  const T *mean_ = nullptr, *rstd_, *scale_ = nullptr;
  int64_t length_, d_;
  Kernel kernel_, single_;
};

template <typename Scalar>
NormStats run(const Tensor& g, const Tensor& x, const Tensor& mean, const Tensor& rstd,
              const Tensor& scale, at::ScalarType dtype, bool input, bool weight, bool bias,
              bool moments) {
  using T = Wide<Scalar>;
  const int64_t batch = x.size(0), length = x.size(1), d = x.size(2);
  const Tensor dx = input ? at::empty(x.sizes(), x.options()) : Tensor();  // contiguous
  const LayerNorm<Scalar> norm(g, x, mean, rstd, scale, dx, bias);
  SampleStats<T> w(weight, batch, d, moments, x.options()), b(bias, batch, d, moments, x.options());
  // Few samples for the threads: cut each into shares of its positions, added up in order below.
  const int64_t wanted =
      at::ceil_div<int64_t>(8 * at::get_num_threads(), std::max<int64_t>(1, batch));
  const int64_t shares = std::max<int64_t>(1, std::min(wanted, length / kMinShare));
  Tensor slab;
  if (shares > 1 && at::get_num_threads() > 1) {
    slab = at::empty({batch, shares, 2 * d}, rstd.options());
    at::parallel_for(0, batch * shares, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch;
      for (int64_t k = begin; k < end; ++k) {
        const int64_t s = k % shares;
        norm.run(k / shares, split(length, shares, s), split(length, shares, s + 1),
                 slab.data_ptr<T>() + k * 2 * d, scratch);
      }
    });
  }
  for_each_part(batch, [&](int64_t p, int64_t begin, int64_t end) {
    std::vector<T> scratch, own;
    for (int64_t i = begin; i < end; ++i) {
      T* sums = nullptr;
      if (slab.defined()) {
        sums = slab.data_ptr<T>() + i * shares * 2 * d;
        for (int64_t s = 1; s < shares; ++s) {
          for (int64_t k = 0; k < 2 * d; ++k) sums[k] += sums[s * 2 * d + k];
        }
      } else {
        sums = at_line(own, 2 * d);
        norm.run(i, 0, length, sums, scratch);
      }
      w.add(p, i, sums);
      b.add(p, i, sums + d);
    }
  });
  auto [dw, w_sq, w_m2] = w.finish(dtype);
  auto [db, b_sq, b_m2] = b.finish(dtype);
  return {input ? dx : at::empty({0}, x.options()), dw, db, w_sq, b_sq, w_m2, b_m2};
}

}  // namespace

NormStats layer_norm_stats(const Tensor& g, const Tensor& x, const std::optional<Tensor>& mean,
                           const Tensor& rstd, const std::optional<Tensor>& scale, bool input,
                           bool weight, bool bias, bool moments) {
  GRADSTATS_CHECK_CPU("layer_norm_stats", g);
  GRADSTATS_CHECK_CPU("layer_norm_stats", x);
  GRADSTATS_CHECK_CPU("layer_norm_stats", rstd);
  GRADSTATS_CHECK_DTYPE("layer_norm_stats", x);
  GRADSTATS_CHECK_DIM("layer_norm_stats", x, 3, "(B, T, D)");
  TORCH_CHECK(g.sizes() == x.sizes() && g.scalar_type() == x.scalar_type(),
              "layer_norm_stats: g must have the shape and dtype of x, ", x.sizes(), " ",
              x.scalar_type(), ", got ", g.sizes(), " ", g.scalar_type());
  const auto rows = x.sizes().slice(0, 2);
  TORCH_CHECK(rstd.sizes() == rows, "layer_norm_stats: rstd must be (B, T) of x ", x.sizes(),
              ", got ", rstd.sizes());
  TORCH_CHECK(!mean || mean->sizes() == rows, "layer_norm_stats: mean must be (B, T) of x ",
              x.sizes(), ", got ", mean->sizes());
  TORCH_CHECK(!scale || (scale->dim() == 1 && scale->size(0) == x.size(2)),
              "layer_norm_stats: scale must be (D,) of x ", x.sizes(), ", got ", scale->sizes());
  const auto wide = stats_dtype(x.scalar_type());
  // Rows must be contiguous; where they lie does not matter.
  const auto by_rows = [](const Tensor& t) { return t.stride(2) == 1 ? t : t.contiguous(); };
  const auto dense = [&](const Tensor& t) { return t.to(wide).contiguous(); };
  const auto dtype = scale ? scale->scalar_type() : x.scalar_type();
  return AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "layer_norm_stats", [&] {
    return run<scalar_t>(by_rows(g), by_rows(x), mean ? dense(*mean) : Tensor(), dense(rstd),
                         scale ? dense(*scale) : Tensor(), dtype, input, weight, bias, moments);
  });
}

}  // namespace gradstats::cpu
