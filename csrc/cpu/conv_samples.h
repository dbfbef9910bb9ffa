// The walk over samples of a convolution's weight gradient: pack, sum tile by tile, take
// statistics.
#pragma once

#include <vector>

#include "conv_plan.h"
#include "conv_tile.h"
#include "sample_stats.h"

namespace gradstats::cpu::conv {

using at::Tensor;

inline Dims spatial_strides(const Tensor& t) {
  Dims strides{0, 0, 0};
  const auto all = t.strides().slice(2);
  std::copy(all.begin(), all.end(), strides.end() - static_cast<int64_t>(all.size()));
  return strides;
}

// Samples whose operands are packed together, so that a tile of the sums stays in L1 for all of
// them: matters where there are few positions, and so little work between two visits of a tile.
inline int64_t samples_at_once(const Plan& plan, int64_t bytes) {
  if (plan.blocks.size() > 2) return 1;
  constexpr int64_t kBytes = 1 << 18;
  const int64_t positions = std::max<int64_t>(1, plan.positions);
  const int64_t fit = kBytes / std::max<int64_t>(1, plan.padded_size * bytes);
  return std::max<int64_t>(1, std::min(kBlock / positions, fit));
}

template <typename T>
class WeightGradient {
 public:
  WeightGradient(const Plan& plan, const Tensor& x, const Tensor& g, T* sum, T* m2, double* sq)
      : plan_(plan),
        x_(x),
        g_(g),
        sum_(sum),
        m2_(m2),
        sq_(sq),
        two_(plan.lanes > at::vec::Vectorized<T>::size()),
        chunk_(samples_at_once(plan, sizeof(T))),
        x_strides_(spatial_strides(x)),
        g_strides_(spatial_strides(g)) {
    for (const Tile& tile : plan.tiles) {
      kernels_.push_back(tile_sum_of<T>(tile.size, two_, plan.depthwise));
    }
    g_rows_ = g_strides_[0] == plan.geo.out[1] * g_strides_[1] &&
              g_strides_[1] == plan.geo.out[2] * g_strides_[2];
  }

  // Units [first, last) of samples [begin, end); sums start from zero in sum_ and m2_.
  void run(int64_t begin, int64_t end, int64_t first, int64_t last) {
    std::vector<T> of_xs, of_gs, of_grad;
    T* const xs = at_line(of_xs, chunk_ * plan_.padded_size);
    T* const gs = at_line(of_gs, chunk_ * plan_.positions * plan_.lanes);
    T* const grad = at_line(of_grad, plan_.panel_size());
    for (int64_t b = begin; b < end; b += chunk_) {
      const int64_t count = std::min(chunk_, end - b);
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t slice = unit / plan_.panels;
        if (unit == first || unit % plan_.panels == 0) pack_x(b, count, slice, xs);
        pack_g(b, count, slice, unit % plan_.panels, gs);
        const int64_t at = unit * plan_.panel_size();
        panel(xs, gs, grad, b - begin, count, sum_ + at, m2_ == nullptr ? nullptr : m2_ + at,
              sq_ + b);
      }
    }
  }

 private:
  void pack_x(int64_t b, int64_t count, int64_t slice, T* dst) const {
    const int64_t first = slice * plan_.width;
    const int64_t channels = std::min(plan_.width, plan_.geo.in_channels - first);
    // The last slice of a depthwise convolution may be narrower than what the buffer held before.
    if (channels < plan_.width) std::fill_n(dst, count * plan_.padded_size, T(0));
    for (int64_t s = 0; s < count; ++s, dst += plan_.padded_size) {
      const T* src = x_.const_data_ptr<T>() + (b + s) * x_.stride(0) + first * x_.stride(1);
      pack_activation(plan_, src, x_strides_, x_.stride(1), channels, dst);
    }
  }

  void pack_g(int64_t b, int64_t count, int64_t slice, int64_t panel, T* dst) const {
    const Dims& out = plan_.geo.out;
    const int64_t in_slice = panel * plan_.lanes;
    const int64_t first = slice * plan_.channels_per_slice() + in_slice;
    const int64_t channels = std::min(
        {plan_.lanes, plan_.channels_per_slice() - in_slice, plan_.geo.out_channels - first});
    if (channels < plan_.lanes) std::fill_n(dst, count * plan_.positions * plan_.lanes, T(0));
    for (int64_t s = 0; s < count; ++s) {
      const T* src = g_.const_data_ptr<T>() + (b + s) * g_.stride(0) + first * g_.stride(1);
      const int64_t length = g_rows_ ? plan_.positions : out[2];
      for (int64_t d = 0; d < (g_rows_ ? 1 : out[0]); ++d) {
        for (int64_t h = 0; h < (g_rows_ ? 1 : out[1]); ++h, dst += length * plan_.lanes) {
          pack(src + d * g_strides_[0] + h * g_strides_[1], g_.stride(1), g_strides_[2], channels,
               length, dst, plan_.lanes);
        }
      }
    }
  }

  void panel(const T* xs, const T* gs, T* grad, int64_t seen, int64_t count, T* sum, T* m2,
             double* sq) const {
    const auto blocks = static_cast<int64_t>(plan_.blocks.size()) - 1;
    for (int64_t k = 0; k < blocks; ++k) {
      const Segment* from = plan_.segments.data() + plan_.blocks[k];
      const Segment* to = plan_.segments.data() + plan_.blocks[k + 1];
      for (size_t t = 0; t < plan_.tiles.size(); ++t) {
        const Tile& tile = plan_.tiles[t];
        const int64_t at = tile.row * plan_.lanes, size = tile.size * plan_.lanes;
        // With a single block nothing needs to outlive the tile: reuse one that is in L1.
        T* out = blocks == 1 ? grad : grad + at;
        for (int64_t s = 0; s < count; ++s) {
          kernels_[t](xs + s * plan_.padded_size + tile.x,
                      gs + (s * plan_.positions + k * kBlock) * plan_.lanes, from, to, plan_.step,
                      plan_.tap, k == 0, out);
          if (k + 1 < blocks) continue;
          sq[s] += absorb(out, size, seen + s, sum + at, m2 == nullptr ? nullptr : m2 + at);
        }
      }
    }
  }

  const Plan& plan_;
  const Tensor &x_, &g_;
  T *sum_, *m2_;
  double* sq_;
  bool two_, g_rows_;
  int64_t chunk_;
  Dims x_strides_, g_strides_;
  std::vector<TileSum<T>> kernels_;
};

}  // namespace gradstats::cpu::conv
