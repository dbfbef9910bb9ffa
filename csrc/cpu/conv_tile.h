// The inner loops of the convolution's weight gradient: packing, one register tile, its statistics.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/Unroll.h>

#include <algorithm>

#include "conv_pack.h"
#include "conv_plan.h"

namespace gradstats::cpu::conv {

// Accumulators of a tile: kMaxRows x 2 vectors, as many as the registers hold beside the operands.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kMaxRows = 12;
#else
constexpr int kMaxRows = 6;
#endif

// tile (Rows, NV vectors) = or += Σ over the positions of x (Rows) ⊗ g (NV vectors);
// depthwise, where both have the channels as lanes: Σ x (Rows, NV vectors) ∘ g (NV vectors).
// The accumulators are initialised by a pack, not by a constructor's loop: after such a loop gcc
// keeps the array in memory, at half the speed. I runs over Rows * NV.
template <typename T, int Rows, int NV, bool Depthwise, int... I>
void tile_sum(const T* x, const T* g, const Segment* begin, const Segment* end, int64_t step,
              int64_t tap, bool first, T* tile, std::integer_sequence<int, I...>) {
  using Vec = at::vec::Vectorized<T>;
  constexpr int kLanes = Vec::size();
  Vec acc[] = {(static_cast<void>(I), Vec(T(0)))...};
  for (const Segment* s = begin; s < end; ++s) {
    const T* xp = x + s->x;
    for (int64_t n = s->count; n > 0; --n, xp += step, g += NV * kLanes) {
      const Vec g0 = Vec::loadu(g), g1 = NV == 2 ? Vec::loadu(g + kLanes) : g0;
      c10::ForcedUnroll<Rows>{}([&](auto r) {
        const Vec x0 = Depthwise ? Vec::loadu(xp + r * tap) : Vec(xp[r]);
        acc[r * NV] = at::vec::fmadd(x0, g0, acc[r * NV]);
        if constexpr (NV == 2) {
          const Vec x1 = Depthwise ? Vec::loadu(xp + r * tap + kLanes) : x0;
          acc[r * NV + 1] = at::vec::fmadd(x1, g1, acc[r * NV + 1]);
        }
      });
    }
  }
  if (first) {
    (acc[I].store(tile + I * kLanes), ...);
  } else {
    ((acc[I] + Vec::loadu(tile + I * kLanes)).store(tile + I * kLanes), ...);
  }
}

template <typename T, int Rows, int NV, bool Depthwise>
void tile_sum(const T* x, const T* g, const Segment* begin, const Segment* end, int64_t step,
              int64_t tap, bool first, T* tile) {
  tile_sum<T, Rows, NV, Depthwise>(x, g, begin, end, step, tap, first, tile,
                                   std::make_integer_sequence<int, Rows * NV>{});
}

template <typename T>
using TileSum = void (*)(const T*, const T*, const Segment*, const Segment*, int64_t, int64_t, bool,
                         T*);

template <typename T, int NV, bool Depthwise, int... Rows>
TileSum<T> tile_sum_of(int rows, std::integer_sequence<int, Rows...>) {
  static constexpr TileSum<T> kTable[] = {tile_sum<T, Rows + 1, NV, Depthwise>...};
  return kTable[rows - 1];
}

template <typename T>
TileSum<T> tile_sum_of(int rows, bool two, bool depthwise) {
  constexpr auto kRows = std::make_integer_sequence<int, kMaxRows>{};
  if (depthwise) {
    return two ? tile_sum_of<T, 2, true>(rows, kRows) : tile_sum_of<T, 1, true>(rows, kRows);
  }
  return two ? tile_sum_of<T, 2, false>(rows, kRows) : tile_sum_of<T, 1, false>(rows, kRows);
}

// One sample's slice of the activation into (Dp, Hp, Wp, width); the border is zero already.
template <typename T>
void pack_activation(const Plan& plan, const T* x, const Dims& strides, int64_t channel_stride,
                     int64_t channels, T* dst) {
  const Geometry& geo = plan.geo;
  const Dims& pad = geo.padding;
  // Without padding, rows that touch in both layouts are packed as one: fewer, fuller transposes.
  const bool rows = pad[1] == 0 && pad[2] == 0 && strides[1] == geo.in[2] * strides[2];
  for (int64_t d = 0; d < geo.in[0]; ++d) {
    for (int64_t h = 0; h < (rows ? 1 : geo.in[1]); ++h) {
      const int64_t at = ((d + pad[0]) * plan.padded[1] + h + pad[1]) * plan.padded[2] + pad[2];
      pack(x + d * strides[0] + h * strides[1], channel_stride, strides[2], channels,
           rows ? geo.in[1] * geo.in[2] : geo.in[2], dst + at * plan.width, plan.width);
    }
  }
}

}  // namespace gradstats::cpu::conv
