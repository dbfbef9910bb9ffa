// Backward of GroupNorm with per-sample statistics. The sums over positions that each channel
// contributes to scale and shift are those that dx needs, so a group is read twice, the second time
// from cache.
#include <ATen/Dispatch.h>

#include "../checks.h"
#include "../ops.h"
#include "sample_stats.h"

namespace gradstats::cpu {
namespace {

constexpr int64_t kBlock = 4096;  // terms summed in lanes before they are added on in double

// (Σ g, Σ g (x − mean)) over n numbers.
template <typename T>
std::pair<double, double> channel_sums(const T* g, const T* x, T mean, int64_t n) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const Vec center(mean);
  double shift = 0, scale = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    Vec s0(T(0)), s1(T(0)), w0(T(0)), w1(T(0));
    const auto take = [&](int64_t k, int64_t count, Vec& s, Vec& w) {
      const Vec gv = Vec::loadu(g + k, count);  // zeros beyond the end, so that they add nothing
      s = s + gv;
      w = at::vec::fmadd(gv, Vec::loadu(x + k, count) - center, w);
    };
    int64_t k = begin;
    for (; k + 2 * kLanes <= end; k += 2 * kLanes) {
      take(k, kLanes, s0, w0);
      take(k + kLanes, kLanes, s1, w1);
    }
    for (; k < end; k += kLanes) take(k, std::min(kLanes, end - k), s0, w0);
    shift += sum_lanes(s0 + s1);
    scale += sum_lanes(w0 + w1);
  }
  return {shift, scale};
}

// dx = a g + b (x − mean) + c over n numbers.
template <typename T>
void channel_backward(const T* g, const T* x, T mean, T a, T b, T c, int64_t n, T* dx) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const Vec av(a), bv(b), cv(c), center(mean);
  const auto take = [&](int64_t k, int64_t count) {
    const Vec inner = at::vec::fmadd(Vec::loadu(x + k, count) - center, bv, cv);
    at::vec::fmadd(av, Vec::loadu(g + k, count), inner).store(dx + k, count);
  };
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) take(k, kLanes);
  if (k < n) take(k, n - k);
}

// One group of one sample, (channels, S): per channel Σ g x̂ to w and Σ g to b; dx unless null.
template <typename Scalar, typename T = Wide<Scalar>>
void group_backward(const Scalar* g, const Scalar* x, T mean, T rstd, const T* scale,
                    int64_t channels, int64_t s, T* w, T* b, Scalar* dx, std::vector<T>& scratch) {
  constexpr bool kSame = std::is_same_v<Scalar, T>;
  if (!kSame) scratch.resize(3 * channels * s);
  const T* gw = widen(g, channels * s, scratch.data());
  const T* xw = widen(x, channels * s, scratch.data() + channels * s);
  double g_sum = 0, gx_sum = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const auto [shift, scaled] = channel_sums(gw + c * s, xw + c * s, mean, s);
    b[c] = static_cast<T>(shift);
    w[c] = static_cast<T>(scaled * rstd);
    const double gamma = scale == nullptr ? 1.0 : static_cast<double>(scale[c]);
    g_sum += gamma * shift;
    gx_sum += gamma * scaled * rstd;
  }
  if (dx == nullptr) return;
  const double n = static_cast<double>(channels) * static_cast<double>(s);
  const T slope = static_cast<T>(-gx_sum / n * rstd * rstd),
          offset = static_cast<T>(-g_sum / n * rstd);
  T* out = scratch.data() + 2 * channels * s;
  if constexpr (kSame) out = dx;
  for (int64_t c = 0; c < channels; ++c) {
    const T gain = scale == nullptr ? rstd : scale[c] * rstd;
    channel_backward(gw + c * s, xw + c * s, mean, gain, slope, offset, s, out + c * s);
  }
  if constexpr (!kSame) at::vec::convert(out, dx, channels * s);
}

