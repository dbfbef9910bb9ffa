// Transposed copies: positions by channels out of channels by positions, and the way back.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace gradstats::cpu::conv {

constexpr int64_t kSquare = 8;

// dst[p * ld + c] = src[c * stride + p], kSquare x kSquare. at::vec's transposition has this size
// for AVX2 only, and with AVX-512 goes through memory for whatever is not 16 x 16.
template <typename T>
void transpose_square(const T* src, int64_t stride, T* dst, int64_t ld) {
  for (int64_t p = 0; p < kSquare; ++p) {
    for (int64_t c = 0; c < kSquare; ++c) dst[p * ld + c] = src[c * stride + p];
  }
}

#if defined(__AVX__)
template <>
inline void transpose_square<float>(const float* src, int64_t stride, float* dst, int64_t ld) {
  __m256 a[8], b[8];
  // Rows c and c + 4 share a register, so that no halves have to cross later.
  for (int c = 0; c < 4; ++c) {
    for (int half = 0; half < 2; ++half) {
      const float* p = src + c * stride + 4 * half;
      a[2 * c + half] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)),
                                             _mm_loadu_ps(p + 4 * stride), 1);
    }
  }
  for (int half = 0; half < 2; ++half) {
    const __m256 low01 = _mm256_unpacklo_ps(a[half], a[2 + half]);
    const __m256 high01 = _mm256_unpackhi_ps(a[half], a[2 + half]);
    const __m256 low23 = _mm256_unpacklo_ps(a[4 + half], a[6 + half]);
    const __m256 high23 = _mm256_unpackhi_ps(a[4 + half], a[6 + half]);
    b[4 * half] = _mm256_shuffle_ps(low01, low23, 0x44);
    b[4 * half + 1] = _mm256_shuffle_ps(low01, low23, 0xee);
    b[4 * half + 2] = _mm256_shuffle_ps(high01, high23, 0x44);
    b[4 * half + 3] = _mm256_shuffle_ps(high01, high23, 0xee);
  }
  for (int p = 0; p < 8; ++p) _mm256_storeu_ps(dst + p * ld, b[p]);
}
#endif

// dst[p * ld + c] = src[c * channel_stride + p * position_stride]
template <typename T>
void pack(const T* src, int64_t channel_stride, int64_t position_stride, int64_t channels,
          int64_t positions, T* dst, int64_t ld) {
  if (position_stride == 1) {
    const int64_t whole_c = channels / kSquare * kSquare, whole_p = positions / kSquare * kSquare;
    for (int64_t p = 0; p < whole_p; p += kSquare) {
      for (int64_t c = 0; c < whole_c; c += kSquare) {
        transpose_square(src + c * channel_stride + p, channel_stride, dst + p * ld + c, ld);
      }
    }
    for (int64_t c = 0; c < channels; ++c) {
      const T* from = src + c * channel_stride;
      for (int64_t p = c < whole_c ? whole_p : 0; p < positions; ++p) dst[p * ld + c] = from[p];
    }
  } else if (channel_stride == 1) {
    for (int64_t p = 0; p < positions; ++p) {
      std::copy_n(src + p * position_stride, channels, dst + p * ld);
    }
  } else {
    for (int64_t p = 0; p < positions; ++p) {
      for (int64_t c = 0; c < channels; ++c) {
        dst[p * ld + c] = src[c * channel_stride + p * position_stride];
      }
    }
  }
}

}  // namespace gradstats::cpu::conv
