// A convolution's weight gradient tap by tap: which pairs of positions meet, and how both operands
// are packed for it; pure index arithmetic.
//
// Only pairs inside the image are listed. On small maps padding is most of what a kernel sees: of a
// 3x3 kernel on a 2x2 map 20 of 36 pairs, on 8x8 still one in six.
#pragma once

#include <vector>

#include "conv_plan.h"

namespace gradstats::cpu::conv {

struct Pair {
  int32_t x, g;  // input and output position
};

struct Taps {
  Geometry geo;
  int64_t pixels, positions, count;  // of the input, of the output, of taps
  std::vector<Pair> pairs;
  std::vector<int64_t> begin;  // pairs [begin[k], begin[k + 1]) belong to tap k

  explicit Taps(const Geometry& g)
      : geo(g),
        pixels(g.in[0] * g.in[1] * g.in[2]),
        positions(g.out[0] * g.out[1] * g.out[2]),
        count(g.kernel[0] * g.kernel[1] * g.kernel[2]) {
    begin.push_back(0);
    for (int64_t d = 0; d < g.kernel[0]; ++d) {
      for (int64_t h = 0; h < g.kernel[1]; ++h) {
        for (int64_t w = 0; w < g.kernel[2]; ++w) add({d, h, w});
      }
    }
  }

  // Output positions along dimension d whose input at kernel offset k is inside: [first, second).
  static std::pair<int64_t, int64_t> inside(const Geometry& g, int d, int64_t k) {
    const int64_t shift = k * g.dilation[d] - g.padding[d];
    const int64_t low = shift >= 0 ? 0 : at::ceil_div(-shift, g.stride[d]);
    const int64_t room = g.in[d] - 1 - shift;
    const int64_t high = room < 0 ? 0 : std::min(g.out[d], room / g.stride[d] + 1);
    return {std::min(low, high), high};
  }

 private:
  void add(const Dims& k) {
    std::array<std::pair<int64_t, int64_t>, 3> range;
    for (int d = 0; d < 3; ++d) range[d] = inside(geo, d, k[d]);
    const auto pixel = [&](int d, int64_t t) {
      return t * geo.stride[d] + k[d] * geo.dilation[d] - geo.padding[d];
    };
    for (int64_t d = range[0].first; d < range[0].second; ++d) {
      for (int64_t h = range[1].first; h < range[1].second; ++h) {
        for (int64_t w = range[2].first; w < range[2].second; ++w) {
          const int64_t x = (pixel(0, d) * geo.in[1] + pixel(1, h)) * geo.in[2] + pixel(2, w);
          const int64_t g = (d * geo.out[1] + h) * geo.out[2] + w;
          pairs.push_back({static_cast<int32_t>(x), static_cast<int32_t>(g)});
        }
      }
    }
    begin.push_back(static_cast<int64_t>(pairs.size()));
  }
};

// Input channels are cut into blocks of up to `max_rows`, output channels into panels of `lanes`,
// both within a group. A unit is one block against one panel, with all taps.
struct Units {
  int64_t groups, in, out, lanes, blocks, panels;  // in, out: channels per group

  Units(const Geometry& g, int64_t lanes_, int64_t max_rows)
      : groups(g.groups),
        in(g.in_channels / g.groups),
        out(g.out_channels / g.groups),
        lanes(lanes_),
        blocks(at::ceil_div(in, max_rows)),
        panels(at::ceil_div(out, lanes)) {}

  int64_t count() const { return groups * panels * blocks; }
  int64_t row(int64_t block) const { return in * block / blocks; }
  int64_t height(int64_t block) const { return row(block + 1) - row(block); }
};

}  // namespace gradstats::cpu::conv
