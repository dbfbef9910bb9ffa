// The forward pass that runs, as far as shortcuts past its Python (shortcuts.cpp) know of it.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpu/grad_norms.h"
#include "joint_row.h"

namespace gradstats {

namespace py = pybind11;

// An entry of an object's own attributes, without a lookup in its classes; borrowed, or null.
inline PyObject* own(PyObject* object, PyObject* name) {
  PyObject** const dict = _PyObject_GetDictPtr(object);
  return dict == nullptr || *dict == nullptr ? nullptr : PyDict_GetItem(*dict, name);
}

inline PyObject* interned(const char* text) { return PyUnicode_InternFromString(text); }

struct Names {
  PyObject *mark = interned("_gradstats"), *current = interned("current"),
           *suspended = interned("suspended"), *recorder = interned("recorder"),
           *groups = interned("groups"), *weight = interned("weight"), *bias = interned("bias"),
           *normalized_shape = interned("normalized_shape"), *eps = interned("eps"),
           *num_groups = interned("num_groups"), *stride = interned("stride"),
           *padding = interned("padding"), *dilation = interned("dilation"),
           *padding_mode = interned("padding_mode"), *parameters = interned("_parameters"),
           *fsdp_state = interned("_get_fsdp_state"), *enabled = interned("enabled"),
           *counted = interned("counted"), *settled = interned("settled"),
           *fallbacks = interned("fallbacks"), *passes = interned("_passes"),
           *ledger = interned("ledger"), *between = interned("between"), *stack = interned("stack"),
           *batch = interned("batch"), *uses = interned("uses"), *inputs = interned("inputs"),
           *square = interned("square");
};

inline const Names& names() {
  static const Names* const all = new Names;  // never destroyed: Python may be gone by then
  return *all;
}

// What a shortcut says where Python has to look.
inline py::object not_taken() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

// A parameter of a layer: where it sits, its mark, its row.
struct Place {
  py::str name;
  py::object mark;  // gradstats/probes.py
  std::optional<at::Tensor> m2;
  size_t row;

  // The parameter, if what sits there now is it and alone: trainable, in the place of its mark.
  const at::Tensor* in(PyObject* parameters, PyObject* key) const;
};

// One interposer's.
class Shortcuts {
 public:
  // `kinds`: the classes UseOf, Frame, Pass and NeedsLayout.
  Shortcuts(const py::object& interposer, py::list observers, py::tuple kinds)
      : interposer_(interposer.ptr()),
        observers_(std::move(observers)),
        use_of_(kinds[0]),
        frame_(kinds[1]),
        pass_of_(kinds[2]),
        needs_layout_(kinds[3]) {}

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

  // Whether the forward of a model that runs with `input` alone may open a pass here.
  bool may_begin(const py::object& input) const;

  // A pass, for as long as the forward takes: what `Interposer._enter_first` does.
  class Begun {
   public:
    Begun(Shortcuts& of, const py::object& input, int64_t batch, const py::object& leaf);
    ~Begun();
    Begun(const Begun&) = delete;
    Begun& operator=(const Begun&) = delete;

   private:
    Shortcuts& of_;
    py::object pass_;
  };

  PyObject* interposer() const { return interposer_; }
  const py::object& needs_layout() const { return needs_layout_; }
  const py::list& stack() const { return stack_; }
  py::object frame(const py::str& path) const { return frame_(path); }
  // Whether a module has run before, and did not turn out to need the fallback.
  bool is_settled(const py::str& path) const;

  // The joint of a parameter that a shortcut used: whether it did.
  bool link(size_t row, const py::object& joint) {
    const auto found = links_.find(row);
    if (found == links_.end()) return false;
    found->second->joint = hold(joint);
    return true;
  }

  // A leaf and its rows from an earlier pass whose graph is gone, or None. The leaves are alike but
  // for the number of samples.
  py::object take_leaf(int64_t entries) const;
  void keep_leaf(py::object leaf, py::tuple rows);

  // Of the gradients that the layers' backwards make.
  const std::shared_ptr<cpu::GradNorms>& grad_norms() const { return grad_norms_; }

  // Whether the pass that began runs, and nothing of what Python looks out for is about.
  bool open() const;

  // A plain tensor that a sample went into, or may have: one without a mark.
  static bool is_plain(PyObject* object) {
    return THPVariable_CheckExact(object) && own(object, names().mark) == nullptr;
  }

  int64_t batch() const { return batch_; }
  bool is_used(const py::str& name) const { return PyDict_Contains(uses_.ptr(), name.ptr()) != 0; }
  const at::Tensor& row(size_t i) const {
    return THPVariable_Unpack(PyTuple_GET_ITEM(rows_.ptr(), i));
  }
  // Where the uses of a parameter that a shortcut uses meet, should there be others.
  std::shared_ptr<Link> meeting(size_t row) { return links_[row] = std::make_shared<Link>(); }
  void note(const py::str& name, const py::object& by) { uses_[name] = by; }
  // (UseOf(open frames, no part),): the frame of the layer itself is over by the time it matters.
  py::object uses_here() const {
    const auto frames = py::reinterpret_steal<py::object>(PyList_AsTuple(stack_.ptr()));
    return py::make_tuple(use_of_(frames, py::none()));
  }

 private:
  // Whether somebody between the caller and the kernels wants to see operations, but for `modes`
  // torch function modes.
  static bool watched(int64_t modes);

  static constexpr size_t kLeaves = 4;  // forwards that are alive at a time, in most trainings

  PyObject* interposer_;  // which owns this
  py::list observers_;
  py::object use_of_, frame_, pass_of_, needs_layout_, pass_ = py::none();
  py::tuple rows_;
  py::dict uses_;
  py::list stack_;
  int64_t batch_ = 0;
  std::unordered_map<size_t, std::shared_ptr<Link>> links_;
  std::vector<std::pair<py::object, py::tuple>> leaves_;
  const std::shared_ptr<cpu::GradNorms> grad_norms_ = std::make_shared<cpu::GradNorms>();
};

}  // namespace gradstats
