// How the weight gradient is cut into blocks, tiles and panels, and the packing of a block's
// operands.
#pragma once

#include <ATen/ATen.h>
#include <ATen/ceil_div.h>
#include <unistd.h>

#include <vector>

#include "linear_tile.h"

namespace gradstats::cpu::linear {

constexpr int64_t kGroup = 512;        // positions of a group, unless one sample has more
constexpr int64_t kPackRows = 16;      // rows read side by side while they are packed
constexpr int64_t kBlockPanels = 16;   // of one block
constexpr int64_t kMinWork = 1 << 19;  // multiply-adds that are worth another thread

// Of packed grad_output: half the L2 cache. How rows are cut does not change any sum.
inline int64_t slab_bytes() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr int64_t l2 = 0;
#endif
  return std::clamp<int64_t>(l2 / 2, 256 << 10, 1 << 20);
}

template <typename In>
struct Problem {
  Rows<In> x, g;
  int64_t samples, positions, in, out;
  // (out, in), `ld` elements from row to row; dw may be null where it is not wanted.
  In* dw;
  Acc<In>* m2;
  int64_t ld;
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
  int64_t chunk(int64_t panel) const { return ((panel + 1) * chunks - 1) / panels; }
  int64_t units() const { return chunks * tiles; }
};

struct Group {
  int64_t begin, samples, positions, seen;  // rows [begin, begin + samples * positions)
  int64_t rows() const { return samples * positions; }
};

inline std::vector<Group> groups(int64_t samples, int64_t positions) {
  std::vector<Group> result;
  const int64_t step = std::max<int64_t>(1, kGroup / positions);
  for (int64_t seen = 0; seen < samples; seen += step) {
    result.push_back({seen * positions, std::min(step, samples - seen), positions, seen});
  }
  return result;
}

// grad_output of one group for tiles [begin, end): tile by tile, word by word.
template <Pack pack, typename In>
void pack_tiles(const Problem<In>& p, const Grid<Acc<In>>& grid, const Group& group, int64_t begin,
                int64_t end, Acc<In>* to) {
  const int64_t per_sample = words(pack, group.positions), count = group.samples * per_sample;
  const int64_t first = grid.row(begin);
  for (int64_t b = 0; b < group.samples; ++b) {
    for (int64_t t = 0; t < group.positions; t += kPackRows) {
      const In* const rows = p.g.at(group.seen + b, t);
      const int64_t positions = std::min(kPackRows, group.positions - t);
      const int64_t word = b * per_sample + words(pack, t);
      for (int64_t k = begin, column = first; k < end; ++k) {
        const int64_t next = grid.row(k + 1), height = next - column;
        const int64_t width = std::min(height, p.out - column);
        Acc<In>* tile = to + count * (column - first) + word * height;
        with_rows(static_cast<int>(height), [&](auto h) {
          pack_panel<pack, h(), In, Acc<In>>(rows + column, p.g.row_stride, positions, width, tile);
        });
        column = next;
      }
    }
  }
}

// Activations of one group, kCols columns of them.
template <Pack pack, typename In>
void pack_columns(const Problem<In>& p, const Group& group, int64_t panel, Acc<In>* to) {
  constexpr int64_t kWidth = kCols<Acc<In>>;
  const int64_t per_sample = words(pack, group.positions), column = panel * kWidth;
  const int64_t width = std::min<int64_t>(kWidth, p.in - column);
  for (int64_t b = 0; b < group.samples; ++b) {
    pack_panel<pack, kWidth, In, Acc<In>>(p.x.at(group.seen + b, 0) + column, p.x.row_stride,
                                          group.positions, width, to + b * per_sample * kWidth);
  }
}

// Asks for rows [begin, end) of the group's activations in a panel. Their rows lie pages apart,
// where the hardware does not look ahead.
template <typename In>
void prefetch_columns(const Problem<In>& p, const Group& group, int64_t panel, int64_t begin,
                      int64_t end) {
  constexpr int64_t kWidth = kCols<Acc<In>>;
  const int64_t column = panel * kWidth, width = std::min<int64_t>(kWidth, p.in - column);
  int64_t b = group.seen + begin / group.positions, t = begin % group.positions;
  for (int64_t k = begin; k < end; ++k) {
    prefetch_row(p.x.at(b, t) + column, width);
    if (++t == group.positions) {
      t = 0;
      ++b;
    }
  }
}

}  // namespace gradstats::cpu::linear
