// Plain layers inside a forward pass, without Python; gradstats/shortcuts.py says when.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace gradstats {

void bind_shortcuts(pybind11::module_& m);

}  // namespace gradstats
