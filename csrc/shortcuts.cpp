// What gradstats/interpose.py does when a plain nn.Linear or nn.LayerNorm runs inside a pass, or a
// module without parameters, for the case that nothing is special about it. Anything else is left
// to Python: a shortcut then returns NotImplemented. Python is right and cold in the caches after
// every matrix product.
#include "shortcuts.h"

#include <ATen/ATen.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/layer_norm_node.h"
#include "cpu/linear_node.h"
#include "entry_shortcut.h"
#include "joint_row.h"
#include "open_pass.h"
#include "rows_node.h"

namespace gradstats {
namespace {

// The dtypes of linear_stats and layer_norm_stats.
bool serves(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16;
}

Place place(const py::str& name, const py::object& mark, size_t row) {
  const py::object m2 = mark.attr("m2");
  return {name, mark,
          m2.is_none() ? std::nullopt : std::optional<at::Tensor>(m2.cast<at::Tensor>()), row};
}

// A layer with a weight and perhaps a bias, each given as its name, mark and row.
class Layer {
 public:
  Layer(std::shared_ptr<Shortcuts> of, const py::str& weight, const py::object& weight_mark,
        size_t weight_row, const py::object& bias, const py::object& bias_mark, size_t bias_row)
      : of_(std::move(of)), weight_(place(weight, weight_mark, weight_row)) {
    if (!bias.is_none()) bias_ = place(py::str(bias), bias_mark, bias_row);
  }

 protected:
  struct Call {
    const at::Tensor &x, &weight;
    std::optional<at::Tensor> bias;
  };

  // The tensors of a call of `module` with `input`, where a shortcut may be taken.
  std::optional<Call> call(const py::object& module, const py::object& input) const {
    if (!of_->open() || !Shortcuts::is_plain(input.ptr())) return std::nullopt;
    PyObject* const parameters = own(module.ptr(), names().parameters);
    if (parameters == nullptr) return std::nullopt;
    const at::Tensor& x = THPVariable_Unpack(input.ptr());
    const at::Tensor* const weight = weight_->in(parameters, names().weight);
    if (weight == nullptr || x.dim() < 2 || x.size(0) != of_->batch() || !x.is_cpu() ||
        x.layout() != at::kStrided || x.scalar_type() != weight->scalar_type() ||
        !serves(x.scalar_type()) || x.is_inference() || of_->is_used(weight_->name)) {
      return std::nullopt;
    }
    std::optional<at::Tensor> bias;
    if (bias_.has_value()) {
      const at::Tensor* const found = bias_->in(parameters, names().bias);
      if (found == nullptr || of_->is_used(bias_->name)) return std::nullopt;
      bias = *found;
    } else if (PyDict_GetItem(parameters, names().bias) != Py_None) {
      return std::nullopt;
    }
    return Call{x, *weight, std::move(bias)};
  }

  cpu::Probe probe(const std::optional<Place>& of) const {
    return of.has_value() ? cpu::Probe{of_->row(of->row), of->m2} : cpu::Probe();
  }

  static py::object wrap(at::Tensor out) {
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(out)));
  }

  std::shared_ptr<Shortcuts> of_;
  std::optional<Place> weight_, bias_;
};

class LinearShortcut : Layer {
 public:
  using Layer::Layer;

  py::object operator()(const py::object& module, const py::object&,
                        const py::object& input) const {
    const auto found = call(module, input);
    if (!found.has_value()) return not_taken();
    const py::object used = of_->uses_here();
    const auto row_of_use = [&](const std::optional<Place>& of) {
      return of.has_value() ? row_of(of_->use(of->row, of->name, used)) : cpu::RowOf();
    };
    const cpu::Probe of_weight = probe(weight_), of_bias = probe(bias_);
    cpu::RowOf row_of_weight = row_of_use(weight_), row_of_bias = row_of_use(bias_);
    at::Tensor out;
    {
      const py::gil_scoped_release released;
      out = cpu::linear(found->x, found->weight, found->bias, of_weight, of_bias,
                        std::move(row_of_weight), std::move(row_of_bias),
                        {of_->grad_norms(), weight_->row});
    }
    return wrap(std::move(out));
  }
};

class LayerNormShortcut : Layer {
 public:
  using Layer::Layer;

  py::object operator()(const py::object& module, const py::object&,
                        const py::object& input) const {
    const auto found = call(module, input);
    if (!found.has_value()) return not_taken();
    PyObject* const shape = own(module.ptr(), names().normalized_shape);
    PyObject* const eps = own(module.ptr(), names().eps);
    const at::IntArrayRef sizes = found->weight.sizes();
    const auto last = static_cast<int64_t>(sizes.size());
    if (!same(shape, sizes) || eps == nullptr || !PyFloat_Check(eps) || found->x.dim() <= last ||
        found->x.sizes().slice(found->x.dim() - last) != sizes) {
      return not_taken();
    }
    const py::object used = of_->uses_here();
    of_->note(weight_->name, used);
    if (bias_.has_value()) of_->note(bias_->name, used);
    const cpu::Probe of_weight = probe(weight_), of_bias = probe(bias_);
    at::Tensor out;
    {
      const double added = PyFloat_AS_DOUBLE(eps);
      const py::gil_scoped_release released;
      out = cpu::layer_norm(found->x, sizes, found->weight, found->bias, added, of_weight, of_bias);
    }
    return wrap(std::move(out));
  }

 private:
  // Whether a module's `normalized_shape` is that of its weight.
  static bool same(PyObject* shape, at::IntArrayRef sizes) {
    if (shape == nullptr || !PyTuple_Check(shape) ||
        PyTuple_GET_SIZE(shape) != static_cast<Py_ssize_t>(sizes.size())) {
      return false;
    }
    for (size_t i = 0; i < sizes.size(); ++i) {
      PyObject* const size = PyTuple_GET_ITEM(shape, i);
      if (!PyLong_Check(size) || PyLong_AsLongLong(size) != sizes[i]) return false;
    }
    return true;
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
  bind<BareShortcut>(m, "BareShortcut");
  bind<EntryShortcut>(m, "EntryShortcut");
  py::class_<Shortcuts, std::shared_ptr<Shortcuts>>(m, "Shortcuts")
      .def(py::init<const py::object&, py::list, py::tuple>(), py::arg("interposer"),
           py::arg("observers"), py::arg("kinds"))
      .def("begin", &Shortcuts::begin, py::arg("current"), py::arg("rows"), py::arg("batch"),
           py::arg("uses"), py::arg("stack"))
      .def("end", &Shortcuts::end)
      .def("link", &Shortcuts::link, py::arg("row"), py::arg("joint"))
      .def("take_leaf", &Shortcuts::take_leaf, py::arg("entries"))
      .def_static("rows_of_leaf", &rows_of_leaf, py::arg("leaf"), py::arg("deliver"))
      .def("keep_leaf", &Shortcuts::keep_leaf, py::arg("leaf"), py::arg("rows"))
      .def("linear", &made<LinearShortcut>, py::arg("weight"), py::arg("weight_mark"),
           py::arg("weight_row"), py::arg("bias"), py::arg("bias_mark"), py::arg("bias_row"))
      .def("layer_norm", &made<LayerNormShortcut>, py::arg("weight"), py::arg("weight_mark"),
           py::arg("weight_row"), py::arg("bias"), py::arg("bias_mark"), py::arg("bias_row"))
      .def("entry", [](const std::shared_ptr<Shortcuts>& of,
                       py::str path) { return EntryShortcut(of, std::move(path)); })
      .def("bare", [](const std::shared_ptr<Shortcuts>& of) { return BareShortcut(of); });
}

}  // namespace gradstats
