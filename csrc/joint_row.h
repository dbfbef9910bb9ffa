// What a linear layer's node delivers for a parameter: its row's gradient.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <memory>

#include "cpu/linear_node.h"

namespace gradstats {

// A Python object that a graph holds: let go of with the interpreter's lock, in any thread.
using Held = std::shared_ptr<pybind11::object>;
Held hold(const pybind11::object& object);

// Where a parameter's uses in one pass meet: a rules/joint.py Joint, once there are several.
struct Link {
  Held joint;
};

// The squared norms and the count of this delivery; with other uses, what the joint makes of them.
cpu::RowOf row_of(std::shared_ptr<const Link> link);

}  // namespace gradstats
