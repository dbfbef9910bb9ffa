// Bias gradient of a linear layer with per-sample statistics: a block of columns at a time, whose
// samples are walked in order. What a block holds of them stays in the caches.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>

#include <vector>

#include "linear_tile.h"

namespace gradstats::cpu::linear {

constexpr int64_t kColumnBlock = 64;

// Samples' sums of some columns of g, added up. Eight positions are added as they are, everything
// else in double: these sums often cancel, over positions and over samples.
template <typename In>
class Columns {
  using A = Acc<In>;

 public:
  Columns(int64_t count, bool moments)
      : count_(count), moments_(moments), each_(count), sum_(count), mean_(count), spread_(count) {}

  // The squared norm of the next sample's sums, given its rows.
  double add(const In* rows, int64_t stride, int64_t positions) {
    std::fill(each_.begin(), each_.end(), 0.0);
    int64_t t = 0;
    for (; t + 8 <= positions; t += 8) add_eight(rows + t * stride, stride);
    for (; t < positions; ++t) {
      for (int64_t c = 0; c < count_; ++c) each_[c] += double(A(rows[t * stride + c]));
    }
    double squares = 0;
    for (int64_t c = 0; c < count_; ++c) squares += each_[c] * each_[c];
    if (moments_) {
      // M2 grows by d^2 n/(n+1), d the distance from the mean of the n samples before (Welford
      // 1962), so it is never negative.
      const double part = samples_ / (samples_ + 1), step = 1 / (samples_ + 1);
      for (int64_t c = 0; c < count_; ++c) {
        const double d = each_[c] - mean_[c];
        spread_[c] += d * d * part;
        mean_[c] += d * step;
      }
    }
    for (int64_t c = 0; c < count_; ++c) sum_[c] += each_[c];
    samples_ += 1;
    return squares;
  }

  // db and m2, which may be null, of these columns.
  void write(In* db, A* m2) const {
    for (int64_t c = 0; c < count_; ++c) db[c] = static_cast<In>(sum_[c]);
    if (m2 == nullptr) return;
    for (int64_t c = 0; c < count_; ++c) m2[c] = static_cast<A>(spread_[c]);
  }

 private:
  void add_eight(const In* p, int64_t stride) {
    const In* q = p + 4 * stride;
    double* sums = each_.data();
    for (int64_t c = 0; c < count_; ++c) {
      const A low = (A(p[c]) + A(p[c + stride])) + (A(p[c + 2 * stride]) + A(p[c + 3 * stride]));
      const A high = (A(q[c]) + A(q[c + stride])) + (A(q[c + 2 * stride]) + A(q[c + 3 * stride]));
      sums[c] += double(low + high);
    }
  }

  const int64_t count_;
  const bool moments_;
  double samples_ = 0;
  std::vector<double> each_, sum_, mean_, spread_;
};

// db and m2: (out,), m2 may be null; sq_norm: (samples,).
template <typename In>
void bias_stats(const Rows<In>& g, int64_t samples, int64_t positions, int64_t out, In* db,
                Acc<In>* sq_norm, Acc<In>* m2) {
  const int64_t blocks = at::ceil_div(out, kColumnBlock);
  std::vector<double> partial(samples * blocks);
  const int64_t work = samples * positions * std::min(out, kColumnBlock);
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, work));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t c0 = k * kColumnBlock;
      Columns<In> columns(std::min(kColumnBlock, out - c0), m2 != nullptr);
      for (int64_t b = 0; b < samples; ++b) {
        const In* rows = g.data + b * g.sample_stride + c0;
        partial[b * blocks + k] = columns.add(rows, g.row_stride, positions);
      }
      columns.write(db + c0, m2 == nullptr ? nullptr : m2 + c0);
    }
  });
  for (int64_t b = 0; b < samples; ++b) {
    double total = 0;
    for (int64_t k = 0; k < blocks; ++k) total += partial[b * blocks + k];
    sq_norm[b] = static_cast<Acc<In>>(total);
  }
}

}  // namespace gradstats::cpu::linear
