// Weight gradient of a lookup with per-sample statistics. The positions are ordered by row and then
// by sample, so that every row of the table is finished by one thread, its samples one after the
// other, and g is read once.
#include <ATen/Dispatch.h>

#include "../checks.h"
#include "../ops.h"
#include "sample_stats.h"

namespace gradstats::cpu {
namespace {

constexpr int64_t kAhead = 4;    // lookups asked for beforehand: they lie all over g
constexpr int64_t kBlock = 256;  // lookups summed before they are added on: bounds rounding errors

// Positions of (B, T) sorted by id, in order of the position where ids are equal.
struct ByRow {
  std::vector<int64_t> starts;  // row v has order[starts[v], starts[v + 1])
  std::vector<int64_t> order;

  ByRow(const Tensor& ids, int64_t rows, int64_t padding_idx) : starts(rows + 1) {
    const int64_t* id = ids.const_data_ptr<int64_t>();
    const int64_t n = ids.numel();
    for (int64_t k = 0; k < n; ++k) {
      TORCH_CHECK_INDEX(id[k] >= 0 && id[k] < rows, "embedding_stats: ids must be in [0, ", rows,
                        "), got ", id[k], " in ids of shape ", ids.sizes());
      if (id[k] != padding_idx) ++starts[id[k] + 1];
    }
    for (int64_t v = 0; v < rows; ++v) starts[v + 1] += starts[v];
    order.resize(starts[rows]);
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (int64_t k = 0; k < n; ++k) {
      if (id[k] != padding_idx) order[next[id[k]]++] = k;
    }
  }
};

// to += from (n)
template <typename T>
void add(const T* from, int64_t n, T* to) {
  for (int64_t k = 0; k < n; ++k) to[k] += from[k];
}

template <typename Scalar>
class Lookup {
 public:
  using T = Wide<Scalar>;

  Lookup(const ByRow& by_row, const Tensor& g, const Tensor& dw, const Tensor& m2, const Tensor& sq)
      : by_row_(by_row),
        g_(g.const_data_ptr<Scalar>()),
        dw_(dw.data_ptr<Scalar>()),
        m2_(m2.numel() == 0 ? nullptr : m2.data_ptr<T>()),
        sq_(sq.data_ptr<double>()),
        batch_(g.size(0)),
        length_(g.size(1)),
        d_(g.size(2)),
        sample_stride_(g.stride(0)),
        position_stride_(g.stride(1)) {}

  // Writes dw and m2 of row v, zeros where nobody looked it up, and each sample's squared norm at
  // the place in `order` of its first lookup. Cleared here, a row is still in the cache when the
  // first sample is added: the table is written once, however many of its rows are looked up.
  void row(int64_t v, std::vector<T>& scratch) const {
    const int64_t begin = by_row_.starts[v], end = by_row_.starts[v + 1];
    T* const m2 = m2_ == nullptr ? nullptr : m2_ + v * d_;
    std::fill_n(dw_ + v * d_, d_, Scalar(0));
    if (m2 != nullptr) std::fill_n(m2, d_, T(0));
    if (begin == end) return;
    constexpr bool kSame = std::is_same_v<Scalar, T>;
    T *const own = at_line(scratch, 4 * d_), *sum = own + 3 * d_;
    if constexpr (kSame) {
      sum = dw_ + v * d_;
    } else {
      std::fill_n(sum, d_, T(0));
    }
    int64_t seen = 0;
    for (int64_t k = begin; k < end; ++seen) {
      const int64_t sample = by_row_.order[k] / length_;
      int64_t last = k + 1;
      while (last < end && by_row_.order[last] / length_ == sample) ++last;
      sq_[k] = absorb(contribution(k, last, own), d_, seen, sum, m2);
      k = last;
    }
    if constexpr (!kSame) at::vec::convert(sum, dw_ + v * d_, d_);
    if (m2 != nullptr) with_absent(sum, seen, m2);
  }

 private:
  const Scalar* place(int64_t k) const {
    const int64_t b = by_row_.order[k] / length_, t = by_row_.order[k] % length_;
    return g_ + b * sample_stride_ + t * position_stride_;
  }

  const T* at(int64_t k, T* scratch) const {
    constexpr int64_t kLine = 64 / sizeof(Scalar);
    if (k + kAhead < static_cast<int64_t>(by_row_.order.size())) {
      const Scalar* const later = place(k + kAhead);
      for (int64_t c = 0; c < d_; c += kLine) __builtin_prefetch(later + c, 0, 2);
    }
    return widen(place(k), d_, scratch);
  }

