// Argument checks; every message names the operation and the argument and says what was seen.
#pragma once

#include <ATen/ATen.h>

#define GRADSTATS_CHECK_DIM(op, tensor, rank, letters)                                      \
  TORCH_CHECK((tensor).dim() == (rank), op ": " #tensor " must be " letters ", got shape ", \
              (tensor).sizes())

#define GRADSTATS_CHECK_CPU(op, tensor) \
  TORCH_CHECK((tensor).is_cpu(), op ": " #tensor " must be on the CPU, got ", (tensor).device())

#define GRADSTATS_CHECK_DTYPE(op, tensor)                                                      \
  TORCH_CHECK((tensor).scalar_type() == at::kFloat || (tensor).scalar_type() == at::kDouble || \
                  (tensor).scalar_type() == at::kBFloat16,                                     \
              op ": " #tensor " must be float32, float64 or bfloat16, got ",                   \
              (tensor).scalar_type())

namespace gradstats {

// The dtype of statistics: float64 stays, the rest is float32.
inline at::ScalarType stats_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace gradstats
