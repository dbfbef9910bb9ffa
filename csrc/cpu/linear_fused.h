// Weight gradient of a linear layer with per-sample statistics, in one pass over register tiles.
//
// A thread owns blocks of the gradient and takes the samples in groups. What it needs of a group it
// packs for itself, grad_output in tiles of up to kMaxRows rows, activations in panels of kCols
// columns, into scratch that stays in its caches: the operands are read from memory and nothing but
// the sums is written. A sample's contribution exists only in registers.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>

#include <vector>

#include "linear_pack.h"
#include "linear_tile.h"
#include "scratch.h"

namespace gradstats::cpu::linear {

// Part of a matrix; copies take the part that exists of a tile.
template <typename T>
struct Place {
  T* data;
  int64_t ld, rows, cols;

  void load(T* tile) const { copy(data, ld, tile, kCols<T>); }
  void store(const Acc<T>* tile) const {
    constexpr int64_t width = kCols<Acc<T>>;
    if constexpr (std::is_same_v<T, Acc<T>>) {
      copy(tile, width, data, ld);
    } else {
      for (int64_t r = 0; r < rows; ++r) {
        using Vec = at::vec::Vectorized<Acc<T>>;
        const auto v = at::vec::convert_from_float<T>(Vec::loadu(tile + r * width),
                                                      Vec::loadu(tile + r * width + width / 2));
        v.store(data + r * ld, static_cast<int>(cols));
      }
    }
  }

 private:
  // Of a known width in vectors: calls that copy a hundred bytes take longer than that.
  void copy(const T* from, int64_t from_ld, T* to, int64_t to_ld) const {
    constexpr int64_t width = kCols<T>;
    for (int64_t r = 0; r < rows; ++r, from += from_ld, to += to_ld) {
      if (cols == width) {
        std::copy_n(from, width, to);
      } else {
        std::copy_n(from, cols, to);
      }
    }
  }
};

template <typename In, bool kMoments>
class Pass {
  using A = Acc<In>;
  static constexpr Pack kPack = kPairs<In> ? Pack::kPair : Pack::kPlain;
  static constexpr int64_t kWidth = kCols<A>;

 public:
  explicit Pass(const Problem<In>& problem)
      : p_(problem),
        grid_(problem.in, problem.out),
        groups_(groups(problem.samples, problem.positions)),
        partial_(grid_.units() * problem.samples, 0.0) {}

