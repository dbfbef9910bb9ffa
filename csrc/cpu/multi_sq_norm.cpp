// Squared norm of every tensor of a list in one parallel pass.
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

Tensor multi_sq_norm(const std::vector<Tensor>& tensors) {
  const auto n = static_cast<int64_t>(tensors.size());
  std::vector<Tensor> dense(n);
  std::vector<Piece> pieces;
  bool wide = n > 0;
  for (int64_t i = 0; i < n; ++i) {
    const Tensor& t = tensors[i];
    const auto kind = t.scalar_type();
    TORCH_CHECK(t.layout() == at::kStrided && t.is_cpu(), "multi_sq_norm: tensors[", i,
                "] must be a dense tensor on the CPU, got ", t.layout(), " on ", t.device());
    TORCH_CHECK(
        kind == at::kFloat || kind == at::kDouble || kind == at::kBFloat16 || kind == at::kHalf,
        "multi_sq_norm: tensors[", i, "] must be float32, float64, bfloat16 or float16, got ",
        kind);
    wide = wide && kind == at::kDouble;
    // The order of the elements does not matter: any layout without gaps is read as it lies.
    dense[i] = t.is_non_overlapping_and_dense() ? t : t.contiguous();
    for (int64_t begin = 0; begin < t.numel(); begin += kPiece) {
      pieces.push_back({i, begin, std::min(kPiece, t.numel() - begin)});
    }
  }

  std::vector<double> partial(pieces.size());
  int64_t elements = 0;
  for (const Piece& p : pieces) elements += p.count;
  const auto count = static_cast<int64_t>(pieces.size());
  // Lists of many tiny tensors: a thread is worth starting for about 2^15 elements.
  const int64_t grain = std::max<int64_t>(1, count * kPiece / std::max<int64_t>(1, elements));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const Piece& p = pieces[k];
      partial[k] = piece_sum(dense[p.tensor], p.begin, p.count);
    }
  });

  std::vector<double> total(n, 0.0);
  for (int64_t k = 0; k < count; ++k) total[pieces[k].tensor] += partial[k];
  Tensor out = at::empty({n}, at::TensorOptions().dtype(wide ? at::kDouble : at::kFloat));
  for (int64_t i = 0; i < n; ++i) {
    if (wide) {
      out.data_ptr<double>()[i] = total[i];
    } else {
      out.data_ptr<float>()[i] = static_cast<float>(total[i]);
    }
  }
  return out;
}

}  // namespace gradstats::cpu
