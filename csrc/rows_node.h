// The rows of a leaf for statistics (gradstats/probes.py), collected in one step of the backward.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/utils/pybind.h>

namespace gradstats {

// As `leaf.unbind(0)` of a (P, B + 1) leaf whose hook after accumulation is `deliver`, which is
// called with the leaf. A tuple.
pybind11::tuple rows_of_leaf(const at::Tensor& leaf, const pybind11::object& deliver);

}  // namespace gradstats
