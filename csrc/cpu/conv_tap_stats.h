// Which convolutions are summed tap by tap, and where inner products give their norms.
#pragma once

#include <ATen/ATen.h>

#include <tuple>
#include <vector>

#include "conv_gram.h"
#include "conv_tap_pass.h"

namespace gradstats::cpu::conv {

// Tap by tap pays where one sample's block and panel stay in L1 for all taps (then leaving out what
// is outside the image saves more than the shorter tiles cost), and the channels fill a tile.
template <typename T>
bool by_taps(const Geometry& geo) {
  return geo.batch > 0 && geo.in_channels / geo.groups >= kTapRows &&
         TapPass<T>::bytes_at_once(geo) <= kRunBytes;
}

// Cycles that a sample's norm costs, measured with AVX-512. From inner products: to copy its
// positions, to multiply them, to weigh them by the other operand's; from the gradient: to square
// it on its way into the sum.
inline bool gram_pays(const Geometry& geo) {
  constexpr double kCopy = 1.5, kMultiply = 0.04, kWeigh = 4, kSquare = 0.08;
  const auto volume = [](const Dims& d) { return static_cast<double>(d[0] * d[1] * d[2]); };
  const double pixels = volume(geo.in), positions = volume(geo.out), taps = volume(geo.kernel);
  const double in = static_cast<double>(geo.in_channels);
  const double out = static_cast<double>(geo.out_channels);
  const double copied = in * pixels + out * positions;
  const double multiplied = in * pixels * pixels / volume(geo.stride) + out * positions * positions;
  const double weighed = static_cast<double>(geo.groups) * taps * positions * positions;
  const double squared = taps * in * out / static_cast<double>(geo.groups);
  return kCopy * copied + kMultiply * multiplied + kWeigh * weighed < kSquare * squared;
}

// The squared norms again, from the gradients themselves, of samples whose inner products cancel.
template <typename T>
void recompute(const Geometry& geo, const Tensor& x, const Tensor& g,
               const std::vector<int64_t>& samples, T* scratch, double* sq) {
  constexpr size_t kAtOnce = 16;
  for (size_t k = 0; k < samples.size(); k += kAtOnce) {
    const size_t count = std::min(kAtOnce, samples.size() - k);
    const Tensor index = at::tensor(at::IntArrayRef(samples).slice(k, count), at::kLong);
    Geometry few = geo;
    few.batch = static_cast<int64_t>(count);
    std::vector<double> exact(count, 0.0);
    TapPass<T>(few, Mode::kNorms, x.index_select(0, index), g.index_select(0, index))
        .run(scratch, nullptr, exact.data());
    for (size_t i = 0; i < count; ++i) sq[samples[k + i]] = exact[i];
  }
}

// (dw, squared norms, m2 or nothing)
template <typename T>
std::tuple<Tensor, Tensor, Tensor> tap_stats(const Geometry& geo, const Tensor& x, const Tensor& g,
                                             at::IntArrayRef kernel_size, bool moments) {
  std::vector<int64_t> shape{geo.out_channels, geo.in_channels / geo.groups};
  shape.insert(shape.end(), kernel_size.begin(), kernel_size.end());
  const Tensor dw = at::empty(shape, x.options());
  const Tensor m2 = moments ? at::empty(shape, x.options()) : at::empty({0}, x.options());
  const Tensor sq = at::zeros({geo.batch}, x.options().dtype(at::kDouble));
  T* sum = dw.data_ptr<T>();
  double* norms = sq.data_ptr<double>();
  if (moments) {
    constexpr int64_t kFew = 8;  // up to 20% faster at 4 positions, some % slower at 16
    const bool few = geo.out[0] * geo.out[1] * geo.out[2] <= kFew;
    TapPass<T>(geo, few ? Mode::kResident : Mode::kMoments, x, g).run(sum, m2.data_ptr<T>(), norms);
  } else if (gram_pays(geo)) {
    recompute<T>(geo, x, g, GramNorms<T>(geo, x, g).run(norms), sum, norms);
    TapPass<T>(geo, Mode::kSum, x, g).run(sum, nullptr, nullptr);
  } else {
    TapPass<T>(geo, Mode::kNorms, x, g).run(sum, nullptr, norms);
  }
  return {dw, sq.to(x.scalar_type()), m2};
}

}  // namespace gradstats::cpu::conv
