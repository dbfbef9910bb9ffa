// The inner loops of the weight gradient of a linear layer: packing, and one register tile.
#pragma once

#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Unroll.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>

#include "sum_squares.h"

namespace gradstats::cpu::linear {

template <typename In>
using Acc = std::conditional_t<std::is_same_v<In, double>, double, float>;

// A tile of the gradient is kMaxRows x 2 vectors: as many accumulators as the registers hold beside
// the operands.
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
constexpr int kMaxRows = 12;
#else
constexpr int kMaxRows = 6;
#endif
template <typename A>
constexpr int kCols = 2 * at::vec::Vectorized<A>::size();

// Products of bfloat16 numbers are exact in float32; where the CPU has an instruction that adds two
// of them at once to a float32 accumulator, positions are packed in pairs.
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
template <typename In>
constexpr bool kPairs = std::is_same_v<In, c10::BFloat16>;
#else
template <typename In>
constexpr bool kPairs = false;
#endif

// How positions are packed: one number each, or two bfloat16 numbers in one word.
enum class Pack { kPlain, kPair };
constexpr int64_t words(Pack pack, int64_t positions) {
  return pack == Pack::kPair ? (positions + 1) / 2 : positions;
}

// The rows of samples, any strides between them.
template <typename In>
struct Rows {
  const In* data;
  int64_t sample_stride, row_stride;

  const In* at(int64_t sample, int64_t t) const {
    return data + sample * sample_stride + t * row_stride;
  }
};

// Asks for part of a row that is read soon, while what is read now comes from nearer caches.
template <typename In>
void prefetch_row(const In* row, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(In);
  for (int64_t c = 0; c < n; c += kLine) __builtin_prefetch(row + c, 0, 2);
}

template <Pack pack, typename In, typename A>
A pack_one(const In* low, const In* high, int64_t c) {
  if constexpr (pack == Pack::kPair) {
    uint32_t word = low[c].x;
    if (high != nullptr) word |= static_cast<uint32_t>(high[c].x) << 16;
    A packed;
    std::memcpy(&packed, &word, sizeof(packed));
    return packed;
  } else {
    return static_cast<A>(low[c]);
  }
}

// dst[word][c] for `count` columns of rows that lie `step` apart, zero up to `width`.
template <Pack pack, int width, typename In, typename A>
void pack_panel(const In* rows, int64_t step, int64_t positions, int64_t count, A* dst) {
  constexpr int64_t kEach = pack == Pack::kPair ? 2 : 1;
  for (int64_t t = 0; t < positions; t += kEach, rows += kEach * step, dst += width) {
    const bool whole = t + kEach <= positions;
    const In* const high = kEach == 2 && whole ? rows + step : nullptr;
    if (count == width && whole) {
      if constexpr (std::is_same_v<In, A>) {
        std::copy_n(rows, width, dst);
      } else {
        for (int64_t c = 0; c < width; ++c) dst[c] = pack_one<pack, In, A>(rows, high, c);
      }
    } else {
      for (int64_t c = 0; c < count; ++c) dst[c] = pack_one<pack, In, A>(rows, high, c);
      std::fill(dst + count, dst + width, A(0));
    }
  }
}

template <bool pairs, typename Vec>
C10_ALWAYS_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
  if constexpr (pairs) {
    return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(__m512(a)),
                            reinterpret_cast<__m512bh>(__m512(b)));
  }
#endif
  return at::vec::fmadd(a, b, c);
}

// acc[r][v] = sum over words of g[word][r] * x[word][v]; both operands stream from the cache once.
template <bool pairs, int rows, typename A>
C10_ALWAYS_INLINE void product(const A* g, const A* x, int64_t count,
                               at::vec::Vectorized<A> (&acc)[rows][2]) {
  using Vec = at::vec::Vectorized<A>;
  c10::ForcedUnroll<rows>{}([&](auto r) { acc[r][0] = acc[r][1] = Vec(0); });
  for (int64_t t = 0; t < count; ++t, g += rows, x += 2 * Vec::size()) {
    const Vec x0 = Vec::loadu(x), x1 = Vec::loadu(x + Vec::size());
    c10::ForcedUnroll<rows>{}([&](auto r) {
      const Vec gr(g[r]);
      acc[r][0] = multiply_add<pairs>(gr, x0, acc[r][0]);
      acc[r][1] = multiply_add<pairs>(gr, x1, acc[r][1]);
    });
  }
}

