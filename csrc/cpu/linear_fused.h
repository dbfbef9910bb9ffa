// Weight gradient of a linear layer with per-sample statistics, in one pass over register tiles.
//
// Positions are taken in groups of whole samples. Both operands of a group are packed once, for all
// threads: activations in panels of kCols columns, grad_output in tiles of up to kMaxRows. Each
// thread owns tiles of rows of the gradient and walks the panels past as many tiles as stay in its
// L2 cache. A sample's contribution exists only in registers; nothing but the sums goes to memory.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>

#include <vector>

#include "linear_pack.h"
#include "linear_tile.h"

namespace gradstats::cpu::linear {

// kNorms, kMoments: a contribution is the sum over a sample's positions. kSecond: every row is a
// sample of its own (T = 1); the second moment is a matrix product of squares. kSum: no statistics.
enum class Mode { kNorms, kMoments, kSecond, kSum };

constexpr int64_t kL2Bytes = 384 << 10;  // of packed grad_output, leaving room for a panel

// Part of a matrix; copies take the part that exists of a tile.
template <typename T>
struct Place {
  T* data;
  int64_t ld, rows, cols;

  void load(T* tile) const {
    for (int64_t r = 0; r < rows; ++r) std::copy_n(data + r * ld, cols, tile + r * kCols<T>);
  }
  void store(const Acc<T>* tile) const {
    constexpr int64_t width = kCols<Acc<T>>;
    for (int64_t r = 0; r < rows; ++r) {
      if constexpr (std::is_same_v<T, Acc<T>>) {
        std::copy_n(tile + r * width, cols, data + r * ld);
      } else {
        using Vec = at::vec::Vectorized<Acc<T>>;
        const auto v = at::vec::convert_from_float<T>(Vec::loadu(tile + r * width),
                                                      Vec::loadu(tile + r * width + width / 2));
        v.store(data + r * ld, static_cast<int>(cols));
      }
    }
  }
};

template <typename In, Mode mode>
class Pass {
  using A = Acc<In>;
  static constexpr bool kMoments = mode == Mode::kMoments, kSecond = mode == Mode::kSecond;
  static constexpr bool kFlat = mode == Mode::kSum || kSecond;
  static constexpr Pack kPack = kPairs<In> ? Pack::kPair : Pack::kPlain;
  using Squares = Packed<Pack::kSquare, In>;

 public:
  explicit Pass(const Problem<In>& problem)
      : p_(problem),
        grid_(problem.in, problem.out),
        slots_(kFlat ? 0 : problem.samples),
        partial_(grid_.units() * slots_, 0.0) {}

