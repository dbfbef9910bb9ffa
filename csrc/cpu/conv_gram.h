// Per-sample squared norms of a convolution's weight gradient from inner products of positions,
// without a patch matrix.
//
// |G|² = Σ_ts A[t,s] (g_t · g_s), where A[t,s], the inner product of the patches at t and s, is a
// sum over the taps of inner products of single pixels: A[t,s] = Σ_k P[t+k, s+k], P = XᵀX over the
// channels. Pixels meet only at distances that are multiples of the stride, so they are sorted by
// their remainders, and P is computed within each class.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "conv_samples.h"
#include "conv_taps.h"
#include "scratch.h"

namespace gradstats::cpu::conv {

// Rounding grows with how far the positions of a sample cancel each other (see linear_gram.h). A
// norm below this fraction of the sum without cross terms is computed again from the gradient.
constexpr double kCancelled = 1.0 / 16;

// One tap within one class: position t of the output meets pixel t + shift of the class.
struct Shift {
  int64_t kind;
  Dims low, high, by;  // output positions [low, high) along each dimension
};

struct Classes {
  std::vector<Dims> size;
  std::vector<int64_t> begin;  // class c is columns [begin[c], begin[c + 1]) of the sorted sample
  std::vector<Dims> pixels;    // in sorted order
  std::vector<Shift> shifts;   // of the taps that see anything

  explicit Classes(const Geometry& g) {
    begin.push_back(0);
    each(g.stride, [&](const Dims& r) {
      Dims n;
      for (int d = 0; d < 3; ++d)
        n[d] = at::ceil_div(std::max<int64_t>(0, g.in[d] - r[d]), g.stride[d]);
      each(n, [&](const Dims& q) {
        Dims p;
        for (int d = 0; d < 3; ++d) p[d] = q[d] * g.stride[d] + r[d];
        pixels.push_back(p);
      });
      size.push_back(n);
      begin.push_back(static_cast<int64_t>(pixels.size()));
    });
    each(g.kernel, [&](const Dims& k) {
      Shift s{};
      for (int d = 0; d < 3; ++d) {
        const int64_t offset = k[d] * g.dilation[d] - g.padding[d];
        const int64_t rest = (offset % g.stride[d] + g.stride[d]) % g.stride[d];
        s.kind = s.kind * g.stride[d] + rest;
        s.by[d] = (offset - rest) / g.stride[d];
        std::tie(s.low[d], s.high[d]) = Taps::inside(g, d, k[d]);
        if (s.low[d] >= s.high[d]) return;
      }
      shifts.push_back(s);
    });
  }

 private:
  template <typename F>
  static void each(const Dims& n, const F& f) {
    for (int64_t d = 0; d < n[0]; ++d) {
      for (int64_t h = 0; h < n[1]; ++h) {
        for (int64_t w = 0; w < n[2]; ++w) f(Dims{d, h, w});
      }
    }
  }
};

// out[r][v] += Σ_c m[c][row + r] m[c][column + v], channels `ld` apart.
template <typename T, int Rows>
void add_products(const T* m, int64_t channels, int64_t ld, int64_t row, int64_t column, T* out,
                  int64_t out_ld) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t kRun = 64;  // bounds the rounding of the sums
  for (int64_t begin = 0; begin < channels; begin += kRun) {
    Vec acc[Rows];
    c10::ForcedUnroll<Rows>{}([&](auto r) { acc[r] = Vec(T(0)); });
    for (int64_t c = begin; c < std::min(channels, begin + kRun); ++c) {
      const Vec right = Vec::loadu(m + c * ld + column);
      c10::ForcedUnroll<Rows>{}(
          [&](auto r) { acc[r] = at::vec::fmadd(Vec(m[c * ld + row + r]), right, acc[r]); });
    }
    c10::ForcedUnroll<Rows>{}([&](auto r) {
      T* to = out + r * out_ld;
      (begin == 0 ? acc[r] : acc[r] + Vec::loadu(to)).store(to);
    });
  }
}

// Inner products of n columns of m (channels, ld); at least those on and below the diagonal. m and
// out are readable and writable up to whole vectors behind the last column.
template <typename T>
void inner_products(const T* m, int64_t channels, int64_t ld, int64_t n, T* out, int64_t out_ld) {
  constexpr int64_t kLanes = at::vec::Vectorized<T>::size(), kRows = 8;
  for (int64_t t = 0; t < n; t += kRows) {
    const int64_t rows = std::min(kRows, n - t);
    for (int64_t s = 0; s < t + rows; s += kLanes) {
      T* to = out + t * out_ld + s;
      if (rows == kRows) {
        add_products<T, kRows>(m, channels, ld, t, s, to, out_ld);
      } else if (rows == 4) {
        add_products<T, 4>(m, channels, ld, t, s, to, out_ld);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          add_products<T, 1>(m, channels, ld, t + r, s, to + r * out_ld, out_ld);
        }
      }
    }
  }
}

