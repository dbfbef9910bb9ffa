// How one convolution's weight gradient is cut into register tiles; pure index arithmetic.
#pragma once

#include <ATen/ATen.h>
#include <ATen/ceil_div.h>

#include <algorithm>
#include <array>
#include <vector>

namespace gradstats::cpu::conv {

using Dims =
    std::array<int64_t, 3>;  // depth, height, width; 1-d and 2-d calls are padded with ones

// Sums over positions run over at most this many terms before they are added to the tile in
// memory: it bounds the rounding error of long sums and keeps a block of both operands in L1/L2.
constexpr int64_t kBlock = 256;

struct Geometry {
  Dims in, out, kernel, stride, padding, dilation;
  int64_t batch, in_channels, out_channels, groups;
};

// `count` output positions, `step` apart in the packed activation, from offset `x`.
struct Segment {
  int64_t x, count;
};

// Rows [row, row + size) of the (taps x channels, lanes) gradient; tap 0 sits at offset `x`.
struct Tile {
  int64_t x, row;
  int size;
};

// The activation of a sample is packed channels-last and zero padded, (Dp, Hp, Wp, width), the
// output gradient (positions, lanes). Then the taps along the width and the channels are one run of
// consecutive numbers, and no patch matrix is ever written.
// A slice is what shares a packed activation: a group, or `lanes` channels of a depthwise
// convolution. A panel is `lanes` output channels of a slice.
struct Plan {
  Geometry geo;
  bool depthwise;
  int64_t lanes, width, positions, padded_size;
  int64_t slices, panels, rows;  // panels per slice; rows of one panel's gradient
  int64_t step, tap;             // offsets between output positions, and between rows of a tile
  Dims padded;
  std::vector<Segment> segments;
  std::vector<int64_t> blocks;  // segments [blocks[k], blocks[k + 1]) make block k
  std::vector<Tile> tiles;

  Plan(const Geometry& g, int64_t lanes_, int max_rows)
      : geo(g),
        depthwise(g.groups > 1 && g.groups == g.in_channels && g.groups == g.out_channels),
        lanes(lanes_) {
    const int64_t out_per_group = g.out_channels / g.groups;
    width = depthwise ? lanes : g.in_channels / g.groups;
    slices = depthwise ? at::ceil_div(g.out_channels, lanes) : g.groups;
    panels = depthwise ? 1 : at::ceil_div(out_per_group, lanes);
    positions = g.out[0] * g.out[1] * g.out[2];
    for (int d = 0; d < 3; ++d) padded[d] = g.in[d] + 2 * g.padding[d];
    padded_size = padded[0] * padded[1] * padded[2] * width;
    step = g.stride[2] * width;
    tap = depthwise ? g.dilation[2] * width : 1;
    cut_positions();
    cut_rows(max_rows);
  }

  int64_t channels_per_slice() const { return depthwise ? lanes : geo.out_channels / geo.groups; }
  int64_t panel_size() const { return rows * lanes; }
  int64_t units() const { return slices * panels; }

 private:
  int64_t offset(int64_t d, int64_t h, int64_t w) const {
    return ((d * padded[1] + h) * padded[2] + w) * width;
  }

  void cut_positions() {
    std::vector<Segment> whole;
    for (int64_t d = 0; d < geo.out[0]; ++d) {
      for (int64_t h = 0; h < geo.out[1]; ++h) {
        const int64_t x = offset(d * geo.stride[0], h * geo.stride[1], 0);
        // Rows that follow each other without a gap (1x1 kernels) are one long row.
        if (!whole.empty() && whole.back().x + whole.back().count * step == x) {
          whole.back().count += geo.out[2];
        } else {
          whole.push_back({x, geo.out[2]});
        }
      }
    }
    int64_t room = 0;
    for (const Segment& s : whole) {
      for (int64_t done = 0; done < s.count;) {
        if (room == 0) {
          blocks.push_back(static_cast<int64_t>(segments.size()));
          room = kBlock;
        }
        const int64_t count = std::min(room, s.count - done);
        segments.push_back({s.x + done * step, count});
        done += count;
        room -= count;
      }
    }
    blocks.push_back(static_cast<int64_t>(segments.size()));
  }

  void cut_rows(int max_rows) {
    rows = 0;
    const bool joined = depthwise || geo.dilation[2] == 1;
    const int64_t per_tap = depthwise ? 1 : width;
    const int64_t run = joined ? geo.kernel[2] * per_tap : per_tap;
    for (int64_t d = 0; d < geo.kernel[0]; ++d) {
      for (int64_t h = 0; h < geo.kernel[1]; ++h) {
        for (int64_t w = 0; w < (joined ? 1 : geo.kernel[2]); ++w) {
          const int64_t x = offset(d * geo.dilation[0], h * geo.dilation[1], w * geo.dilation[2]);
          const int64_t parts = at::ceil_div(run, static_cast<int64_t>(max_rows));
          for (int64_t p = 0; p < parts; ++p) {
            const int64_t begin = run * p / parts, end = run * (p + 1) / parts;
            tiles.push_back({x + begin * tap, rows + begin, static_cast<int>(end - begin)});
          }
          rows += run;
        }
      }
    }
  }
};

}  // namespace gradstats::cpu::conv
