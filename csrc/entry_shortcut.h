// What gradstats/interpose.py does around a module's own forward, where nothing about it is
// special.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <utility>

#include "open_pass.h"

namespace gradstats {

// Of the module at `path`: opens a pass where none is, and a frame.
class EntryShortcut {
 public:
  EntryShortcut(std::shared_ptr<Shortcuts> of, py::str path)
      : of_(std::move(of)), path_(std::move(path)) {}

  py::object operator()(const py::object& module, const py::object& original,
                        const py::object& input) const;

 private:
  bool is_known(const py::object& module) const;

  std::shared_ptr<Shortcuts> of_;
  py::str path_;
};

}  // namespace gradstats