template <typename T>
class GramNorms {
 public:
  GramNorms(const Geometry& geo, const Tensor& x, const Tensor& g)
      : geo_(geo), classes_(geo), x_(x), g_(g) {
    pixels_ = static_cast<int64_t>(classes_.pixels.size());
    positions_ = geo.out[0] * geo.out[1] * geo.out[2];
    const Dims strides = spatial_strides(x);
    for (const Dims& p : classes_.pixels) {
      offsets_.push_back(p[0] * strides[0] + p[1] * strides[1] + p[2] * strides[2]);
    }
    const Dims g_strides = spatial_strides(g);
    for (int64_t d = 0; d < geo.out[0]; ++d) {
      for (int64_t h = 0; h < geo.out[1]; ++h) {
        for (int64_t w = 0; w < geo.out[2]; ++w) {
          g_offsets_.push_back(d * g_strides[0] + h * g_strides[1] + w * g_strides[2]);
        }
      }
    }
  }

  // Squared norms of all samples into sq; returns the samples that cancel too far.
  std::vector<int64_t> run(double* sq) const {
    std::vector<char> cancelled(geo_.batch, 0);
    at::parallel_for(0, geo_.batch, 1, [&](int64_t begin, int64_t end) {
      const int64_t channels = std::max(geo_.in_channels, geo_.out_channels) / geo_.groups;
      const int64_t widest = std::max(pixels_, positions_);
      std::vector<T> of_columns, of_p, of_q;
      T* const columns = at_line(of_columns, channels * widest + kLanes);
      T* const p = at_line(of_p, padded(pixels_) * pixels_);
      T* const q = at_line(of_q, padded(positions_) * positions_);
      for (int64_t b = begin; b < end; ++b) {
        double total = 0, diagonal = 0;
        for (int64_t k = 0; k < geo_.groups; ++k) {
          group(b, k, columns, p, q, total, diagonal);
        }
        cancelled[b] = !(total >= kCancelled * diagonal);
        sq[b] = std::max(total, 0.0);
      }
    });
    std::vector<int64_t> result;
    for (int64_t b = 0; b < geo_.batch; ++b) {
      if (cancelled[b]) result.push_back(b);
    }
    return result;
  }

 private:
  static constexpr int64_t kLanes = at::vec::Vectorized<T>::size();
  static int64_t padded(int64_t n) { return at::ceil_div(n, kLanes) * kLanes; }

  // (channels, positions) of one sample, the positions in the order of `offsets`.
  static void columns_of(const Tensor& t, int64_t b, int64_t channel, int64_t channels,
                         const std::vector<int64_t>& offsets, T* dst) {
    const T* src = t.const_data_ptr<T>() + b * t.stride(0) + channel * t.stride(1);
    for (int64_t c = 0; c < channels; ++c, src += t.stride(1)) {
      for (const int64_t offset : offsets) *dst++ = src[offset];
    }
  }

  void group(int64_t b, int64_t k, T* columns, T* p, T* q, double& total, double& diagonal) const {
    const int64_t in = geo_.in_channels / geo_.groups, out = geo_.out_channels / geo_.groups;
    const int64_t ldq = padded(positions_);
    columns_of(g_, b, k * out, out, g_offsets_, columns);
    inner_products(columns, out, positions_, positions_, q, ldq);
    columns_of(x_, b, k * in, in, offsets_, columns);
    std::vector<int64_t> at;
    int64_t place = 0;
    for (size_t c = 0; c < classes_.size.size(); ++c) {
      const int64_t n = classes_.begin[c + 1] - classes_.begin[c];
      at.push_back(place);
      if (n > 0) {
        inner_products(columns + classes_.begin[c], in, pixels_, n, p + place, padded(n));
      }
      place += n * padded(n);
    }
    for (const Shift& s : classes_.shifts) {
      const Dims& size = classes_.size[s.kind];
      const int64_t n = size[0] * size[1] * size[2];
      add(s, size, p + at[s.kind], padded(n), q, ldq, total, diagonal);
    }
  }

  // Σ over positions t, s of the tap of P[t + shift, s + shift] Q[t, s]: twice those with s < t.
  void add(const Shift& tap, const Dims& size, const T* p, int64_t ldp, const T* q, int64_t ldq,
           double& total, double& diagonal) const {
    double below = 0, on = 0;
    const int64_t shift = (tap.by[0] * size[1] + tap.by[1]) * size[2] + tap.by[2];
    const auto rows = [&](const auto& f) {
      for (int64_t d = tap.low[0]; d < tap.high[0]; ++d) {
        for (int64_t h = tap.low[1]; h < tap.high[1]; ++h) {
          if (!f((d * geo_.out[1] + h) * geo_.out[2], (d * size[1] + h) * size[2] + shift)) return;
        }
      }
    };
    rows([&](int64_t t_row, int64_t tp_row) {
      for (int64_t w = tap.low[2]; w < tap.high[2]; ++w) {
        const T *pt = p + (tp_row + w) * ldp, *qt = q + (t_row + w) * ldq;
        rows([&](int64_t s_row, int64_t sp_row) {
          const int64_t end = s_row < t_row ? tap.high[2] : w;
          T sum(0);
          for (int64_t v = tap.low[2]; v < end; ++v) sum += pt[sp_row + v] * qt[s_row + v];
          below += sum;
          return s_row < t_row;
        });
        on += static_cast<double>(pt[tp_row + w]) * qt[t_row + w];
      }
      return true;
    });
    total += on + 2 * below;
    diagonal += on;
  }

  const Geometry geo_;
  const Classes classes_;
  const Tensor x_, g_;
  std::vector<int64_t> offsets_, g_offsets_;
  int64_t pixels_ = 0, positions_ = 0;
};

}  // namespace gradstats::cpu::conv
