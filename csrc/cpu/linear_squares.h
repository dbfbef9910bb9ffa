// Sums of squares of rank-one gradients on matrix tiles (Intel AMX), at nearly float32's precision.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>
#include <ATen/cpu/Utils.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "linear_tile.h"

#if defined(CPU_CAPABILITY_AVX512) && defined(__x86_64__) && \
    (defined(__clang__) || (defined(__GNUC__) && __GNUC__ >= 11))
#define GRADSTATS_TILES
#include <immintrin.h>
#endif

namespace gradstats::cpu::linear {

// m2_oi = max(0, Σ_b g²_bo x²_bi − sum²_oi / B) for x (B, I), g (B, O), sum and m2 (O, I).
//
// Tiles multiply bfloat16 numbers into float32. Each square is the sum of two of them, high and low
// (16 of its 24 bits), and three of the four products are taken: the terms, which all have one
// sign, are off by 2^-16 at most. Squares are brought to a common magnitude first, by a power of
// two, for tiles take the smallest numbers as zero.
#ifdef GRADSTATS_TILES

class SquaresOnTiles {
 public:
  static bool available() {
    static const bool yes = at::cpu::init_amx();  // asks the system for the registers, once
    return yes;
  }

  // Worth it where tiles are full, and packing is little beside the product.
  static bool fits(int64_t samples, int64_t in, int64_t out) {
    return samples >= 32 && in >= 2 * kPanel && out >= 2 * kPanel && available();
  }

  // `largest_*`: the largest squared norm of a sample's row, finite and above zero.
  SquaresOnTiles(int64_t samples, int64_t in, int64_t out, double largest_x, double largest_g)
      : samples_(samples), in_(in), out_(out), by_x_(factor(largest_x)), by_g_(factor(largest_g)) {}

