// The squared norms of a list of tensors as numbers, for what goes on with them on the host.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace gradstats::cpu {

std::vector<double> sq_norms(const std::vector<at::Tensor>& tensors);

}  // namespace gradstats::cpu