  void run() {
    const auto all = groups(p_.samples, p_.positions, kFlat);
    Packed<kPack, In> packed(p_, grid_);
    Squares squares(p_, grid_);
    for (size_t k = 0; k < all.size(); ++k) {
      packed.fill(all[k]);
      if constexpr (kSecond) squares.fill(all[k]);
      const int64_t work = all[k].rows() * kMaxRows * p_.in / grid_.chunks;
      const int64_t grain = std::max<int64_t>(1, kMinWork / std::max<int64_t>(1, work));
      at::parallel_for(0, grid_.units(), grain, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end;) {
          const int64_t chunk = unit / grid_.tiles, first = unit % grid_.tiles;
          const int64_t last = std::min(grid_.tiles, first + end - unit);
          block(all[k], k + 1 == all.size(), packed, squares, chunk, first, last);
          unit += last - first;
        }
      });
    }
  }

  // Adds up what the tiles found, in fixed order.
  void sq_norms(A* out) const {
    for (int64_t b = 0; b < slots_; ++b) {
      double total = 0;
      for (int64_t u = 0; u < grid_.units(); ++u) total += partial_[u * slots_ + b];
      out[b] = static_cast<A>(total);
    }
  }

 private:
  // Tiles [begin, end) of the rows, the panels of one chunk of columns.
  void block(const Group& group, bool last, const Packed<kPack, In>& packed, const Squares& squares,
             int64_t chunk, int64_t begin, int64_t end) {
    const int64_t tile_bytes = packed.count() * kMaxRows * static_cast<int64_t>(sizeof(A));
    const int64_t fit = std::max<int64_t>(1, kL2Bytes / (kSecond ? 2 * tile_bytes : tile_bytes));
    const int64_t slab = at::ceil_div(end - begin, at::ceil_div(end - begin, fit));
    for (int64_t at = begin; at < end; at += slab) {
      for (int64_t panel = grid_.panel(chunk); panel < grid_.panel(chunk + 1); ++panel) {
        for (int64_t tile = at; tile < std::min(end, at + slab); ++tile) {
          double* partial = partial_.data() + (chunk * grid_.tiles + tile) * slots_ + group.seen;
          with_rows(static_cast<int>(grid_.height(tile)), [&](auto rows) {
            one<rows()>(group, last, packed, squares, tile, panel, partial);
          });
        }
      }
    }
  }

  template <int rows>
  void one(const Group& group, bool last, const Packed<kPack, In>& packed, const Squares& squares,
           int64_t tile, int64_t panel, double* partial) {
    constexpr int64_t kWidth = kCols<A>;
    const bool first = group.begin == 0;
    const int64_t row = grid_.row(tile), column = panel * kWidth, offset = row * p_.in + column;
    const int64_t height = std::min<int64_t>(rows, p_.out - row);
    const int64_t width = std::min(kWidth, p_.in - column);
    const Place<In> dw{p_.dw + offset, p_.in, height, width};
    const Place<A> so_far{p_.partial + offset, p_.in, height, width};
    const Place<A> second{p_.m2 + offset, p_.in, height, width};
    const A *g = packed.tile(tile), *x = packed.panel(panel);
    alignas(64) A sum[rows * kWidth], m2[rows * kWidth];
    if constexpr (kFlat) {
      // A whole tile goes to its place at once.
      const bool direct = height == rows && width == kWidth && !kSecond &&
                          (!last || static_cast<void*>(p_.dw) == p_.partial);
      if (!direct && !first) so_far.load(sum);
      add_product<kPairs<In>, rows>(g, x, packed.count(), !first, direct ? so_far.data : sum,
                                    direct ? p_.in : kWidth);
      if constexpr (kSecond) {
        if (!first) second.load(m2);
        add_product<false, rows>(squares.tile(tile), squares.panel(panel), squares.count(), !first,
                                 m2, kWidth);
        if (last) centre<rows * kWidth>(sum, m2);
        second.store(m2);
      }
      if (!direct) store(last, dw, so_far, sum);
    } else {
      if (first) {
        std::fill_n(sum, rows * kWidth, A(0));
        if constexpr (kMoments) std::fill_n(m2, rows * kWidth, A(0));
      } else {
        if (p_.dw != nullptr) so_far.load(sum);
        if constexpr (kMoments) second.load(m2);
      }
      add_samples<kPairs<In>, kMoments, rows>(g, x, packed.per_sample(), group.samples, group.seen,
                                              sum, m2, partial);
      if (p_.dw != nullptr) store(last, dw, so_far, sum);
      if constexpr (kMoments) second.store(m2);
    }
  }

  static void store(bool last, const Place<In>& dw, const Place<A>& so_far, const A* sum) {
    if (last) {
      dw.store(sum);
    } else {
      so_far.store(sum);
    }
  }

  // From the sum of squares to the sum of squared deviations. The subtraction loses at most about
  // eps * (sum of squares): relative to the result that is eps * (1 + mean^2 / variance).
  template <int size>
  void centre(const A* sum, A* m2) const {
    const A n = static_cast<A>(p_.samples);
    for (int k = 0; k < size; ++k) {
      m2[k] = p_.samples == 1 ? A(0) : std::max(A(0), m2[k] - sum[k] * (sum[k] / n));
    }
  }

  const Problem<In> p_;
  const Grid<A> grid_;
  const int64_t slots_;
  std::vector<double> partial_;
};

}  // namespace gradstats::cpu::linear
