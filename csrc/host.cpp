// The Python module gradstats._C: the operations of ops.h under the names of reference.py.
#include <ATen/ATen.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <memory>
#include <optional>

#include "cpu/linear_node.h"
#include "joint_row.h"
#include "open_pass.h"
#include "ops.h"
#include "shortcuts.h"

namespace py = pybind11;

#ifdef GRADSTATS_WITH_CUDA
namespace gradstats {
void bind_cuda(py::module_& m);  // csrc/cuda/bind.cpp
}
#endif

namespace {

#define GRADSTATS_STRING_(s) #s
#define GRADSTATS_STRING(s) GRADSTATS_STRING_(s)
constexpr const char* kCapability = GRADSTATS_STRING(CPU_CAPABILITY);

// Without this a wheel built for another machine dies of an illegal instruction later on.
void check_cpu() {
#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#if defined(CPU_CAPABILITY_AVX512)
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#elif defined(CPU_CAPABILITY_AVX2)
  const bool runs = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  const bool runs = true;
#endif
  if (!runs) {
    throw py::import_error(std::string("gradstats._C was compiled for ") + kCapability +
                           ", which this CPU lacks; build it here, or with "
                           "GRADSTATS_ARCH=x86-64-v3 (AVX2) or x86-64 (any)");
  }
#endif
}

using Guard = py::call_guard<py::gil_scoped_release, c10::NoGradGuard>;

// An operation as gradstats.ops has it. Its errors keep their Python type on their way through
// autograd.
template <typename Results, typename... Args>
auto of_python(const char* operation) {
  return [operation](Args... args) {
    const py::gil_scoped_acquire gil;
    try {
      const py::object call = py::module_::import("gradstats.ops").attr("call");
      return call.attr(operation)(args...).template cast<Results>();
    } catch (py::error_already_set& error) {
      error.restore();
      python_error kept;
      kept.persist();
      throw kept;
    }
  };
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& row_w,
                  const std::optional<at::Tensor>& m2_w, const std::optional<at::Tensor>& row_b,
                  const std::optional<at::Tensor>& m2_b, const py::object& joint_w,
                  const py::object& joint_b) {
  const auto row_of = [](const py::object& joint) {
    using gradstats::Link;
    return gradstats::row_of(
        joint.is_none() ? nullptr : std::make_shared<Link>(Link{gradstats::hold(joint)}));
  };
  gradstats::cpu::LinearDeliveries rows{row_of(joint_w), row_of(joint_b), {}};
  const py::gil_scoped_release released;
  return gradstats::cpu::linear({x, weight, bias, {row_w, m2_w}, {row_b, m2_b}}, std::move(rows));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace gradstats;
  check_cpu();
  m.doc() = "Compiled statistics operations; gradstats/reference.py defines them.";

  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["cpu_capability"] = kCapability;
#ifdef GRADSTATS_WITH_CUDA
  info["cuda"] = true;
  bind_cuda(m);
#else
  info["cuda"] = false;
#endif
  m.attr("build_info") = info;

  m.def(
      "linear_stats",
      [](const at::Tensor& x, const at::Tensor& g, bool weight, bool bias, bool moments) {
        return cpu::linear_stats(x, g, weight, bias, moments);
      },
      py::arg("x"), py::arg("g"), py::arg("weight"), py::arg("bias"), py::arg("moments"), Guard());
  m.def("linear", &linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("row_w"),
        py::arg("m2_w"), py::arg("row_b"), py::arg("m2_b"), py::arg("joint_w"), py::arg("joint_b"));
  using at::Tensor;
  using Scale = const std::optional<Tensor>&;
  cpu::route().linear =
      of_python<LinearStats, const Tensor&, const Tensor&, bool, bool, bool>("linear_stats");
  cpu::route().layer_norm = of_python<NormStats, const Tensor&, const Tensor&, Scale, const Tensor&,
                                      Scale, bool, bool, bool, bool>("layer_norm_stats");
  cpu::route().group_norm =
      of_python<NormStats, const Tensor&, const Tensor&, const Tensor&, const Tensor&, Scale, bool,
                bool, bool, bool>("group_norm_stats");
  cpu::route().conv =
      of_python<LinearStats, const Tensor&, const Tensor&, at::IntArrayRef, at::IntArrayRef,
                at::IntArrayRef, at::IntArrayRef, int64_t, bool, bool, bool>("conv_stats");
  bind_shortcuts(m);
  m.def("compute_here", [](bool yes) { cpu::route().here = yes; }, py::arg("yes"));
  m.def("layer_norm_stats", &cpu::layer_norm_stats, py::arg("g"), py::arg("x"), py::arg("mean"),
        py::arg("rstd"), py::arg("scale"), py::arg("input"), py::arg("weight"), py::arg("bias"),
        py::arg("moments"), Guard());
  m.def("group_norm_stats", &cpu::group_norm_stats, py::arg("g"), py::arg("x"), py::arg("mean"),
        py::arg("rstd"), py::arg("scale"), py::arg("input"), py::arg("weight"), py::arg("bias"),
        py::arg("moments"), Guard());
  m.def("embedding_stats", &cpu::embedding_stats, py::arg("ids"), py::arg("g"),
        py::arg("num_embeddings"), py::arg("padding_idx"), py::arg("moments"), Guard());
  m.def("conv_stats", &cpu::conv_stats, py::arg("x"), py::arg("g"), py::arg("kernel_size"),
        py::arg("stride"), py::arg("padding"), py::arg("dilation"), py::arg("groups"),
        py::arg("weight"), py::arg("bias"), py::arg("moments"), Guard());
  m.def("multi_sq_norm", &cpu::multi_sq_norm, py::arg("tensors"), Guard());
  m.def(
      "step_sums",
      [](const Tensor& rows, const std::vector<Tensor>& params, const std::vector<int64_t>& sizes,
         double square, double grad_square, const Shortcuts* shortcuts) {
        const auto* const known = shortcuts == nullptr ? nullptr : shortcuts->grad_norms().get();
        return cpu::step_sums(rows, params, sizes, square, grad_square, known);
      },
      py::arg("rows"), py::arg("params"), py::arg("sizes"), py::arg("square"),
      py::arg("grad_square"), py::arg("shortcuts") = nullptr, Guard());
}
