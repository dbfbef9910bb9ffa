// Weight gradient of a convolution with per-sample statistics: each sample's gradient is summed in
// registers from its activation packed in cache, and squared and added there before it is gone.
#include <ATen/Parallel.h>

#include "../ops.h"
#include "conv_check.h"
#include "conv_samples.h"
#include "conv_tap_stats.h"
#include "sample_stats.h"

namespace gradstats::cpu {
namespace {

using conv::Plan;

// The work is cut into parts of the samples, each with sums of its own, and where those are too few
// for the threads, or their sums too large for the caches, into shares of the panels as well.
struct Cut {
  int64_t parts, shares;

  Cut(const Plan& plan, int64_t bytes) {
    constexpr int64_t kCacheBytes = int64_t{1} << 20, kSlabBytes = int64_t{1} << 26;
    const int64_t threads = at::get_num_threads();
    const int64_t weight = std::max<int64_t>(1, plan.units() * plan.panel_size() * bytes);
    const bool even = plan.units() % threads == 0 || plan.units() >= 4 * threads;
    parts = weight > kCacheBytes && even ? 1 : std::max<int64_t>(1, kSlabBytes / weight);
    parts = std::max<int64_t>(1, std::min({parts, threads, plan.geo.batch}));
    shares = std::max<int64_t>(1, std::min(plan.units(), threads / parts));
  }
};

// (slices, panels, taps x channels, lanes) to (O, I/groups, *kernel_size)
template <typename T>
Tensor unpack(const Tensor& packed, const Plan& plan, IntArrayRef kernel_size) {
  const int64_t channels = plan.depthwise ? 1 : plan.width, taps = plan.rows / channels;
  std::vector<int64_t> shape{plan.geo.out_channels, channels};
  shape.insert(shape.end(), kernel_size.begin(), kernel_size.end());
  const Tensor out = at::empty(shape, packed.options());
  const T* src = packed.const_data_ptr<T>();
  T* dst = out.data_ptr<T>();
  at::parallel_for(0, plan.units(), at::ceil_div<int64_t>(1 << 14, plan.panel_size()),
                   [&](int64_t begin, int64_t end) {
                     std::vector<T> rows(plan.panel_size());
                     for (int64_t unit = begin; unit < end; ++unit) {
                       const int64_t lane = unit % plan.panels * plan.lanes;
                       const int64_t first = unit / plan.panels * plan.channels_per_slice() + lane;
                       const int64_t count = std::min({plan.lanes, plan.channels_per_slice() - lane,
                                                       plan.geo.out_channels - first});
                       conv::pack(src + unit * plan.panel_size(), plan.lanes, 1, plan.rows, count,
                                  rows.data(), plan.rows);
                       for (int64_t o = 0; o < count; ++o) {
                         const T* from = rows.data() + o * plan.rows;
                         T* to = dst + (first + o) * plan.rows;
                         for (int64_t i = 0; i < channels; ++i) {
                           for (int64_t k = 0; k < taps; ++k)
                             to[i * taps + k] = from[k * channels + i];
                         }
                       }
                     }
                   });
  return out;
}

template <typename T>
std::tuple<Tensor, Tensor, Tensor> weight_stats(const conv::Geometry& geo, const Tensor& x,
                                                const Tensor& g, IntArrayRef kernel_size,
                                                bool moments) {
  if (conv::by_taps<T>(geo)) return conv::tap_stats<T>(geo, x, g, kernel_size, moments);
  constexpr int64_t kLanes = at::vec::Vectorized<T>::size();
  const bool narrow = geo.out_channels / (geo.groups == geo.in_channels ? 1 : geo.groups) <= kLanes;
  const Plan plan(geo, narrow ? kLanes : 2 * kLanes, conv::kMaxRows);
  const Cut cut(plan, sizeof(T));
  const int64_t n = plan.units() * plan.panel_size();
  const Tensor sum = at::zeros({cut.parts, n}, x.options());
  const Tensor m2 = moments ? at::zeros({cut.parts, n}, x.options()) : Tensor();
  const Tensor sq = at::zeros({cut.shares, geo.batch}, x.options().dtype(at::kDouble));
  T* m2_data = moments ? m2.data_ptr<T>() : nullptr;
  at::parallel_for(0, cut.parts * cut.shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t p = item / cut.shares, q = item % cut.shares;
      conv::WeightGradient<T>(plan, x, g, sum.data_ptr<T>() + p * n,
                              moments ? m2_data + p * n : nullptr,
                              sq.data_ptr<double>() + q * geo.batch)
          .run(split(geo.batch, cut.parts, p), split(geo.batch, cut.parts, p + 1),
               split(plan.units(), cut.shares, q), split(plan.units(), cut.shares, q + 1));
    }
  });
  merge_parts(sum.data_ptr<T>(), m2_data, geo.batch, cut.parts, n);
  return {unpack<T>(sum[0], plan, kernel_size), sq.sum(0).to(x.scalar_type()),
          moments ? unpack<T>(m2[0], plan, kernel_size) : at::empty({0}, x.options())};
}

// c: (B, O), each sample's sum over positions.
template <typename T>
std::tuple<Tensor, Tensor, Tensor> bias_stats(const Tensor& c, bool moments, at::ScalarType dtype) {
  SampleStats<T> stats(true, c.size(0), c.size(1), moments, c.options());
  for_each_part(c.size(0), [&](int64_t p, int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      stats.add(p, b, c.const_data_ptr<T>() + b * c.size(1));
    }
  });
  return stats.finish(dtype);
}

}  // namespace

LinearStats conv_stats(const Tensor& x, const Tensor& g, IntArrayRef kernel_size,
                       IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation,
                       int64_t groups, bool weight, bool bias, bool moments) {
  const conv::Geometry geo = conv::check(x, g, kernel_size, stride, padding, dilation, groups);
  const auto wide = stats_dtype(x.scalar_type());
  // What is not wanted is empty; results of an operation must not share memory, not even none.
  const auto none = [&](at::ScalarType dtype) { return at::empty({0}, x.options().dtype(dtype)); };
  Tensor dw = none(x.scalar_type()), db = none(g.scalar_type());
  Tensor w_sq = none(wide), b_sq = none(wide), w_m2 = none(wide), b_m2 = none(wide);
  const Tensor gw = g.to(wide);
  if (weight) {
    Tensor xw = x.to(wide);
    conv::Geometry cut = geo;
    if (groups > 1 && geo.in_channels == groups && geo.out_channels > groups) {
      // Several outputs per channel: repeat the channel, so that each output has its own.
      xw = xw.repeat_interleave(geo.out_channels / groups, 1);
      cut.in_channels = cut.groups = geo.out_channels;
    }
    conv::cut_stride(cut, xw);
    std::tie(dw, w_sq, w_m2) = wide == at::kDouble
                                   ? weight_stats<double>(cut, xw, gw, kernel_size, moments)
                                   : weight_stats<float>(cut, xw, gw, kernel_size, moments);
    dw = dw.to(x.scalar_type());
  }
  if (bias) {
    const Tensor c = gw.flatten(2).sum(2).contiguous();
    std::tie(db, b_sq, b_m2) = wide == at::kDouble ? bias_stats<double>(c, moments, g.scalar_type())
                                                   : bias_stats<float>(c, moments, g.scalar_type());
  }
  return {dw, db, w_sq, b_sq, w_m2, b_m2};
}

}  // namespace gradstats::cpu
