// A layer that a shortcut (shortcuts.cpp) may compute: its parameters, and whether it may.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <optional>
#include <utility>

#include "cpu/layer_node.h"
#include "open_pass.h"

namespace gradstats {

// The dtypes of the extension's statistics.
inline bool serves(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16;
}

inline Place place(const py::str& name, const py::object& mark, size_t row) {
  const py::object m2 = mark.attr("m2");
  return {name, mark,
          m2.is_none() ? std::nullopt : std::optional<at::Tensor>(m2.cast<at::Tensor>()), row};
}

// Numbers of a module; nothing where they are another kind of thing.
inline std::optional<int64_t> whole(PyObject* object) {
  if (object == nullptr || !PyLong_CheckExact(object)) return std::nullopt;
  int overflow = 0;
  const int64_t value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return overflow == 0 ? std::optional(value) : std::nullopt;
}

inline std::optional<double> real(PyObject* object) {
  if (object == nullptr || !PyFloat_Check(object)) return std::nullopt;
  return PyFloat_AS_DOUBLE(object);
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
  // A call of `module` with `input`, where a shortcut may be taken.
  std::optional<cpu::LayerCall> call(const py::object& module, const py::object& input) const {
    if (!of_->open() || !Shortcuts::is_plain(input.ptr())) return std::nullopt;
    PyObject* const parameters = own(module.ptr(), names().parameters);
    if (parameters == nullptr) return std::nullopt;
    const at::Tensor& x = THPVariable_Unpack(input.ptr());
    const at::Tensor* const weight = weight_.in(parameters, names().weight);
    if (weight == nullptr || x.dim() < 2 || x.size(0) != of_->batch() || !x.is_cpu() ||
        x.layout() != at::kStrided || x.scalar_type() != weight->scalar_type() ||
        !serves(x.scalar_type()) || x.is_inference() || of_->is_used(weight_.name)) {
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
    return cpu::LayerCall{x, *weight, std::move(bias), probe(weight_),
                          bias_.has_value() ? probe(*bias_) : cpu::Probe()};
  }

  // The parameters are used here.
  void note() const {
    const py::object used = of_->uses_here();
    of_->note(weight_.name, used);
    if (bias_.has_value()) of_->note(bias_->name, used);
  }

  std::shared_ptr<Shortcuts> of_;
  Place weight_;
  std::optional<Place> bias_;

 private:
  cpu::Probe probe(const Place& of) const { return {of_->row(of.row), of.m2}; }
};

// A Kind has
//   std::optional<…> options(PyObject* module, const cpu::LayerCall& call), what the module says
//     beside its tensors, where it serves, and
//   at::Tensor run(const cpu::LayerCall& call, options), which runs without the interpreter's lock.
template <typename Kind>
class LayerShortcut : public Layer {
 public:
  using Layer::Layer;

  py::object operator()(const py::object& module, const py::object&,
                        const py::object& input) const {
    const auto found = call(module, input);
    if (!found.has_value()) return not_taken();
    auto options = static_cast<const Kind*>(this)->options(module.ptr(), *found);
    if (!options.has_value()) return not_taken();
    note();
    at::Tensor out;
    {
      const py::gil_scoped_release released;
      out = Kind::run(*found, std::move(*options));
    }
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(out)));
  }
};

}  // namespace gradstats
