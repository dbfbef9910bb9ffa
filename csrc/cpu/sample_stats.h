// Per-sample statistics gathered while samples go by, and merged between threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <tuple>
#include <type_traits>
#include <vector>

#include "scratch.h"

namespace gradstats::cpu {

// The type statistics of `Scalar` inputs are computed in.
template <typename Scalar>
using Wide = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

// n numbers in the wide type: where they are, or converted into `scratch`.
template <typename Scalar>
const Wide<Scalar>* widen(const Scalar* src, int64_t n, Wide<Scalar>* scratch) {
  if constexpr (std::is_same_v<Scalar, Wide<Scalar>>) {
    return src;
  } else {
    at::vec::convert(src, scratch, n);
    return scratch;
  }
}

template <typename T>
T sum_lanes(at::vec::Vectorized<T> v) {
  using Vec = at::vec::Vectorized<T>;
  return at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return a + b; }, v);
}

// One sample's contribution c (n), while it is in cache: adds it to `sum`, to the centred second
// moment `m2` (null: not wanted), and returns its squared norm. `seen` samples went before.
// Welford's update is written with a square, so m2 cannot go negative.
template <typename T>
double absorb(const T* c, int64_t n, int64_t seen, T* sum, T* m2) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int64_t kLanes = Vec::size();
  const T count = static_cast<T>(seen);
  const Vec inv(seen > 0 ? 1 / count : T(0)), factor(count / (count + 1));
  Vec sq0(T(0)), sq1(T(0)), sq2(T(0)), sq3(T(0));  // one would wait for itself, 4 cycles each time
  const auto take = [&](int64_t k, Vec& sq) {
    const Vec v = Vec::loadu(c + k), s = Vec::loadu(sum + k);
    sq = at::vec::fmadd(v, v, sq);
    (s + v).store(sum + k);
    if (m2 != nullptr) {
      const Vec d = v - s * inv;
      at::vec::fmadd(d * d, factor, Vec::loadu(m2 + k)).store(m2 + k);
    }
  };
  int64_t k = 0;
  for (; k + 4 * kLanes <= n; k += 4 * kLanes) {
    take(k, sq0);
    take(k + kLanes, sq1);
    take(k + 2 * kLanes, sq2);
    take(k + 3 * kLanes, sq3);
  }
  for (; k + kLanes <= n; k += kLanes) take(k, sq0);
  double tail = 0;
  for (; k < n; ++k) {
    const T d = c[k] - sum[k] * (seen > 0 ? 1 / count : T(0));
    if (m2 != nullptr) m2[k] += d * d * (count / (count + 1));
    sum[k] += c[k];
    tail += static_cast<double>(c[k]) * c[k];
  }
  return tail + sum_lanes((sq0 + sq1) + (sq2 + sq3));
}

// Samples of part `p` of `parts`: [split(n, parts, p), split(n, parts, p + 1)).
inline int64_t split(int64_t n, int64_t parts, int64_t p) { return n * p / parts; }

// sum: (parts, n), m2: (parts, n) or null, of `batch` samples cut by `split`; the result replaces
// part 0. m2 = Σ_p [m2_p + n_p (mean_p − mean)²]: Chan's formula for all parts, in a fixed order.
template <typename T>
void merge_parts(T* sum, T* m2, int64_t batch, int64_t parts, int64_t n) {
  if (parts < 2 || n == 0) return;
  const int64_t grain = std::max<int64_t>(1, 32768 / parts);
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    // Column blocks, so that the running values below stay in L1.
    constexpr int64_t kWidth = 256;
    T total[kWidth], spread[kWidth];
    for (int64_t k = begin; k < end; k += kWidth) {
      const int64_t width = std::min(kWidth, end - k);
      std::copy_n(sum + k, width, total);
      for (int64_t p = 1; p < parts; ++p) {
        for (int64_t j = 0; j < width; ++j) total[j] += sum[p * n + k + j];
      }
      if (m2 != nullptr) {
        std::fill_n(spread, width, T(0));
        for (int64_t p = 0; p < parts; ++p) {
          const T count = static_cast<T>(split(batch, parts, p + 1) - split(batch, parts, p));
          for (int64_t j = 0; j < width; ++j) {
            const T d = sum[p * n + k + j] / count - total[j] / static_cast<T>(batch);
            spread[j] += m2[p * n + k + j] + count * d * d;
          }
        }
        std::copy_n(spread, width, m2 + k);
      }
      std::copy_n(total, width, sum + k);
    }
  });
}

// Statistics of contributions of `n` numbers per sample that come one by one, the samples cut into
// one part per thread.
template <typename T>
class SampleStats {
 public:
  SampleStats(bool wanted, int64_t batch, int64_t n, bool moments, const at::TensorOptions& options)
      : wanted_(wanted), batch_(batch), n_(n), parts_(parts_of(batch)) {
    const auto kind = options.dtype(c10::CppTypeToScalarType<T>::value);
    sum_ = at::zeros({parts_, wanted ? n : 0}, kind);
    m2_ = at::zeros({parts_, wanted && moments ? n : 0}, kind);
    sq_norm_ = at::zeros({wanted ? batch : 0}, kind);
    sum_data_ = sum_.template data_ptr<T>();
    m2_data_ = wanted && moments ? m2_.template data_ptr<T>() : nullptr;
    sq_data_ = sq_norm_.template data_ptr<T>();
  }

  static int64_t parts_of(int64_t batch) {
    return std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), batch));
  }

  // Sample b, of part p; within a part the samples come in order.
  void add(int64_t p, int64_t b, const T* contribution) {
    if (!wanted_) return;
    sq_data_[b] =
        static_cast<T>(absorb(contribution, n_, b - split(batch_, parts_, p), sum_data_ + p * n_,
                              m2_data_ == nullptr ? nullptr : m2_data_ + p * n_));
  }

  // (sum as `dtype`, sq_norm, m2)
  std::tuple<at::Tensor, at::Tensor, at::Tensor> finish(at::ScalarType dtype) {
    merge_parts(sum_data_, m2_data_, batch_, parts_, wanted_ ? n_ : 0);
    return {sum_[0].to(dtype), sq_norm_, m2_[0]};
  }

 private:
  bool wanted_;
  int64_t batch_, n_, parts_;
  at::Tensor sum_, m2_, sq_norm_;
  T *sum_data_, *m2_data_, *sq_data_;
};

// f(part, first sample, last sample) for the parts of SampleStats, in parallel.
template <typename F>
void for_each_part(int64_t batch, const F& f) {
  const int64_t parts = SampleStats<float>::parts_of(batch);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) f(p, split(batch, parts, p), split(batch, parts, p + 1));
  });
}

}  // namespace gradstats::cpu
