// What gradstats/interpose.py does when a plain layer runs inside a pass, or a module without
// parameters, for the case that nothing is special about it. Anything else is left to Python: a
// shortcut then returns NotImplemented. Python is right and cold in the caches after every matrix
// product.
#include "shortcuts.h"

#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>

#include <memory>
#include <optional>
#include <utility>

#include "conv_shortcut.h"
#include "cpu/linear_node.h"
#include "entry_shortcut.h"
#include "joint_row.h"
#include "layer_shortcut.h"
#include "norm_shortcuts.h"
#include "open_pass.h"
#include "rows_node.h"

namespace gradstats {
namespace {

class LinearShortcut : public LayerShortcut<LinearShortcut> {
 public:
  using LayerShortcut::LayerShortcut;

  static constexpr auto run = &cpu::linear;

  std::optional<cpu::LinearDeliveries> options(PyObject*, const cpu::LayerCall&) const {
    return cpu::LinearDeliveries{row_of(of_->meeting(weight_.row)),
                                 bias_.has_value() ? row_of(of_->meeting(bias_->row)) : nullptr,
                                 {of_->grad_norms(), weight_.row}};
  }
};

// A module without parameters that is one function: nothing in it is of interest to a mode.
class BareShortcut {
 public:
  explicit BareShortcut(std::shared_ptr<Shortcuts> of) : of_(std::move(of)) {}

  py::object operator()(const py::object&, const py::object& original,
                        const py::object& input) const {
    if (!of_->open() || !Shortcuts::is_plain(input.ptr())) return not_taken();
    struct Aside {  // the mode, for the time of the call
      std::shared_ptr<c10::SafePyObject> mode = at::impl::PythonTorchFunctionTLS::pop_stack();
      ~Aside() { at::impl::PythonTorchFunctionTLS::push_onto_stack(mode); }
    } aside;
    return original(input);
  }

 private:
  std::shared_ptr<Shortcuts> of_;
};

template <typename Shortcut>
Shortcut made(const std::shared_ptr<Shortcuts>& of, const py::str& weight,
              const py::object& weight_mark, size_t weight_row, const py::object& bias,
              const py::object& bias_mark, size_t bias_row) {
  return {of, weight, weight_mark, weight_row, bias, bias_mark, bias_row};
}

// Copies and pickles of an attached model come without.
py::tuple reduce_to_nothing(const py::object&) {
  return py::make_tuple(py::module_::import("gradstats.probes").attr("nothing"), py::tuple());
}

// Called with a module, its own forward and its only input.
template <typename Shortcut>
void bind(py::module_& m, const char* name) {
  py::class_<Shortcut>(m, name)
      .def("__call__", &Shortcut::operator(), py::arg("module"), py::arg("original"), py::arg("x"))
      .def("__reduce__", &reduce_to_nothing);
}

}  // namespace

void bind_shortcuts(py::module_& m) {
  bind<LinearShortcut>(m, "LinearShortcut");
  bind<LayerNormShortcut>(m, "LayerNormShortcut");
  bind<GroupNormShortcut>(m, "GroupNormShortcut");
  bind<ConvShortcut>(m, "ConvShortcut");
  bind<BareShortcut>(m, "BareShortcut");
  bind<EntryShortcut>(m, "EntryShortcut");
  py::class_<Shortcuts, std::shared_ptr<Shortcuts>> shortcuts(m, "Shortcuts");
  shortcuts
      .def(py::init<const py::object&, py::list, py::tuple>(), py::arg("interposer"),
           py::arg("observers"), py::arg("kinds"))
      .def("begin", &Shortcuts::begin, py::arg("current"), py::arg("rows"), py::arg("batch"),
           py::arg("uses"), py::arg("stack"))
      .def("end", &Shortcuts::end)
      .def("link", &Shortcuts::link, py::arg("row"), py::arg("joint"))
      .def("take_leaf", &Shortcuts::take_leaf, py::arg("entries"))
      .def_static("rows_of_leaf", &rows_of_leaf, py::arg("leaf"), py::arg("deliver"))
      .def("keep_leaf", &Shortcuts::keep_leaf, py::arg("leaf"), py::arg("rows"))
      .def("entry", [](const std::shared_ptr<Shortcuts>& of,
                       py::str path) { return EntryShortcut(of, std::move(path)); })
      .def("bare", [](const std::shared_ptr<Shortcuts>& of) { return BareShortcut(of); });
  const auto layer = [&](const char* name, const auto& make) {
    shortcuts.def(name, make, py::arg("weight"), py::arg("weight_mark"), py::arg("weight_row"),
                  py::arg("bias"), py::arg("bias_mark"), py::arg("bias_row"));
  };
  layer("linear", &made<LinearShortcut>);
  layer("layer_norm", &made<LayerNormShortcut>);
  layer("group_norm", &made<GroupNormShortcut>);
  layer("conv", &made<ConvShortcut>);
}

}  // namespace gradstats
