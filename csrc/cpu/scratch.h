// Memory for intermediate numbers.
#pragma once

#include <cstdint>
#include <vector>

namespace gradstats::cpu {

// Room for `size` numbers in `scratch`, which grows as needed, from the start of a cache line on: a
// vector as wide as a line takes twice as long where it lies across two.
template <typename T>
T* at_line(std::vector<T>& scratch, int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (static_cast<int64_t>(scratch.size()) < size + kLine) scratch.resize(size + kLine);
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(scratch.data()) / sizeof(T));
  return scratch.data() + (kLine - past % kLine) % kLine;
}

}  // namespace gradstats::cpu
