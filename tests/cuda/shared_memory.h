// A block's shared memory as TMA writes it and as wgmma reads it, from the documents alone: neither
// half knows of the other or of csrc/cuda/hopper/layout.cuh.
#pragma once

#include <cstdint>
#include <vector>

#include "check.h"

namespace emulation {

// A (B, T, columns) tensor of labels; nothing outside of it is ever read.
struct Tensor {
  int batch, len_t, columns;
  std::vector<float> values;

  Tensor(int b, int t, int c) : batch(b), len_t(t), columns(c), values(size_t(b) * t * c) {}
  float& at(int b, int t, int c) { return values[(size_t(b) * len_t + t) * columns + c]; }
  float read(int64_t b, int64_t t, int64_t c) const {  // out of bounds: TMA's zero fill
    const bool inside = b >= 0 && b < batch && t >= 0 && t < len_t && c >= 0 && c < columns;
    return inside ? values[(size_t(b) * len_t + t) * columns + c] : 0.0f;
  }
};

constexpr float kUnwritten = -1e30f;

// Elements of 16 bits, addressed in bytes; an element's value is kept as a float.
struct SharedMemory {
  std::vector<float> elements;
  explicit SharedMemory(size_t bytes) : elements(bytes / 2, kUnwritten) {}
  float& at(uint32_t address) {
    CHECK(address % 2 == 0 && address / 2 < elements.size(), "address %u", address);
    return elements[address / 2];
  }
};

// CUDA driver API, CU_TENSOR_MAP_SWIZZLE_128B: rows of 128 bytes, in each of which the 16-byte
// chunks are permuted by the row's number modulo 8; the pattern is aligned to 1024 bytes of shared
// memory.
inline void tma_load(SharedMemory& to, uint32_t address, const Tensor& from, int column, int t,
                     int sample, int box_rows, bool once = true) {
  CHECK(address % 128 == 0, "TMA writes to addresses aligned to 128 bytes");
  for (int row = 0; row < box_rows; ++row) {
    for (int c = 0; c < 64; ++c) {
      const uint32_t line = address + row * 128;
      const uint32_t chunk = (c / 8) ^ (line / 128 % 8);
      float& element = to.at(line + chunk * 16 + c % 8 * 2);
      CHECK(!once || element == kUnwritten, "two loads write the same place");
      element = from.read(sample, t + row, column + c);
    }
  }
}

// PTX ISA, wgmma: element (mn, k) of an MN-major operand of 16-bit elements with 128-byte swizzle,
// k < 16. Canonical layout ((T,8,m),(8,k)) : ((1,T,LBO),(8T,SBO)) with T = 8, then the swizzle
// <3,4,3> of the byte address: bits 4..6 xor bits 7..9.
inline float wgmma_read(SharedMemory& from, uint64_t descriptor, int mn, int k) {
  const uint32_t start = (descriptor & 0x3fff) << 4;
  const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = (descriptor >> 32 & 0x3fff) << 4;
  CHECK((descriptor >> 49 & 7) == 0, "base offset");
  CHECK(descriptor >> 62 == 1, "swizzle mode");
  CHECK(start % 1024 == 0, "with base offset 0 a pattern begins at the start address");
  const uint32_t plain =
      start + (mn % 8 + mn / 8 % 8 * 8) * 2 + mn / 64 * leading + k % 8 * 64 * 2 + k / 8 * stride;
  const uint32_t bits = plain >> 7 & 7;
  const float value = from.at(plain ^ (bits << 4));
  CHECK(value != kUnwritten, "wgmma reads what no load wrote");
  return value;
}

}  // namespace emulation
