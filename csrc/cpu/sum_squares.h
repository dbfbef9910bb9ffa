// Sum of squares of consecutive numbers, vectorised.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <type_traits>

namespace gradstats::cpu {

template <typename T>
T lanes_sum(at::vec::Vectorized<T> v) {
  using Vec = at::vec::Vectorized<T>;
  if constexpr (std::is_same_v<T, float>) {
    return at::vec::vec_reduce_all<T>([](Vec a, Vec b) { return a + b; }, v);
  } else {  // vec_reduce_all goes through memory once per halving here
    T lanes[Vec::size()];
    v.store(lanes);
    for (int half = Vec::size() / 2; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
    }
    return lanes[0];
  }
}

// float and double are summed in their own precision over blocks short enough that rounding stays
// near one unit in the last place, the blocks in double; 16-bit numbers are widened first. A block
// is read in four places at a time, in as many pages: no prefetcher goes from one to the next.
template <typename T>
double sum_squares(const T* data, int64_t n) {
  using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;
  using Vec = at::vec::Vectorized<Acc>;
  constexpr int64_t kLanes = Vec::size(), kPlaces = 4, kPart = 1024, kBlock = kPlaces * kPart;
  double lanes[kLanes] = {};
  const auto add_block = [&lanes](const Vec(&sum)[kPlaces]) {
    Acc found[kLanes];
    ((sum[0] + sum[1]) + (sum[2] + sum[3])).store(found);
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += found[k];
  };
  int64_t begin = 0;
  if constexpr (std::is_same_v<T, Acc>) {
    for (; begin + kBlock <= n; begin += kBlock) {
      Vec sum[kPlaces] = {Vec(0), Vec(0), Vec(0), Vec(0)};
      for (const T *p = data + begin, *end = p + kPart; p < end; p += kLanes) {
        for (int k = 0; k < kPlaces; ++k) {
          const Vec v = Vec::loadu(p + k * kPart);
          sum[k] = at::vec::fmadd(v, v, sum[k]);
        }
      }
      add_block(sum);
    }
  }
  for (; begin < n; begin += kBlock) {
    const T* const p = data + begin;
    const int64_t count = std::min(kBlock, n - begin);
    Vec sum[kPlaces] = {Vec(0), Vec(0), Vec(0), Vec(0)};
    const auto add = [&sum](Vec v, int64_t k) { sum[k] = at::vec::fmadd(v, v, sum[k]); };
    if constexpr (std::is_same_v<T, Acc>) {
      int64_t i = 0;
      for (; i + kPlaces * kLanes <= count; i += kPlaces * kLanes) {
        for (int k = 0; k < kPlaces; ++k) add(Vec::loadu(p + i + k * kLanes), k);
      }
      for (; i < count; i += kLanes) {
        add(Vec::loadu(p + i, static_cast<int>(std::min(kLanes, count - i))), 0);
      }
    } else {
      using Half = at::vec::Vectorized<T>;
      for (int64_t i = 0; i < count; i += 2 * kLanes) {
        const auto left = static_cast<int>(std::min(2 * kLanes, count - i));
        const auto [low, high] = at::vec::convert_to_float<T>(
            left == 2 * kLanes ? Half::loadu(p + i) : Half::loadu(p + i, left));
        const int64_t k = (i / kLanes) & 2;
        add(low, k);
        add(high, k + 1);
      }
    }
    add_block(sum);
  }
  double total = 0;
  for (const double lane : lanes) total += lane;
  return total;
}

}  // namespace gradstats::cpu
