// What gradstats/interpose.py does when a plain nn.Linear runs inside a pass, or a module without
// parameters, for the case that nothing is special about it. Anything else is left to Python: a
// shortcut then returns None. Python is right and cold in the caches after every matrix product.
#include "shortcuts.h"

#include <ATen/ATen.h>
#include <ATen/FuncTorchTLS.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpu/linear_node.h"
#include "joint_row.h"

namespace py = pybind11;

namespace gradstats {
namespace {

// An entry of an object's own attributes, without a lookup in its classes; borrowed, or null.
PyObject* own(PyObject* object, PyObject* name) {
  PyObject** const dict = _PyObject_GetDictPtr(object);
  return dict == nullptr || *dict == nullptr ? nullptr : PyDict_GetItem(*dict, name);
}

PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

struct Names {
  PyObject *mark = interned("_gradstats"), *current = interned("current"),
           *suspended = interned("suspended"), *recorder = interned("recorder"),
           *groups = interned("groups"), *weight = interned("weight"), *bias = interned("bias");
};

const Names& names() {
  static const Names* const all = new Names;  // never destroyed: Python may be gone by then
  return *all;
}

// Whether somebody between the caller and the kernels wants to see operations.
bool watched() {
  return c10::impl::TorchDispatchModeTLS::stack_len() > 0 ||
         c10::impl::tls_is_dispatch_key_included(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         at::impl::PythonTorchFunctionTLS::stack_len() != 1 ||
         at::impl::PythonTorchFunctionTLS::get_disabled_state() !=
             at::impl::TorchFunctionDisabledState::ENABLED;
}

// One interposer's.
class Shortcuts {
 public:
  Shortcuts(py::object interposer, py::list observers, py::object use_of)
      : interposer_(interposer.ptr()), observers_(std::move(observers)), use_of_(use_of) {}

  // A pass begins that shortcuts may be taken in: its rows, its uses by name, the open frames.
  void begin(py::object pass, py::tuple rows, int64_t batch, py::dict uses, py::list stack) {
    pass_ = std::move(pass);
    rows_ = std::move(rows);
    uses_ = std::move(uses);
    stack_ = std::move(stack);
    batch_ = batch;
  }

  void end() {
    pass_ = py::none();
    rows_ = py::tuple();
    uses_ = py::dict();
    links_.clear();
  }

  // The joint of a parameter that a shortcut used: whether it did.
  bool link(size_t row, const py::object& joint) {
    const auto found = links_.find(row);
    if (found == links_.end()) return false;
    found->second->joint = hold(joint);
    return true;
  }

  // A leaf and its rows from an earlier pass whose graph is gone, or None. The leaves are alike but
  // for the number of samples.
  py::object take_leaf(int64_t entries) {
    for (const auto& [leaf, rows] : leaves_) {
      const at::Tensor& known = THPVariable_Unpack(leaf.ptr());
      if (known.size(1) != entries || known.grad().defined()) continue;
      const at::Tensor& row = THPVariable_Unpack(PyTuple_GET_ITEM(rows.ptr(), 0));
      // Every row holds its node; so does the edge here, and so does every graph that uses a row.
      const auto edge = torch::autograd::impl::gradient_edge(row);
      if (edge.function.use_count() == known.size(0) + 1) return py::make_tuple(leaf, rows);
    }
    return py::none();
  }

  void keep_leaf(py::object leaf, py::tuple rows) {
    if (PyTuple_GET_SIZE(rows.ptr()) == 0) return;
    if (leaves_.size() == kLeaves) leaves_.erase(leaves_.begin());
    leaves_.emplace_back(std::move(leaf), std::move(rows));
  }

  // Whether the pass that began runs, and nothing of what Python looks out for is about.
  bool open() const {
    if (pass_.is_none() || PyList_GET_SIZE(observers_.ptr()) != 0) return false;
    return own(interposer_, names().current) == pass_.ptr() &&
           own(interposer_, names().suspended) == Py_False &&
           own(interposer_, names().recorder) == Py_None &&
           own(pass_.ptr(), names().groups) == Py_None && c10::GradMode::is_enabled() &&
           !at::autocast::is_autocast_enabled(at::kCPU) && !watched();
  }

  // A plain tensor that a sample went into, or may have: one without a mark.
  static bool is_plain(PyObject* object) {
    return THPVariable_CheckExact(object) && own(object, names().mark) == nullptr;
  }

  int64_t batch() const { return batch_; }
  bool is_used(const py::str& name) const { return PyDict_Contains(uses_.ptr(), name.ptr()) != 0; }
  const at::Tensor& row(size_t i) const {
    return THPVariable_Unpack(PyTuple_GET_ITEM(rows_.ptr(), i));
  }
  std::shared_ptr<Link> use(size_t row, const py::str& name, const py::object& by) {
    uses_[name] = by;
    return links_[row] = std::make_shared<Link>();
  }
  // (UseOf(open frames, no part),): the frame of the layer itself is over by the time it matters.
  py::object uses_here() const {
    const auto frames = py::reinterpret_steal<py::object>(PyList_AsTuple(stack_.ptr()));
    return py::make_tuple(use_of_(frames, py::none()));
  }

 private:
  static constexpr size_t kLeaves = 4;  // forwards that are alive at a time, in most trainings

  PyObject* interposer_;  // which owns this
  py::list observers_;
  py::object use_of_, pass_ = py::none();
  py::tuple rows_;
  py::dict uses_;
  py::list stack_;
  int64_t batch_ = 0;
  std::unordered_map<size_t, std::shared_ptr<Link>> links_;
  std::vector<std::pair<py::object, py::tuple>> leaves_;
};

// The dtypes of linear_stats.
bool serves(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16;
}

// A parameter of a layer: where it sits, its mark, its row.
struct Place {
  py::str name;
  py::object mark;  // gradstats/probes.py
  std::optional<at::Tensor> m2;
  size_t row;

  // The parameter, if what sits there now is it and alone: trainable, in the place of its mark.
  const at::Tensor* in(PyObject* parameters, PyObject* key) const {
    PyObject* const object = PyDict_GetItem(parameters, key);
    if (object == nullptr || !THPVariable_CheckExact(object)) return nullptr;
    if (own(object, names().mark) != mark.ptr()) return nullptr;
    const at::Tensor& t = THPVariable_Unpack(object);
    const bool plain = t.requires_grad() && t.is_leaf() && t.is_cpu() && t.layout() == at::kStrided;
    return plain ? &t : nullptr;
  }
};

class LinearShortcut {
 public:
  LinearShortcut(std::shared_ptr<Shortcuts> of, py::dict parameters, Place weight,
                 std::optional<Place> bias)
      : of_(std::move(of)),
        parameters_(std::move(parameters)),
        weight_(std::move(weight)),
        bias_(std::move(bias)) {}

  py::object operator()(const py::object& input) const {
    Shortcuts& of = *of_;
    if (!of.open() || !Shortcuts::is_plain(input.ptr())) return py::none();
    const at::Tensor& x = THPVariable_Unpack(input.ptr());
    const at::Tensor* const weight = weight_.in(parameters_.ptr(), names().weight);
    if (weight == nullptr || x.dim() < 2 || x.size(0) != of.batch() || !x.is_cpu() ||
        x.layout() != at::kStrided || x.scalar_type() != weight->scalar_type() ||
        !serves(x.scalar_type()) || x.is_inference() || of.is_used(weight_.name)) {
      return py::none();
    }
    std::optional<at::Tensor> bias;
    if (bias_.has_value()) {
      const at::Tensor* const found = bias_->in(parameters_.ptr(), names().bias);
      if (found == nullptr || of.is_used(bias_->name)) return py::none();
      bias = *found;
    } else if (PyDict_GetItem(parameters_.ptr(), names().bias) != Py_None) {
      return py::none();
    }
    const py::object used = of.uses_here();
    cpu::Probe of_weight{of.row(weight_.row), weight_.m2}, of_bias;
    cpu::RowOf row_of_weight = row_of(of.use(weight_.row, weight_.name, used)), row_of_bias;
    if (bias_.has_value()) {
      of_bias = {of.row(bias_->row), bias_->m2};
      row_of_bias = row_of(of.use(bias_->row, bias_->name, used));
    }
    at::Tensor out;
    {
      const py::gil_scoped_release released;
      out = cpu::linear(x, *weight, bias, of_weight, of_bias, std::move(row_of_weight),
                        std::move(row_of_bias));
    }
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(out)));
  }

