// Squared norms of gradients that were had while a backward made them.
#pragma once

#include <ATen/ATen.h>

#include <mutex>
#include <optional>
#include <vector>

namespace gradstats::cpu {

// By the parameter's row. A norm is good for as long as the parameter's gradient is what the
// backward made, in its memory and unchanged; added to, scaled, replaced or let go of, it is not
// known any more. Several backwards may run at a time.
class GradNorms {
 public:
  void keep(size_t row, const at::Tensor& grad, double sq_norm);
  std::optional<double> of(size_t row, const at::Tensor& grad) const;

 private:
  struct Known {
    c10::weak_intrusive_ptr<c10::StorageImpl> memory;
    uint32_t version;
    int64_t numel;
    double sq_norm;
  };

  mutable std::mutex mutex_;
  std::vector<std::optional<Known>> known_;
};

}  // namespace gradstats::cpu
