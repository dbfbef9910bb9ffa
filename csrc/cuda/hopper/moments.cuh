// Running sum and M2 of samples that go by one at a time, and their merge.
#pragma once

#include "portable.cuh"

namespace gradstats::cuda {

// One more sample after `seen` (Welford 1962): m2 grows by d^2 n / (n + 1), d from the mean before.
struct Welford {
  float inverse;  // 1 / n, or 0 for the first sample
  float weight;   // n / (n + 1)

  GRADSTATS_HD explicit Welford(int seen)
      : inverse(seen > 0 ? 1.0f / static_cast<float>(seen) : 0.0f),
        weight(static_cast<float>(seen) / static_cast<float>(seen + 1)) {}

  GRADSTATS_HD void add(float value, float& sum, float& m2) const {
    const float d = value - sum * inverse;
    m2 += d * (d * weight);
    sum += value;
  }
};

// Two groups of samples into one (Chan, Golub & LeVeque 1979).
struct Chan {
  float inverse_a, inverse_b, weight;

  GRADSTATS_HD Chan(int a, int b)
      : inverse_a(1.0f / static_cast<float>(a)),
        inverse_b(1.0f / static_cast<float>(b)),
        weight(static_cast<float>(a) * static_cast<float>(b) / static_cast<float>(a + b)) {}

  GRADSTATS_HD void merge(float& sum, float& m2, float sum_b, float m2_b) const {
    const float d = sum_b * inverse_b - sum * inverse_a;
    m2 += m2_b + d * (d * weight);
    sum += sum_b;
  }
};

}  // namespace gradstats::cuda