template <typename Scalar>
NormStats run(const Tensor& g, const Tensor& x, const Tensor& mean, const Tensor& rstd,
              const Tensor& scale, at::ScalarType dtype, bool input, bool weight, bool bias,
              bool moments) {
  using T = Wide<Scalar>;
  const int64_t batch = x.size(0), channels = x.size(1), s = x.size(2), groups = mean.size(1);
  const int64_t width = channels / groups;
  const Tensor dx = at::empty(input ? x.sizes() : IntArrayRef{0}, x.options());
  const Tensor sums = at::empty({2, batch, channels}, mean.options());
  const Scalar *g_data = g.const_data_ptr<Scalar>(), *x_data = x.const_data_ptr<Scalar>();
  const T *mean_data = mean.const_data_ptr<T>(), *rstd_data = rstd.const_data_ptr<T>();
  const T* scale_data = scale.defined() ? scale.const_data_ptr<T>() : nullptr;
  Scalar* dx_data = input ? dx.data_ptr<Scalar>() : nullptr;
  T *w_sums = sums.data_ptr<T>(), *b_sums = w_sums + batch * channels;
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, width * s));
  at::parallel_for(0, batch * groups, grain, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch;
    for (int64_t k = begin; k < end; ++k) {
      const int64_t at = k * width * s;
      group_backward<Scalar>(g_data + at, x_data + at, mean_data[k], rstd_data[k],
                             scale_data == nullptr ? nullptr : scale_data + k % groups * width,
                             width, s, w_sums + k * width, b_sums + k * width,
                             input ? dx_data + at : nullptr, scratch);
    }
  });
  SampleStats<T> w(weight, batch, channels, moments, x.options());
  SampleStats<T> b(bias, batch, channels, moments, x.options());
  for_each_part(batch, [&](int64_t p, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      w.add(p, i, w_sums + i * channels);
      b.add(p, i, b_sums + i * channels);
    }
  });
  auto [dw, w_sq, w_m2] = w.finish(dtype);
  auto [db, b_sq, b_m2] = b.finish(dtype);
  return {dx, dw, db, w_sq, b_sq, w_m2, b_m2};
}

}  // namespace

NormStats group_norm_stats(const Tensor& g, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                           const std::optional<Tensor>& scale, bool input, bool weight, bool bias,
                           bool moments) {
  GRADSTATS_CHECK_CPU("group_norm_stats", g);
  GRADSTATS_CHECK_CPU("group_norm_stats", x);
  GRADSTATS_CHECK_CPU("group_norm_stats", mean);
  GRADSTATS_CHECK_CPU("group_norm_stats", rstd);
  GRADSTATS_CHECK_DTYPE("group_norm_stats", x);
  GRADSTATS_CHECK_DIM("group_norm_stats", x, 3, "(B, C, S)");
  TORCH_CHECK(g.sizes() == x.sizes() && g.scalar_type() == x.scalar_type(),
              "group_norm_stats: g must have the shape and dtype of x, ", x.sizes(), " ",
              x.scalar_type(), ", got ", g.sizes(), " ", g.scalar_type());
  TORCH_CHECK(mean.dim() == 2 && mean.size(0) == x.size(0) && mean.size(1) > 0 &&
                  x.size(1) % mean.size(1) == 0,
              "group_norm_stats: mean must be (B, groups), groups dividing the channels of x ",
              x.sizes(), ", got ", mean.sizes());
  TORCH_CHECK(rstd.sizes() == mean.sizes(), "group_norm_stats: rstd must have the shape of mean, ",
              mean.sizes(), ", got ", rstd.sizes());
  TORCH_CHECK(!scale || (scale->dim() == 1 && scale->size(0) == x.size(1)),
              "group_norm_stats: scale must be (C,) of x ", x.sizes(), ", got ", scale->sizes());
  const auto wide = stats_dtype(x.scalar_type());
  const auto dense = [&](const Tensor& t) { return t.to(wide).contiguous(); };
  const auto dtype = scale ? scale->scalar_type() : x.scalar_type();
  return AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "group_norm_stats", [&] {
    return run<scalar_t>(g.contiguous(), x.contiguous(), dense(mean), dense(rstd),
                         scale ? dense(*scale) : Tensor(), dtype, input, weight, bias, moments);
  });
}

}  // namespace gradstats::cpu
