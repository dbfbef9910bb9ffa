// Where TMA puts an operand in shared memory, and how a wgmma descriptor names it.
//
// Both operands of dW = sum_t g_t x_t^T are "MN-major": a row of shared memory is one position t
// (the K of the product) and runs along O or I (its M or N). One TMA load brings a box of
// kBoxColumns = 64 columns, 128 bytes a row, and swizzles it: 16-byte chunk c of row r lands at
// chunk c ^ (r % 8), a pattern of 8 rows, 1024 bytes (CUtensorMap, CU_TENSOR_MAP_SWIZZLE_128B).
//
// The descriptor, from the PTX ISA, "Asynchronous warpgroup level matrix multiply-accumulate":
// "Matrix Descriptor Format", "Strides" and "Canonical Layouts". For MN-major with 128-byte swizzle
// the layout before swizzling is ((T,8,m),(8,k)) : ((1,T,LBO),(8T,SBO)), T = 8 elements of 16 bits:
//   - 64 columns are contiguous, and so are 8 positions of 64 columns: one pattern of 1024 bytes;
//   - LBO, the leading dimension byte offset, leads from 64 columns to the next 64: a box's bytes;
//   - SBO, the stride dimension byte offset, leads from 8 positions to the next 8: 1024.
// A wgmma takes 16 positions, two patterns; the next 16 begin 2048 bytes on, at a pattern's
// beginning again, so that the descriptor's base offset stays 0.
#pragma once

#include "traits.cuh"

namespace gradstats::cuda::hopper {

constexpr uint32_t kRowBytes = kBoxColumns * kElement;
constexpr uint32_t kPatternBytes = 8 * kRowBytes;
constexpr uint32_t kStepBytes = kWgmmaK * kRowBytes;  // from one wgmma's positions to the next
static_assert(kRowBytes == 128 && kStepBytes % kPatternBytes == 0, "the 128-byte swizzle");

// The swizzle as a map of byte addresses: bits 4..6 are combined with bits 7..9.
GRADSTATS_HD constexpr uint32_t swizzle(uint32_t address) {
  return address ^ ((address >> 3) & 0x70u);
}

// A field of the descriptor holds an address or a distance in units of 16 bytes, 14 bits.
GRADSTATS_HD constexpr uint64_t field(uint32_t bytes) { return (bytes & 0x3ffffu) >> 4; }

// Everything of the descriptor but its address; kBoxBytes leads from box to box of a stage.
constexpr uint64_t kDescriptor = field(kBoxBytes) << 16        // LBO, bits 16..29
                                 | field(kPatternBytes) << 32  // SBO, bits 32..45
                                 | uint64_t{1} << 62;          // 128-byte swizzle, bits 62..63

// address: of a box in shared memory, a multiple of 1024; step: which kWgmmaK of its positions.
GRADSTATS_HD constexpr uint64_t descriptor(uint32_t address, int step) {
  return kDescriptor | field(address + step * kStepBytes);
}

// A stage holds the boxes of g, then those of x. Blocks of a cluster load rows of x for each other:
// block `rank` brings the positions rank * kBlockT / cluster ... of every box.
template <typename Traits>
struct Stage {
  GRADSTATS_HD static constexpr uint32_t g_box(int box) { return box * kBoxBytes; }
  GRADSTATS_HD static constexpr uint32_t x_box(int box) {
    return (Traits::kBoxesO + box) * kBoxBytes;
  }
  static constexpr int kShareT = kBlockT / Traits::kCluster;
  GRADSTATS_HD static constexpr uint32_t x_share(int box, int rank) {
    return x_box(box) + rank * kShareT * kRowBytes;
  }
};

// Where accumulator `index` of a thread is in its warpgroup's 64 x N tile (PTX ISA, "Register
// fragments", matrix D of wgmma.m64nNk16): pairs of columns, then 8 rows on, then 8 columns on.
GRADSTATS_HD constexpr int fragment_row(int thread, int index) {
  return thread / 32 * 16 + thread % 32 / 4 + index / 2 % 2 * 8;
}
GRADSTATS_HD constexpr int fragment_column(int thread, int index) {
  return index / 4 * 8 + thread % 4 * 2 + index % 2;
}

}  // namespace gradstats::cuda::hopper
