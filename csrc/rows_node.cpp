#include "rows_node.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "joint_row.h"

namespace py = pybind11;

namespace gradstats {
namespace {

using torch::autograd::variable_list;

// Stacks what the rows got and accumulates it, which are two nodes and a hook otherwise.
class RowsNode : public torch::autograd::Node {
 public:
  RowsNode(at::Tensor leaf, const py::object& deliver)
      : leaf_(std::move(leaf)), deliver_(hold(deliver)) {}

  std::string name() const override { return "gradstats::RowsNode"; }

  variable_list apply(variable_list&& grads) override {
    const at::NoGradGuard no_grad;
    bool any = false;
    for (const at::Tensor& g : grads) any = any || g.defined();
    if (!any) return {};
    at::Tensor& sum = leaf_.mutable_grad();
    const bool fresh = !sum.defined();
    if (fresh) sum = at::empty(leaf_.sizes(), leaf_.options().requires_grad(false));
    for (size_t i = 0; i < grads.size(); ++i) {
      const at::Tensor row = sum.select(0, static_cast<int64_t>(i));
      if (!grads[i].defined()) {
        if (fresh) row.zero_();
      } else if (fresh) {
        row.copy_(grads[i]);
      } else {
        row.add_(grads[i]);
      }
    }
    const py::gil_scoped_acquire gil;
    try {
      (*deliver_)(py::reinterpret_steal<py::object>(THPVariable_Wrap(leaf_)));
    } catch (py::error_already_set& error) {
      error.restore();
      python_error kept;  // of its type, on its way through autograd
      kept.persist();
      throw kept;
    }
    return {};
  }

 private:
  at::Tensor leaf_;
  Held deliver_;
};

// Nodes are held by shared_ptr in some versions of torch, by intrusive_ptr in later ones.
template <typename Pointer, typename... Args>
Pointer made(const Args&... args) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return std::make_shared<RowsNode>(args...);
  } else {
    return c10::make_intrusive<RowsNode>(args...);
  }
}

}  // namespace

py::tuple rows_of_leaf(const at::Tensor& leaf, const py::object& deliver) {
  const auto node = made<decltype(torch::autograd::Edge::function)>(leaf, deliver);
  py::tuple rows(leaf.size(0));
  for (int64_t i = 0; i < leaf.size(0); ++i) {
    at::Tensor row = leaf.detach().select(0, i);
    torch::autograd::set_history(row, node);
    rows[i] = py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(row)));
  }
  return rows;
}

}  // namespace gradstats
