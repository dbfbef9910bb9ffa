// M2 of samples that are nearly equal, in order and merged from unequal groups, against float64.
#include "hopper/moments.cuh"

#include <cmath>
#include <vector>

#include "check.h"

using namespace gradstats::cuda;

int main() {
  Random random(3);
  for (int trial = 0; trial < 2000; ++trial) {
    const int samples = 1 + random.below(64);
    const float mean = random.uniform() * 100.0f;
    const float spread = trial % 2 ? 1.0f : 1e-2f;
    std::vector<float> values(samples);
    for (float& v : values) v = mean + spread * random.uniform();
    double sum = 0.0, m2 = 0.0;
    for (float v : values) sum += v;
    for (float v : values) m2 += (v - sum / samples) * (v - sum / samples);
    // Groups of random sizes, empty ones excluded, as the splits of a batch.
    float total = 0.0f, total_m2 = 0.0f;
    int seen = 0;
    while (seen < samples) {
      const int more = 1 + random.below(samples - seen);
      float part = 0.0f, part_m2 = 0.0f;
      for (int k = 0; k < more; ++k) Welford(k).add(values[seen + k], part, part_m2);
      if (seen == 0) {
        total = part, total_m2 = part_m2;
      } else {
        Chan(seen, more).merge(total, total_m2, part, part_m2);
      }
      seen += more;
    }
    // A mean in fp32 is off by 2^-24 of its size or so; Q - S^2/n would lose mean^2 / spread^2
    // more.
    const double floor = samples * std::pow(mean * 4e-7, 2) + 1e-5 * m2;
    CHECK(std::fabs(total_m2 - m2) <= floor + 2e-6 * std::fabs(mean) * std::sqrt(m2 * samples),
          "m2 %g, not %g, of %d samples", total_m2, m2, samples);
    CHECK(std::fabs(total - sum) <= 1e-5 * std::fabs(sum) + 1e-6, "sum");
    CHECK(total_m2 >= 0.0f, "a variance is not negative");
    if (samples == 1) CHECK(total_m2 == 0.0f, "one sample has no spread");
  }
  std::printf("moments ok\n");
}