  void run() {
    const int64_t work = p_.samples * p_.positions * kMaxRows * p_.in / grid_.chunks;
    const int64_t grain = std::max<int64_t>(1, kMinWork / std::max<int64_t>(1, work));
    at::parallel_for(0, grid_.units(), grain, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t chunk = begin / grid_.tiles, first = begin % grid_.tiles;
        // Chunks of the same rows go together: their grad_output is packed once.
        const int64_t chunks = first > 0 ? 1 : std::max<int64_t>(1, (end - begin) / grid_.tiles);
        const int64_t last = std::min(grid_.tiles, first + end - begin);
        cut({first, last, grid_.panel(chunk), grid_.panel(chunk + chunks)});
        begin += chunks * (last - first);
      }
    });
  }

  // Adds up what the tiles found, in fixed order.
  void sq_norms(A* out) const {
    for (int64_t b = 0; b < p_.samples; ++b) {
      double total = 0;
      for (int64_t u = 0; u < grid_.units(); ++u) total += partial_[u * p_.samples + b];
      out[b] = static_cast<A>(total);
    }
  }

 private:
  struct Block {
    int64_t begin, end, first, last;  // tiles [begin, end), panels [first, last)
  };

  // What a thread has packed of a group, and where it keeps sums that cannot be kept in dw.
  struct Scratch {
    A *g, *x, *sums;
    int64_t ld;
  };

  // Into blocks that fit into the caches, one after the other.
  void cut(const Block& all) {
    const int64_t bytes = groups_[0].rows() * kMaxRows * static_cast<int64_t>(sizeof(A));
    const int64_t fit = std::max<int64_t>(1, slab_bytes() / bytes);
    const int64_t tiles = all.end - all.begin, slab = at::ceil_div(tiles, at::ceil_div(tiles, fit));
    for (int64_t tile = all.begin; tile < all.end; tile += slab) {
      for (int64_t panel = all.first; panel < all.last; panel += kBlockPanels) {
        run({tile, std::min(all.end, tile + slab), panel,
             std::min(all.last, panel + kBlockPanels)});
      }
    }
  }

  void run(const Block& block) {
    static thread_local std::vector<A> of_g, of_x, of_sums;  // kept from call to call
    const int64_t height = grid_.row(block.end) - grid_.row(block.begin);
    const int64_t count = groups_[0].rows();  // the first group is the largest
    const int64_t ld = (block.last - block.first) * kWidth;
    const Scratch scratch{at_line(of_g, count * height), at_line(of_x, count * kWidth),
                          in_place() ? nullptr : at_line(of_sums, height * ld), ld};
    for (const Group& group : groups_) {
      pack_tiles<kPack>(p_, grid_, group, block.begin, block.end, scratch.g);
      for (int64_t panel = block.first; panel < block.last; ++panel) {
        pack_columns<kPack>(p_, group, panel, scratch.x);
        const int64_t tiles = block.end - block.begin, ahead = group.rows();
        for (int64_t k = 0; k < tiles; ++k) {
          if (panel + 1 < block.last) {
            prefetch_columns(p_, group, panel + 1, ahead * k / tiles, ahead * (k + 1) / tiles);
          }
          const int64_t tile = block.begin + k;
          with_rows(static_cast<int>(grid_.height(tile)),
                    [&](auto rows) { one<rows()>(group, scratch, block, tile, panel); });
        }
      }
    }
  }

  // Whether the groups before the last leave their sums in dw itself.
  bool in_place() const { return std::is_same_v<In, A> && p_.dw != nullptr; }

  template <int rows>
  void one(const Group& group, const Scratch& scratch, const Block& block, int64_t tile,
           int64_t panel) {
    const int64_t row = grid_.row(tile), column = panel * kWidth, offset = row * p_.ld + column;
    const int64_t height = std::min<int64_t>(rows, p_.out - row);
    const int64_t width = std::min(kWidth, p_.in - column);
    const int64_t down = row - grid_.row(block.begin);
    const Place<In> dw{p_.dw + offset, p_.ld, height, width};
    const int64_t kept = down * scratch.ld + (panel - block.first) * kWidth;
    Place<A> so_far{scratch.sums + kept, scratch.ld, height, width};
    if constexpr (std::is_same_v<In, A>) {
      if (in_place()) so_far = dw;
    }
    const Place<A> second{p_.m2 + offset, p_.ld, height, width};
    alignas(64) A sum[rows * kWidth], m2[rows * kWidth];
    if (group.begin == 0) {
      zero<rows * kWidth>(sum);
      if constexpr (kMoments) zero<rows * kWidth>(m2);
    } else {
      so_far.load(sum);
      if constexpr (kMoments) second.load(m2);
    }
    const int64_t per_sample = words(kPack, group.positions);
    const int64_t unit = grid_.chunk(panel) * grid_.tiles + tile;
    add_samples<kPairs<In>, kMoments, rows>(scratch.g + group.samples * per_sample * down,
                                            scratch.x, per_sample, group.samples, group.seen, sum,
                                            m2, partial_.data() + unit * p_.samples + group.seen);
    if (group.begin + group.rows() < p_.samples * p_.positions) {
      so_far.store(sum);
    } else if (p_.dw != nullptr) {
      dw.store(sum);
    }
    if constexpr (kMoments) second.store(m2);
  }

  // As vectors: the compiler's choice for a fill of this size takes longer than a short sample.
  template <int size>
  static void zero(A* tile) {
    using Vec = at::vec::Vectorized<A>;
    for (int k = 0; k < size; k += Vec::size()) Vec(0).store(tile + k);
  }

  const Problem<In> p_;
  const Grid<A> grid_;
  const std::vector<Group> groups_;
  std::vector<double> partial_;
};

}  // namespace gradstats::cpu::linear