  // lost[o]: whether an element of row o is below `least` of its sum of squares.
  template <typename In>
  void run(const Rows<In>& x, const Rows<In>& g, const float* sum, float* m2, float least,
           std::vector<char>& lost) {
    const int64_t columns = at::ceil_div(in_, kPanel), rows = at::ceil_div(out_, kPanel);
    const int64_t depth = std::min(kDepth, round_up(samples_));
    const at::Tensor scratch =
        at::empty({(columns + rows) * kPanel * depth * 2}, at::TensorOptions().dtype(at::kShort));
    auto* right = reinterpret_cast<uint32_t*>(scratch.data_ptr<int16_t>());
    uint32_t* left = right + columns * kPanel * depth;
    for (int64_t first = 0; first < samples_; first += depth) {
      const int64_t count = std::min(depth, samples_ - first), blocks = round_up(count) / kBlock;
      at::parallel_for(0, columns + rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          if (p < columns) {
            pack<false>(x, first, count, p * kPanel, in_, by_x_, right + p * kWords * blocks);
          } else {
            const int64_t row = p - columns;
            pack<true>(g, first, count, row * kPanel, out_, by_g_, left + row * kWords * blocks);
          }
        }
      });
      const bool last = first + count == samples_;
      at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        multiply(left, right, blocks, begin, end, first == 0, last, sum, m2, least, lost.data());
      });
    }
  }

 private:
  static constexpr int64_t kSide = 16;             // rows of a tile, and its 32-bit words per row
  static constexpr int64_t kPanel = 2 * kSide;     // rows or columns of m2 that are taken at once
  static constexpr int64_t kBlock = 2 * kSide;     // samples in a tile
  static constexpr int64_t kDepth = 16 * kBlock;   // samples whose panels (64 KB each) are packed
  static constexpr int64_t kTile = kSide * kSide;  // words
  static constexpr int64_t kWords = 4 * kTile;     // of a panel and block: high 0, 1, low 0, 1

  static int64_t round_up(int64_t samples) { return at::ceil_div(samples, kBlock) * kBlock; }

  // A power of two that brings numbers whose squares come to `largest` near one.
  static int factor(double largest) { return std::clamp(-std::ilogb(largest) / 2, -60, 60); }

  // 32 samples of 16 numbers as words of two samples each, high and low parts. `transposed`: a row
  // for each number, as the left operand has it.
  template <bool transposed, typename In>
  static void pack(const Rows<In>& rows, int64_t first, int64_t count, int64_t at, int64_t width,
                   int power, uint32_t* to) {
    const __m512 scale = _mm512_set1_ps(std::ldexp(1.0f, power));
    for (int64_t b = 0; b < count; b += kBlock) {
      for (int64_t half = 0; half < 2; ++half) {
        const int64_t column = at + half * kSide;
        const auto wanted = static_cast<int>(std::clamp<int64_t>(width - column, 0, kSide));
        __m512i high[kSide], low[kSide];
        for (int64_t pair = 0; pair < kSide; ++pair) {
          __m512i h[2], l[2];
          for (int64_t k = 0; k < 2; ++k) {
            const int64_t sample = b + 2 * pair + k;
            const __m512 v =
                sample < count && wanted > 0
                    ? load(rows.data + (first + sample) * rows.sample_stride + column, wanted)
                    : _mm512_setzero_ps();
            const __m512 scaled = _mm512_mul_ps(v, scale), square = _mm512_mul_ps(scaled, scaled);
            h[k] = rounded(square);
            l[k] = rounded(_mm512_sub_ps(square, _mm512_castsi512_ps(h[k])));
          }
          high[pair] = _mm512_or_si512(_mm512_srli_epi32(h[0], 16), h[1]);
          low[pair] = _mm512_or_si512(_mm512_srli_epi32(l[0], 16), l[1]);
        }
        if constexpr (transposed) {
          transpose(high);
          transpose(low);
        }
        uint32_t* tile = to + (b / kBlock) * kWords + half * kTile;
        for (int64_t r = 0; r < kSide; ++r) {
          _mm512_storeu_si512(tile + r * kSide, high[r]);
          _mm512_storeu_si512(tile + 2 * kTile + r * kSide, low[r]);
        }
      }
    }
  }

  template <typename In>
  static __m512 load(const In* from, int count) {
    using Vec = at::vec::Vectorized<In>;
    if constexpr (std::is_same_v<In, float>) {
      return Vec::loadu(from, count);
    } else {
      return std::get<0>(at::vec::convert_to_float<In>(Vec::loadu(from, count)));
    }
  }

  // To the nearest bfloat16, in the upper halves of the words.
  static __m512i rounded(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  }

  // A 16 x 16 matrix of words.
  static void transpose(__m512i (&m)[kSide]) {
    __m512i t[kSide];
    for (int i = 0; i < kSide; i += 2) {
      t[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
      t[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
    }
    for (int i = 0; i < kSide; i += 4) {
      m[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
      m[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      m[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
      m[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      m[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      m[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
      m[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
      m[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }

  // Rows [begin, end) of panels: adds a depth of samples, and after the last one takes the mean
  // off.
  __attribute__((target("amx-tile,amx-bf16"))) void multiply(const uint32_t* left,
                                                             const uint32_t* right, int64_t blocks,
                                                             int64_t begin, int64_t end, bool fresh,
                                                             bool last, const float* sum, float* m2,
                                                             float least, char* lost) const {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    _tile_loadconfig(&shape);
    alignas(64) float c[kPanel * kPanel];
    constexpr int kRow = kPanel * sizeof(float), kStep = kSide * sizeof(uint32_t);
    for (int64_t r = begin; r < end; ++r) {
      for (int64_t at = 0; at < in_; at += kPanel) {
        if (fresh) {
          _tile_zero(0);
          _tile_zero(1);
          _tile_zero(2);
          _tile_zero(3);
        } else {
          fetch(c, m2, r * kPanel, at);
          _tile_loadd(0, c, kRow);
          _tile_loadd(1, c + kSide, kRow);
          _tile_loadd(2, c + kSide * kPanel, kRow);
          _tile_loadd(3, c + kSide * kPanel + kSide, kRow);
        }
        const uint32_t* a = left + r * kWords * blocks;
        const uint32_t* b = right + at / kPanel * kWords * blocks;
        for (int64_t k = 0; k < blocks; ++k, a += kWords, b += kWords) {
          _tile_loadd(6, b, kStep);  // high
          _tile_loadd(7, b + kTile, kStep);
          _tile_loadd(4, a + 2 * kTile, kStep);  // low
          _tile_loadd(5, a + 3 * kTile, kStep);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
          _tile_loadd(4, a, kStep);  // high
          _tile_loadd(5, a + kTile, kStep);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
          _tile_loadd(6, b + 2 * kTile, kStep);  // low
          _tile_loadd(7, b + 3 * kTile, kStep);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(1, 4, 7);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c, kRow);
        _tile_stored(1, c + kSide, kRow);
        _tile_stored(2, c + kSide * kPanel, kRow);
        _tile_stored(3, c + kSide * kPanel + kSide, kRow);
        leave(c, m2, r * kPanel, at, last, sum, least, lost);
      }
    }
    _tile_release();
  }

  // What earlier samples came to.
  void fetch(float* c, const float* m2, int64_t row, int64_t at) const {
    for (int64_t o = 0; o < std::min(kPanel, out_ - row); ++o) {
      for (int64_t half = 0; half < kPanel; half += kSide) {
        const __mmask16 mask = inside(at + half);
        _mm512_store_ps(c + o * kPanel + half,
                        _mm512_maskz_loadu_ps(mask, m2 + (row + o) * in_ + at + half));
      }
    }
  }

  void leave(const float* c, float* m2, int64_t row, int64_t at, bool last, const float* sum,
             float least, char* lost) const {
    const __m512 power = _mm512_set1_ps(static_cast<float>(-2 * (by_x_ + by_g_)));
    const __m512 inverse = _mm512_set1_ps(1.0f / static_cast<float>(samples_));
    for (int64_t o = 0; o < std::min(kPanel, out_ - row); ++o) {
      for (int64_t half = 0; half < kPanel; half += kSide) {
        const __mmask16 mask = inside(at + half);
        const int64_t place = (row + o) * in_ + at + half;
        __m512 value = _mm512_load_ps(c + o * kPanel + half);
        if (last) {
          const __m512 squares = _mm512_scalef_ps(value, power);
          const __m512 total = _mm512_maskz_loadu_ps(mask, sum + place);
          value = _mm512_sub_ps(squares, _mm512_mul_ps(total, _mm512_mul_ps(total, inverse)));
          const __m512 needed = _mm512_mul_ps(squares, _mm512_set1_ps(least));
          if (_mm512_mask_cmp_ps_mask(mask, value, needed, _CMP_LT_OQ)) lost[row + o] = 1;
          value = _mm512_max_ps(value, _mm512_setzero_ps());
        }
        _mm512_mask_storeu_ps(m2 + place, mask, value);
      }
    }
  }

  __mmask16 inside(int64_t column) const {
    const int64_t left = std::clamp<int64_t>(in_ - column, 0, kSide);
    return static_cast<__mmask16>((1u << left) - 1);
  }

  int64_t samples_, in_, out_;
  int by_x_, by_g_;
};

#endif

}  // namespace gradstats::cpu::linear
