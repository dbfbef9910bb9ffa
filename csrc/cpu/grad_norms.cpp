#include "grad_norms.h"

namespace gradstats::cpu {
namespace {

// Whether a tensor is all of its memory, and counts its changes.
bool is_whole(const at::Tensor& t) {
  return !t.is_inference() && t.has_storage() && t.storage_offset() == 0 &&
         t.is_non_overlapping_and_dense();
}

}  // namespace

void GradNorms::keep(size_t row, const at::Tensor& grad, double sq_norm) {
  if (!is_whole(grad)) return;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (known_.size() <= row) known_.resize(row + 1);
  known_[row].emplace(Known{grad.storage().getWeakStorageImpl(),
                            static_cast<uint32_t>(grad._version()), grad.numel(), sq_norm});
}

std::optional<double> GradNorms::of(size_t row, const at::Tensor& grad) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (row >= known_.size() || !known_[row].has_value() || !is_whole(grad)) return std::nullopt;
  const Known& known = *known_[row];
  const auto memory = known.memory.lock();
  const bool same = memory != nullptr && memory.get() == grad.storage().unsafeGetStorageImpl() &&
                    known.version == grad._version() && known.numel == grad.numel();
  return same ? std::optional<double>(known.sq_norm) : std::nullopt;
}

}  // namespace gradstats::cpu
