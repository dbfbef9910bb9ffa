// One tap's tile of the weight gradient, (Rows input channels, NV vectors of output channels), over
// a run of samples whose operands are packed (sample, position, Rows) and (sample, position,
// lanes).
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/Unroll.h>

#include <utility>

#include "conv_taps.h"
#include "conv_tile.h"

namespace gradstats::cpu::conv {

// kSum: the gradient alone. kNorms: and each sample's squared norm. kMoments: and the second
// moment. kResident: the same, with the sums in registers while samples go by, for fewer rows:
// cheaper where a sample has few positions.
enum class Mode { kSum, kNorms, kMoments, kResident };

// Rows of a tile: where the registers would hold more, a whole number of transposed squares.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int kTapRows = 8;
#else
constexpr int kTapRows = 6;
#endif
constexpr int rows_of(Mode mode) { return mode == Mode::kResident ? kTapRows / 2 : kTapRows; }

template <typename T>
struct TapRun {
  const T *x, *g;          // first sample of the run
  int64_t x_step, g_step;  // between samples
  const Pair *begin, *end;
  int64_t samples;
  T *sum, *m2;
  int64_t ld;  // between rows of sum and of m2
  // Of each sample, with n before it: lanes that its squared norm is added to, 1/n and n/(n+1).
  T* squares;
  const T *inverse, *weight;
};

// acc (Rows x NV) += Σ over the pairs of x (Rows) ⊗ g (NV vectors)
template <typename T, int Rows, int NV, typename Vec>
C10_ALWAYS_INLINE void add_pairs(const TapRun<T>& run, int64_t sample, Vec (&acc)[Rows * NV]) {
  constexpr int kLanes = Vec::size();
  const T *x = run.x + sample * run.x_step, *g = run.g + sample * run.g_step;
  for (const Pair *p = run.begin, *end = run.end; p < end; ++p) {
    const T *xp = x + int64_t{p->x} * Rows, *gp = g + int64_t{p->g} * (NV * kLanes);
    const Vec g0 = Vec::loadu(gp), g1 = NV == 2 ? Vec::loadu(gp + kLanes) : g0;
    c10::ForcedUnroll<Rows>{}([&](auto r) {
      const Vec xr(xp[r]);
      acc[r * NV] = at::vec::fmadd(xr, g0, acc[r * NV]);
      if constexpr (NV == 2) acc[r * NV + 1] = at::vec::fmadd(xr, g1, acc[r * NV + 1]);
    });
  }
}

// As in conv_tile.h the accumulators are initialised by a pack, for gcc. I runs over Rows * NV.
template <typename T, int Rows, int NV, int... I>
void sum_tile(const TapRun<T>& run, std::integer_sequence<int, I...>) {
  using Vec = at::vec::Vectorized<T>;
  T* const sum = run.sum;
  const int64_t ld = run.ld;
  const int64_t pairs = std::max<int64_t>(1, run.end - run.begin);
  const int64_t step = std::max<int64_t>(1, kBlock / pairs);
  for (int64_t b = 0; b < run.samples; b += step) {
    Vec acc[] = {(static_cast<void>(I), Vec(T(0)))...};
    for (int64_t s = b; s < std::min(run.samples, b + step); ++s) {
      add_pairs<T, Rows, NV>(run, s, acc);
    }
    const auto place = [&](int i) { return sum + i / NV * ld + i % NV * Vec::size(); };
    ((acc[I] + Vec::loadu(place(I))).store(place(I)), ...);
  }
}

template <typename T, int Rows, int NV, bool Moments, int... I>
void norms_tile(const TapRun<T>& run, std::integer_sequence<int, I...>) {
  using Vec = at::vec::Vectorized<T>;
  T *const sum = run.sum, *const m2 = run.m2;
  const int64_t ld = run.ld;
  for (int64_t s = 0; s < run.samples; ++s) {
    Vec acc[] = {(static_cast<void>(I), Vec(T(0)))...};
    add_pairs<T, Rows, NV>(run, s, acc);
    const Vec inverse(run.inverse[s]), weight(run.weight[s]);
    Vec square[2] = {Vec(T(0)), Vec(T(0))};
    c10::ForcedUnroll<Rows * NV>{}([&](auto i) {
      const int64_t at = i / NV * ld + i % NV * Vec::size();
      const Vec c = acc[i], before = Vec::loadu(sum + at);
      square[i % 2] = at::vec::fmadd(c, c, square[i % 2]);
      (before + c).store(sum + at);
      if constexpr (Moments) {
        const Vec d = c - before * inverse;
        at::vec::fmadd(d * weight, d, Vec::loadu(m2 + at)).store(m2 + at);
      }
    });
    T* sq = run.squares + s * Vec::size();
    (Vec::loadu(sq) + (square[0] + square[1])).store(sq);
  }
}

template <typename T, int Rows, int NV, int... I>
void resident_tile(const TapRun<T>& run, std::integer_sequence<int, I...>) {
  using Vec = at::vec::Vectorized<T>;
  const auto at = [&](int i) { return i / NV * run.ld + i % NV * Vec::size(); };
  Vec sum[] = {Vec::loadu(run.sum + at(I))...}, m2[] = {Vec::loadu(run.m2 + at(I))...};
  for (int64_t s = 0; s < run.samples; ++s) {
    Vec acc[] = {(static_cast<void>(I), Vec(T(0)))...};
    add_pairs<T, Rows, NV>(run, s, acc);
    const Vec inverse(run.inverse[s]), weight(run.weight[s]);
    Vec square[2] = {Vec(T(0)), Vec(T(0))};
    c10::ForcedUnroll<Rows * NV>{}([&](auto i) {
      const Vec c = acc[i], d = c - sum[i] * inverse;
      square[i % 2] = at::vec::fmadd(c, c, square[i % 2]);
      m2[i] = at::vec::fmadd(d * weight, d, m2[i]);
      sum[i] = sum[i] + c;
    });
    T* sq = run.squares + s * Vec::size();
    (Vec::loadu(sq) + (square[0] + square[1])).store(sq);
  }
  (sum[I].store(run.sum + at(I)), ...);
  (m2[I].store(run.m2 + at(I)), ...);
}

template <typename T>
using TapTile = void (*)(const TapRun<T>&);

template <typename T, int Rows, int NV, Mode mode>
void tap_tile(const TapRun<T>& run) {
  constexpr auto kAll = std::make_integer_sequence<int, Rows * NV>{};
  if constexpr (mode == Mode::kSum) {
    sum_tile<T, Rows, NV>(run, kAll);
  } else if constexpr (mode == Mode::kResident) {
    resident_tile<T, Rows, NV>(run, kAll);
  } else {
    norms_tile<T, Rows, NV, mode == Mode::kMoments>(run, kAll);
  }
}

template <typename T, int NV, Mode mode, int... Rows>
TapTile<T> tap_tile_of(int64_t rows, std::integer_sequence<int, Rows...>) {
  static constexpr TapTile<T> kTable[] = {tap_tile<T, Rows + 1, NV, mode>...};
  return kTable[rows - 1];
}

template <typename T, Mode mode>
TapTile<T> tap_tile_of(int64_t rows, bool two) {
  constexpr auto kAll = std::make_integer_sequence<int, rows_of(mode)>{};
  return two ? tap_tile_of<T, 2, mode>(rows, kAll) : tap_tile_of<T, 1, mode>(rows, kAll);
}

template <typename T>
TapTile<T> tap_tile_of(Mode mode, int64_t rows, bool two) {
  switch (mode) {
    case Mode::kSum:
      return tap_tile_of<T, Mode::kSum>(rows, two);
    case Mode::kNorms:
      return tap_tile_of<T, Mode::kNorms>(rows, two);
    case Mode::kMoments:
      return tap_tile_of<T, Mode::kMoments>(rows, two);
    default:
      return tap_tile_of<T, Mode::kResident>(rows, two);
  }
}

}  // namespace gradstats::cpu::conv
