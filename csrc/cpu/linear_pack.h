// The weight gradient's operands, cut into groups of samples, tiles and panels, and packed.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>

#include <vector>

#include "linear_tile.h"

namespace gradstats::cpu::linear {

constexpr int64_t kGroup = 1024;       // positions of a group, unless one sample has more
constexpr int64_t kPackRows = 16;      // rows read side by side while they are packed
constexpr int64_t kMinWork = 1 << 19;  // multiply-adds that are worth another thread

template <typename In>
struct Problem {
  Rows<In> x, g;
  int64_t samples, positions, in, out;
  // (out, in). The sum of all groups goes to dw, which may be null where only norms are wanted; the
  // groups before the last leave theirs in partial, which may be dw itself.
  In* dw;
  Acc<In>*partial, *m2;
};

// How the gradient is cut. It depends on the shape alone, so sums do not depend on the threads.
template <typename A>
struct Grid {
  int64_t panels, pairs, tiles, chunks;

  Grid(int64_t in, int64_t out)
      : panels(at::ceil_div<int64_t>(in, kCols<A>)),
        pairs((out + 1) / 2),
        tiles(at::ceil_div<int64_t>(2 * pairs, kMaxRows)),
        // Columns are shared out too where there are too few tiles of rows for many threads.
        chunks(std::clamp<int64_t>(64 / tiles, 1, panels)) {}

  // Tiles are even in height, so that only an odd last row is filled up with zeros.
  int64_t row(int64_t tile) const { return 2 * (pairs * tile / tiles); }
  int64_t height(int64_t tile) const { return row(tile + 1) - row(tile); }
  int64_t panel(int64_t chunk) const { return panels * chunk / chunks; }
  int64_t units() const { return chunks * tiles; }
};

struct Group {
  int64_t begin, samples, positions, seen;  // rows [begin, begin + samples * positions)
  int64_t rows() const { return samples * positions; }
};

// Where every row is a sample of its own (`flat`), a group counts as one sample.
inline std::vector<Group> groups(int64_t samples, int64_t positions, bool flat) {
  std::vector<Group> result;
  const int64_t total = samples * positions;
  const int64_t step = flat ? kGroup : std::max<int64_t>(1, kGroup / positions) * positions;
  for (int64_t begin = 0; begin < total; begin += step) {
    const int64_t rows = std::min(step, total - begin);
    result.push_back(flat ? Group{begin, 1, rows, 0}
                          : Group{begin, rows / positions, positions, begin / positions});
  }
  return result;
}

// The operands of one group, packed.
template <Pack pack, typename In>
class Packed {
  using A = Acc<In>;

 public:
  Packed(const Problem<In>& p, const Grid<A>& grid) : p_(p), grid_(grid) {}

  // The first group must be the largest.
  void fill(const Group& group) {
    per_sample_ = words(pack, group.positions);
    count_ = group.samples * per_sample_;
    if (!x_.defined()) {
      const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<A>::value);
      x_ = at::empty({count_ * grid_.panels * kCols<A>}, options);
      g_ = at::empty({count_ * grid_.pairs * 2}, options);
    }
    A *x = x_.template data_ptr<A>(), *g = g_.template data_ptr<A>();
    const int64_t blocks = at::ceil_div(group.positions, kPackRows);
    const int64_t grain = at::ceil_div<int64_t>(kMinWork / 8, kPackRows * (p_.in + p_.out));
    at::parallel_for(0, group.samples * blocks, grain, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t b = unit / blocks, t = unit % blocks * kPackRows;
        const int64_t row = group.begin + b * group.positions + t;
        const int64_t rows = std::min(kPackRows, group.positions - t);
        const int64_t word = b * per_sample_ + words(pack, t);
        const auto x_rows = p_.x.at(row), g_rows = p_.g.at(row);
        for (int64_t k = 0; k < grid_.panels; ++k) {
          const int64_t column = k * kCols<A>, width = std::min<int64_t>(kCols<A>, p_.in - column);
          pack_panel<pack, kCols<A>, In, A>(x_rows.shifted(column), rows, width,
                                            x + (k * count_ + word) * kCols<A>);
        }
        for (int64_t k = 0; k < grid_.tiles; ++k) {
          const int64_t column = grid_.row(k), height = grid_.height(k);
          const int64_t width = std::min(height, p_.out - column);
          with_rows(static_cast<int>(height), [&](auto h) {
            pack_panel<pack, h(), In, A>(g_rows.shifted(column), rows, width,
                                         g + count_ * column + word * height);
          });
        }
      }
    });
  }

  const A* panel(int64_t k) const {
    return x_.template const_data_ptr<A>() + k * count_ * kCols<A>;
  }
  const A* tile(int64_t k) const { return g_.template const_data_ptr<A>() + count_ * grid_.row(k); }
  int64_t per_sample() const { return per_sample_; }
  int64_t count() const { return count_; }

 private:
  const Problem<In>& p_;
  const Grid<A>& grid_;
  Tensor x_, g_;
  int64_t per_sample_ = 0, count_ = 0;
};

}  // namespace gradstats::cpu::linear