 private:
  std::shared_ptr<Shortcuts> of_;
  py::dict parameters_;
  Place weight_;
  std::optional<Place> bias_;
};

// A module without parameters that is one function: nothing in it is of interest to a mode.
class BareShortcut {
 public:
  explicit BareShortcut(std::shared_ptr<Shortcuts> of) : of_(std::move(of)) {}

  py::object operator()(const py::object& original, const py::object& input) const {
    if (!of_->open() || !Shortcuts::is_plain(input.ptr())) return py::none();
    struct Aside {  // the mode, for the time of the call
      std::shared_ptr<c10::SafePyObject> mode = at::impl::PythonTorchFunctionTLS::pop_stack();
      ~Aside() { at::impl::PythonTorchFunctionTLS::push_onto_stack(mode); }
    } aside;
    return original(input);
  }

 private:
  std::shared_ptr<Shortcuts> of_;
};

// Copies and pickles of an attached model come without.
py::tuple reduce_to_nothing(const py::object&) {
  return py::make_tuple(py::module_::import("gradstats.probes").attr("nothing"), py::tuple());
}

Place place(const py::str& name, const py::object& mark, size_t row) {
  const py::object m2 = mark.attr("m2");
  return {name, mark,
          m2.is_none() ? std::nullopt : std::optional<at::Tensor>(m2.cast<at::Tensor>()), row};
}

}  // namespace

