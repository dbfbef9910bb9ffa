#include "entry_shortcut.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/SafePyObject.h>
#include <torch/csrc/PyInterpreter.h>

namespace gradstats {
namespace {

// The module that runs, on the stack of open frames for as long as it does.
class Framed {
 public:
  Framed(py::list stack, const py::object& frame) : stack_(std::move(stack)) {
    stack_.append(frame);
  }
  ~Framed() {
    const Py_ssize_t open = PyList_GET_SIZE(stack_.ptr());
    PyList_SetSlice(stack_.ptr(), open - 1, open, nullptr);
  }
  Framed(const Framed&) = delete;
  Framed& operator=(const Framed&) = delete;

 private:
  py::list stack_;
};

// The interposer as the torch function mode on top.
class Mode {
 public:
  explicit Mode(PyObject* interposer) {
    Py_INCREF(interposer);
    at::impl::PythonTorchFunctionTLS::push_onto_stack(
        std::make_shared<c10::SafePyObject>(interposer, getPyInterpreter()));
  }
  ~Mode() { at::impl::PythonTorchFunctionTLS::pop_stack(); }
  Mode(const Mode&) = delete;
  Mode& operator=(const Mode&) = delete;
};

}  // namespace

// Whether an earlier forward showed that rules serve all in it, and its parameters are who they
// were.
bool EntryShortcut::is_known(const py::object& module) const {
  PyObject* const parameters = own(module.ptr(), names().parameters);
  if (parameters == nullptr || !of_->is_settled(path_) ||
      _PyType_Lookup(Py_TYPE(module.ptr()), names().fsdp_state) != nullptr) {
    return false;
  }
  PyObject *key = nullptr, *parameter = nullptr;
  Py_ssize_t at = 0;
  while (PyDict_Next(parameters, &at, &key, &parameter) != 0) {
    if (parameter != Py_None && own(parameter, names().mark) == nullptr) return false;
  }
  return true;
}

py::object EntryShortcut::operator()(const py::object& module, const py::object& original,
                                     const py::object& input) const {
  if (!is_known(module)) return not_taken();
  if (of_->open()) {
    const Framed framed(of_->stack(), of_->frame(path_));
    return original(input);
  }
  if (!of_->may_begin(input)) return not_taken();
  const int64_t batch = THPVariable_Unpack(input.ptr()).size(0);
  const py::object leaf = of_->take_leaf(batch + 1);
  if (leaf.is_none()) return not_taken();
  try {
    const Shortcuts::Begun begun(*of_, input, batch, leaf);
    const Mode mode(of_->interposer());
    const Framed framed(of_->stack(), of_->frame(path_));
    return original(input);
  } catch (py::error_already_set& error) {
    if (error.matches(of_->needs_layout()))
      return not_taken();  // Python looks for it, and runs it again
    throw;
  }
}

}  // namespace gradstats