  const T* contribution(int64_t begin, int64_t end, T* scratch) const {
    if (end - begin == 1) return at(begin, scratch);
    T *block = scratch + d_, *total = scratch + 2 * d_;
    std::fill_n(total, d_, T(0));
    for (int64_t k = begin; k < end; k += kBlock) {
      const int64_t stop = std::min(end, k + kBlock);
      const bool one = stop - begin <= kBlock;
      if (!one) std::fill_n(block, d_, T(0));
      for (int64_t j = k; j < stop; ++j) add(at(j, scratch), d_, one ? total : block);
      if (!one) add(block, d_, total);
    }
    return total;
  }

  // The samples that did not look the row up contribute zero: Chan's merge with those,
  // m2 += mean² · seen · absent / batch.
  void with_absent(const T* sum, int64_t seen, T* m2) const {
    const double batch = static_cast<double>(batch_), count = static_cast<double>(seen);
    const T factor = static_cast<T>((batch - count) / (batch * count));
    for (int64_t k = 0; k < d_; ++k) m2[k] += sum[k] * sum[k] * factor;
  }

  const ByRow& by_row_;
  const Scalar* g_;
  Scalar* dw_;
  T* m2_;
  double* sq_;
  int64_t batch_, length_, d_, sample_stride_, position_stride_;
};

template <typename Scalar>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& ids, const Tensor& g, int64_t rows,
                                       int64_t padding_idx, bool moments) {
  const auto wide = g.options().dtype(stats_dtype(g.scalar_type()));
  const int64_t batch = g.size(0), d = g.size(2);
  const ByRow by_row(ids, rows, padding_idx);
  const auto n = static_cast<int64_t>(by_row.order.size());
  const Tensor dw = at::empty({rows, d}, g.options());
  const Tensor m2 = at::empty({moments ? rows : 0, d}, wide);
  const Tensor sq = at::zeros({n}, g.options().dtype(at::kDouble));
  const Lookup<Scalar> lookup(by_row, g, dw, m2, sq);
  // Threads get about the same number of lookups and of rows to write, in whole rows.
  const int64_t work = n + rows;
  const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(8 * at::get_num_threads(), work));
  const auto first_row = [&](int64_t share) {
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (by_row.starts[middle] + middle < split(work, shares, share)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    std::vector<Wide<Scalar>> scratch;
    for (int64_t v = first_row(begin), last = first_row(end); v < last; ++v) {
      lookup.row(v, scratch);
    }
  });
  // In the fixed order of `order`, whatever the threads were.
  std::vector<double> sq_norm(batch);
  const double* part = sq.const_data_ptr<double>();
  for (int64_t k = 0; k < n; ++k) sq_norm[by_row.order[k] / g.size(1)] += part[k];
  const Tensor norms = at::empty({batch}, wide);
  std::copy(sq_norm.begin(), sq_norm.end(), norms.data_ptr<Wide<Scalar>>());
  return {dw, norms, moments ? m2 : at::empty({0}, wide)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> embedding_stats(const Tensor& ids, const Tensor& g,
                                                   int64_t num_embeddings, int64_t padding_idx,
                                                   bool moments) {
  GRADSTATS_CHECK_CPU("embedding_stats", ids);
  GRADSTATS_CHECK_CPU("embedding_stats", g);
  GRADSTATS_CHECK_DTYPE("embedding_stats", g);
  TORCH_CHECK(ids.dim() == 2 && at::isIntegralType(ids.scalar_type(), false),
              "embedding_stats: ids must be integers of shape (B, T), got ", ids.scalar_type(), " ",
              ids.sizes());
  TORCH_CHECK(g.dim() == 3 && g.sizes().slice(0, 2) == ids.sizes(),
              "embedding_stats: g must be (B, T, D) with ids of shape ", ids.sizes(), ", got ",
              g.sizes());
  TORCH_CHECK(num_embeddings >= 0, "embedding_stats: num_embeddings must not be negative, got ",
              num_embeddings);
  const Tensor index = ids.to(at::kLong).contiguous();
  const Tensor by_rows = g.stride(2) == 1 ? g : g.contiguous();
  return AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, g.scalar_type(), "embedding_stats", [&] {
    return run<scalar_t>(index, by_rows, num_embeddings, padding_idx, moments);
  });
}

}  // namespace gradstats::cpu