void bind_shortcuts(py::module_& m) {
  py::class_<LinearShortcut>(m, "LinearShortcut")
      .def("__call__", &LinearShortcut::operator(), py::arg("x"))
      .def("__reduce__", &reduce_to_nothing);
  py::class_<BareShortcut>(m, "BareShortcut")
      .def("__call__", &BareShortcut::operator(), py::arg("original"), py::arg("x"))
      .def("__reduce__", &reduce_to_nothing);
  py::class_<Shortcuts, std::shared_ptr<Shortcuts>>(m, "Shortcuts")
      .def(py::init<py::object, py::list, py::object>(), py::arg("interposer"),
           py::arg("observers"), py::arg("use_of"))
      .def("begin", &Shortcuts::begin, py::arg("current"), py::arg("rows"), py::arg("batch"),
           py::arg("uses"), py::arg("stack"))
      .def("end", &Shortcuts::end)
      .def("link", &Shortcuts::link, py::arg("row"), py::arg("joint"))
      .def("take_leaf", &Shortcuts::take_leaf, py::arg("entries"))
      .def("keep_leaf", &Shortcuts::keep_leaf, py::arg("leaf"), py::arg("rows"))
      .def(
          "linear",
          [](const std::shared_ptr<Shortcuts>& of, py::dict parameters, const py::str& weight,
             const py::object& weight_mark, size_t weight_row, const py::object& bias,
             const py::object& bias_mark, size_t bias_row) {
            std::optional<Place> of_bias;
            if (!bias.is_none()) of_bias = place(py::str(bias), bias_mark, bias_row);
            return LinearShortcut(of, std::move(parameters), place(weight, weight_mark, weight_row),
                                  std::move(of_bias));
          },
          py::arg("parameters"), py::arg("weight"), py::arg("weight_mark"), py::arg("weight_row"),
          py::arg("bias"), py::arg("bias_mark"), py::arg("bias_row"))
      .def("bare", [](const std::shared_ptr<Shortcuts>& of) { return BareShortcut(of); });
}

}  // namespace gradstats
