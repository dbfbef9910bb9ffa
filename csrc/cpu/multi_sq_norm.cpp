// Squared norm of every tensor of a list in one parallel pass.
#include "multi_sq_norm.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/ceil_div.h>

#include <algorithm>
#include <vector>

#include "../ops.h"
#include "sum_squares.h"

namespace gradstats::cpu {
namespace {

// Elements of one piece of work. Pieces are cut from every tensor alike, so that a few large and
// many small tensors load the threads evenly; they do not depend on the number of threads, so
// neither does the result.
constexpr int64_t kPiece = 1 << 15;

struct Piece {
  int64_t tensor, begin, count;
};

double piece_sum(const Tensor& t, int64_t begin, int64_t count) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return sum_squares(t.const_data_ptr<float>() + begin, count);
    case at::kDouble:
      return sum_squares(t.const_data_ptr<double>() + begin, count);
    case at::kBFloat16:
      return sum_squares(t.const_data_ptr<at::BFloat16>() + begin, count);
    default:
      return sum_squares(t.const_data_ptr<at::Half>() + begin, count);
  }
}

}  // namespace

std::vector<double> sq_norms(const std::vector<Tensor>& tensors) {
  const auto n = static_cast<int64_t>(tensors.size());
  std::vector<Tensor> dense(n);
  std::vector<Piece> pieces;
  std::vector<int64_t> firsts{0};  // of each tensor's pieces
  for (int64_t i = 0; i < n; ++i) {
    const Tensor& t = tensors[i];
    const auto kind = t.scalar_type();
    TORCH_CHECK(t.layout() == at::kStrided && t.is_cpu(), "multi_sq_norm: tensors[", i,
                "] must be a dense tensor on the CPU, got ", t.layout(), " on ", t.device());
    TORCH_CHECK(
        kind == at::kFloat || kind == at::kDouble || kind == at::kBFloat16 || kind == at::kHalf,
        "multi_sq_norm: tensors[", i, "] must be float32, float64, bfloat16 or float16, got ",
        kind);
    // The order of the elements does not matter: any layout without gaps is read as it lies.
    dense[i] = t.is_non_overlapping_and_dense() ? t : t.contiguous();
    for (int64_t begin = 0; begin < t.numel(); begin += kPiece) {
      pieces.push_back({i, begin, std::min(kPiece, t.numel() - begin)});
    }
    firsts.push_back(static_cast<int64_t>(pieces.size()));
  }

  const auto count = static_cast<int64_t>(pieces.size());
  std::vector<double> partial(count);
  int64_t elements = 0;
  for (const Piece& p : pieces) elements += p.count;
  // Lists of many tiny tensors: a thread is worth starting for about 2^15 elements.
  const int64_t shares = std::clamp<int64_t>(elements / kPiece, 1, at::get_num_threads());
  // From the last tensor to the first, each cut as torch's elementwise operations cut it: the
  // optimizer then finds the first ones in the caches of the threads that it gives them to.
  at::parallel_for(0, shares, 1, [&](int64_t from, int64_t to) {
    for (int64_t share = from; share < to; ++share) {
      for (int64_t i = n; i-- > 0;) {
        const int64_t first = firsts[i], parts = firsts[i + 1] - first;
        const int64_t at = parts < shares ? (share + i) % shares : share;
        for (int64_t k = first + parts * at / shares; k < first + parts * (at + 1) / shares; ++k) {
          partial[k] = piece_sum(dense[i], pieces[k].begin, pieces[k].count);
        }
      }
    }
  });

  std::vector<double> total(n, 0.0);
  for (int64_t k = 0; k < count; ++k) total[pieces[k].tensor] += partial[k];
  return total;
}

Tensor multi_sq_norm(const std::vector<Tensor>& tensors) {
  const std::vector<double> norms = sq_norms(tensors);
  const bool wide = !tensors.empty() && std::all_of(tensors.begin(), tensors.end(), [](auto& t) {
    return t.scalar_type() == at::kDouble;
  });
  const auto n = static_cast<int64_t>(norms.size());
  Tensor out = at::empty({n}, at::TensorOptions().dtype(wide ? at::kDouble : at::kFloat));
  if (wide) {
    std::copy(norms.begin(), norms.end(), out.mutable_data_ptr<double>());
  } else {
    std::transform(norms.begin(), norms.end(), out.mutable_data_ptr<float>(),
                   [](double norm) { return static_cast<float>(norm); });
  }
  return out;
}

}  // namespace gradstats::cpu