// Sums over positions run over at most this many words before they are put aside: it bounds the
// rounding error of long sums.
constexpr int64_t kBlock = 256;

template <bool pairs, int rows, typename A>
C10_ALWAYS_INLINE void blocked_product(const A* g, const A* x, int64_t count,
                                       at::vec::Vectorized<A> (&acc)[rows][2]) {
  using Vec = at::vec::Vectorized<A>;
  constexpr int64_t kLanes = Vec::size();
  int64_t done = std::min(count, kBlock);
  product<pairs>(g, x, done, acc);
  alignas(64) A aside[rows * 2 * kLanes];
  while (done < count) {
    c10::ForcedUnroll<rows>{}([&](auto r) {
      acc[r][0].store(aside + r * 2 * kLanes);
      acc[r][1].store(aside + (r * 2 + 1) * kLanes);
    });
    const int64_t more = std::min(count - done, kBlock);
    product<pairs>(g + done * rows, x + done * 2 * kLanes, more, acc);
    c10::ForcedUnroll<rows>{}([&](auto r) {
      acc[r][0] = acc[r][0] + Vec::loadu(aside + r * 2 * kLanes);
      acc[r][1] = acc[r][1] + Vec::loadu(aside + (r * 2 + 1) * kLanes);
    });
    done += more;
  }
}

// One tile of every sample's contribution G, in registers for a moment: its square is added to
// sq_norm, G to the running sum S. With moments, n samples so far and d = G - S/n, M2 grows by
// d^2 n/(n+1) (Welford; the form that cannot be negative).
// g: samples x words x rows, x: samples x words x columns, sum and m2: rows x columns.
template <bool pairs, bool moments, int rows, typename A>
void add_samples(const A* g, const A* x, int64_t words, int64_t samples, int64_t seen, A* sum,
                 A* m2, double* sq_norm) {
  using Vec = at::vec::Vectorized<A>;
  constexpr int64_t kLanes = Vec::size();
  constexpr int kChains = 4;  // one would wait for itself, 4 cycles each time
  for (int64_t b = 0; b < samples; ++b) {
    const double n = static_cast<double>(seen + b);
    const Vec inverse(static_cast<A>(n > 0 ? 1 / n : 0)), weight(static_cast<A>(n / (n + 1)));
    const auto take = [&](const Vec(&acc)[rows][2]) C10_ALWAYS_INLINE_ATTRIBUTE {
      Vec square[kChains] = {Vec(0), Vec(0), Vec(0), Vec(0)};
      c10::ForcedUnroll<2 * rows>{}([&](auto k) C10_ALWAYS_INLINE_ATTRIBUTE {
        const Vec c = acc[k / 2][k % 2];
        A* s = sum + k * kLanes;
        const Vec before = Vec::loadu(s);
        square[k % kChains] = at::vec::fmadd(c, c, square[k % kChains]);
        (before + c).store(s);
        if constexpr (moments) {
          A* m = m2 + k * kLanes;
          const Vec d = c - before * inverse;
          at::vec::fmadd(d * weight, d, Vec::loadu(m)).store(m);
        }
      });
      sq_norm[b] += lanes_sum((square[0] + square[1]) + (square[2] + square[3]));
    };
    Vec acc[rows][2];
    if (words <= kBlock) {  // apart, for what is put aside would take registers
      product<pairs>(g, x, words, acc);
      take(acc);
    } else {
      blocked_product<pairs>(g, x, words, acc);
      take(acc);
    }
    g += words * rows;
    x += words * 2 * kLanes;
  }
}

// Calls f with the height of a tile as a constant.
template <typename F>
void with_rows(int rows, const F& f) {
  switch (rows) {
    case 2:
      return f(std::integral_constant<int, 2>{});
    case 4:
      return f(std::integral_constant<int, 4>{});
    case 6:
      return f(std::integral_constant<int, 6>{});
#if defined(CPU_CAPABILITY_AVX512) || defined(__aarch64__)
    case 8:
      return f(std::integral_constant<int, 8>{});
    case 10:
      return f(std::integral_constant<int, 10>{});
    case 12:
      return f(std::integral_constant<int, 12>{});
#endif
    default:
      TORCH_INTERNAL_ASSERT(false, "no tile of ", rows, " rows");
  }
}

}  // namespace gradstats::cpu::linear
