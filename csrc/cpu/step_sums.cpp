// The totals of an ordinary step, in one call: as the many small tensor operations that they are in
// gradstats/record.py, they take longer than a small layer, for each is cold in the caches.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../ops.h"
#include "grad_norms.h"
#include "multi_sq_norm.h"

namespace gradstats::cpu {
namespace {

bool is_plain(const Tensor& t) {
  const auto kind = t.scalar_type();
  return t.is_cpu() && t.layout() == at::kStrided &&
         !t.unsafeGetTensorImpl()->is_python_dispatch() &&
         (kind == at::kFloat || kind == at::kDouble || kind == at::kBFloat16 || kind == at::kHalf);
}

}  // namespace

std::optional<StepSums> step_sums(const Tensor& rows, const std::vector<Tensor>& params,
                                  const std::vector<int64_t>& sizes, double square,
                                  double grad_square, const GradNorms* known) {
  const auto count = static_cast<int64_t>(params.size());
  const bool floating = rows.scalar_type() == at::kFloat || rows.scalar_type() == at::kDouble;
  if (!rows.is_cpu() || !floating || rows.dim() != 2 || rows.size(0) != count || count == 0 ||
      sizes.size() != params.size()) {
    return std::nullopt;
  }
  std::vector<double> norm(count);
  std::vector<Tensor> unread;
  std::vector<int64_t> places;  // of those
  for (int64_t p = 0; p < count; ++p) {
    const Tensor& grad = params[p].grad();
    if (!params[p].requires_grad() || params[p].numel() != sizes[p] || !grad.defined() ||
        !is_plain(grad)) {
      return std::nullopt;
    }
    const auto found = known == nullptr ? std::nullopt : known->of(p, grad);
    if (found.has_value()) {
      norm[p] = *found;
    } else {
      unread.push_back(grad);
      places.push_back(p);
    }
  }
  const std::vector<double> read = sq_norms(unread);
  for (size_t i = 0; i < places.size(); ++i) norm[places[i]] = read[i];
  const int64_t samples = rows.size(1) - 1;
  Tensor sq_norm = at::empty({count, samples}, rows.options());
  Tensor ok = at::empty({count}, rows.options().dtype(at::kBool));
  Tensor grad_sq = at::empty({count}, rows.options());
  Tensor total = at::empty({samples}, rows.options());
  Tensor mean = at::empty({}, rows.options()), grad_total = at::empty({}, rows.options());
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "step_sums", [&] {
    const auto* const in = rows.const_data_ptr<scalar_t>();
    const int64_t row = rows.stride(0), column = rows.stride(1);
    auto* const measured = ok.mutable_data_ptr<bool>();
    bool any = false;
    for (int64_t p = 0; p < count; ++p) {
      measured[p] = in[p * row + samples * column] == 1;
      any = any || measured[p];
    }
    auto* const scaled = sq_norm.mutable_data_ptr<scalar_t>();
    auto* const scaled_grads = grad_sq.mutable_data_ptr<scalar_t>();
    std::vector<double> each(samples, 0.0);
    double of_grads = 0, of_samples = 0;
    for (int64_t p = 0; p < count; ++p) {
      // Nothing measured: every total is NaN.
      const double weight = any ? double(measured[p]) : std::numeric_limits<double>::quiet_NaN();
      scaled_grads[p] = static_cast<scalar_t>(norm[p] * grad_square);
      of_grads += weight * scaled_grads[p];
      for (int64_t n = 0; n < samples; ++n) {
        const auto value = static_cast<scalar_t>(in[p * row + n * column] * square);
        scaled[p * samples + n] = value;
        each[n] += weight * value;
      }
    }
    auto* const totals = total.mutable_data_ptr<scalar_t>();
    for (int64_t n = 0; n < samples; ++n) {
      totals[n] = static_cast<scalar_t>(each[n]);
      of_samples += each[n];
    }
    if (samples > 0) of_samples /= static_cast<double>(samples);
    *mean.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(of_samples);
    *grad_total.mutable_data_ptr<scalar_t>() = static_cast<scalar_t>(of_grads);
  });
  return StepSums{sq_norm, ok, grad_sq, total, mean, grad_total};
}

}  // namespace gradstats::cpu
