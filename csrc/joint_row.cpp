#include "joint_row.h"

#include <ATen/ATen.h>

namespace py = pybind11;

namespace gradstats {
namespace {

bool ending() {
#if PY_VERSION_HEX >= 0x030d0000
  return !Py_IsInitialized() || Py_IsFinalizing();
#else
  return !Py_IsInitialized() || _Py_IsFinalizing();
#endif
}

}  // namespace

Held hold(const py::object& object) {
  // While the interpreter ends, a thread that asks for the GIL is ended itself, which no destructor
  // survives: what is left then goes with the process.
  return Held(new py::object(object), [](py::object* held) {
    if (ending()) return;
    const py::gil_scoped_acquire gil;
    delete held;
  });
}

cpu::RowOf row_of(std::shared_ptr<const Link> link) {
  return [link = std::move(link)](intptr_t node, const at::Tensor& sq_norm, const at::Tensor& g,
                                  const at::Tensor& x) {
    if (link != nullptr && link->joint != nullptr) {
      const py::gil_scoped_acquire gil;
      const py::object& joint = *link->joint;
      if (joint.attr("uses").cast<int64_t>() > 1) {
        return x.defined() ? joint.attr("of_product")(node, sq_norm, g, x).cast<at::Tensor>()
                           : joint.attr("of_sum")(node, sq_norm, g).cast<at::Tensor>();
      }
    }
    return cpu::row_gradient(sq_norm);
  };
}

}  // namespace gradstats
