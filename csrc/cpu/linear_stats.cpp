// Weight gradient of a linear layer with per-sample statistics; the path is chosen per call.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include "../checks.h"
#include "../ops.h"
#include "linear_bias.h"
#include "linear_fused.h"
#include "linear_gram.h"
#include "linear_library.h"
#include "linear_rank_one.h"

namespace gradstats::cpu {
namespace {

using namespace linear;

// Rows whose numbers follow each other, any strides between rows; else a copy.
Tensor with_dense_rows(const Tensor& t) {
  return t.size(2) <= 1 || t.stride(2) == 1 ? t : t.contiguous();
}

template <typename In>
Rows<In> rows_of(const Tensor& t) {
  return {t.const_data_ptr<In>(), t.stride(0), t.stride(1)};
}

enum class Path { kRankOne, kGram, kFused, kLibrary };

// Costs per sample in multiply-adds, beyond the gradient's own T * in * out, as measured: the pass
// over the library's product takes as long as 5 (with moments 10) for each element of the gradient,
// and calling the library as 25 thousand. Our own tiles take 3 (7) and a tenth more for the
// product; each number that they pack 11. Each pair of positions takes 1.1 times its products, and
// 7 vectors' worth for the sums over lanes.
template <typename In>
Path choose(int64_t positions, int64_t in, int64_t out, bool moments) {
  if (positions == 1) return Path::kRankOne;
  constexpr int64_t lanes = kCols<Acc<In>> / 2;
  const double elements = static_cast<double>(in) * out;
  const double rows = static_cast<double>(positions) * (in + out);
  const double pairs = 0.5 * positions * (positions + 1);
  const double gram = pairs * (1.1 * (in + out) + 7 * lanes);
  const double fused = elements * ((moments ? 7 : 3) + 0.1 * positions) + 11 * rows;
  const double library = elements * (moments ? 10 : 5) + 25e3;
  // Products of 16-bit numbers are rounded by the library; moments need each contribution itself.
  const bool rounds = !std::is_same_v<In, Acc<In>>;
  const double best = rounds ? fused : std::min(fused, library);
  if (!moments && gram < best) return Path::kGram;
  return best == fused ? Path::kFused : Path::kLibrary;
}

template <typename In>
void gram(const Problem<In>& p, Acc<In>* sq_norm) {
  for (int64_t b : gram_norms(p.x, p.g, p.samples, p.positions, p.in, p.out, sq_norm)) {
    Problem<In> one = p;
    one.samples = 1;
    one.x.data += b * p.x.sample_stride;
    one.g.data += b * p.g.sample_stride;
    one.dw = nullptr;
    Pass<In, false> pass(one);
    pass.run();
    pass.sq_norms(sq_norm + b);
  }
}

template <bool moments, typename In>
void fused(const Problem<In>& p, Acc<In>* sq_norm) {
  Pass<In, moments> pass(p);
  pass.run();
  pass.sq_norms(sq_norm);
}

// The gradient alone is the library's.
void gradient(const Tensor& x, const Tensor& g, Tensor& dw) {
  at::mm_out(dw, g.reshape({-1, g.size(2)}).t(), x.reshape({-1, x.size(2)}));
}

template <typename In>
LinearStats run(const Tensor& x, const Tensor& g, bool weight, bool bias, bool moments,
                std::optional<double>& dw_sq_norm) {
  using A = Acc<In>;
  const int64_t samples = g.size(0), positions = g.size(1), in = x.size(2), out = g.size(2);
  const auto wide = x.options().dtype(c10::CppTypeToScalarType<A>::value);
  const bool nothing = samples == 0 || positions == 0 || out == 0;
  // What a pass fills is left unset; what no pass runs for is zero.
  auto make = [&](bool wanted, at::IntArrayRef shape, bool zero, const at::TensorOptions& options) {
    if (!wanted) return at::empty({0}, options);
    return zero ? at::zeros(shape, options) : at::empty(shape, options);
  };
  const bool no_weight = nothing || in == 0;
  Tensor dw = make(weight, {out, in}, no_weight, x.options());
  Tensor w_sq = make(weight, {samples}, no_weight, wide);
  Tensor w_m2 = make(weight && moments, {out, in}, no_weight, wide);
  Tensor db = make(bias, {out}, nothing, x.options());
  Tensor b_sq = make(bias, {samples}, nothing, wide);
  Tensor b_m2 = make(bias && moments, {out}, nothing, wide);

  const bool with_weight = weight && !no_weight;
  bool with_bias = bias && !nothing;
  const Tensor dense_g = with_dense_rows(g), dense_x = with_weight ? with_dense_rows(x) : x;
  const Rows<In> g_rows = rows_of<In>(dense_g), x_rows = rows_of<In>(dense_x);
  const bool rank_one = positions == 1;
  RowSums rows;
  if (rank_one && !nothing) {
    const int64_t of_x = with_weight ? in : 0;
    rows = bias && moments ? row_sums<true>(x_rows, of_x, g_rows, out, samples, true)
                           : row_sums<false>(x_rows, of_x, g_rows, out, samples, bias);
  }
  if (with_weight) {
    const Problem<In> problem{
        x_rows, g_rows, samples,           positions,
        in,     out,    dw.data_ptr<In>(), moments ? w_m2.data_ptr<A>() : nullptr,
        in};
    A* sq_norm = w_sq.data_ptr<A>();
    switch (choose<In>(positions, in, out, moments)) {
      case Path::kRankOne: {
        for (int64_t b = 0; b < samples; ++b) {
          sq_norm[b] = static_cast<A>(rows.x[b] * rows.g[b]);
        }
        const Tensor xs = dense_x.squeeze(1), gs = dense_g.squeeze(1);
        if (moments) {
          dw_sq_norm = rank_one_moments(problem, xs, gs, rows, dw, w_m2);
        } else if constexpr (std::is_same_v<In, A>) {
          dw_sq_norm = squared_gradient<A>(xs, gs, dw);
        } else {
          gradient(dense_x, dense_g, dw);
        }
        break;
      }
      case Path::kGram:
        gram(problem, sq_norm);
        gradient(dense_x, dense_g, dw);
        break;
      case Path::kFused:
        moments ? fused<true>(problem, sq_norm) : fused<false>(problem, sq_norm);
        break;
      case Path::kLibrary:
        if constexpr (std::is_same_v<In, A>) {
          const Result<A> of_weight{dw.data_ptr<A>(), w_m2.data_ptr<A>(), sq_norm};
          const Result<A> of_bias{with_bias ? db.data_ptr<A>() : nullptr, b_m2.data_ptr<A>(),
                                  b_sq.data_ptr<A>()};
          moments ? Blocks<A, true>(dense_x, dense_g, of_weight, of_bias).run()
                  : Blocks<A, false>(dense_x, dense_g, of_weight, of_bias).run();
          with_bias = false;
        }
    }
  }
  if (with_bias) {
    In* const to = db.data_ptr<In>();
    A* const m2 = moments ? b_m2.data_ptr<A>() : nullptr;
    if (!rank_one || !rank_one_bias(rows, to, b_sq.data_ptr<A>(), m2)) {
      bias_stats(g_rows, samples, positions, out, to, b_sq.data_ptr<A>(), m2);
    }
  }
  return {dw, db, w_sq, b_sq, w_m2, b_m2};
}

}  // namespace

LinearStats linear_stats(const Tensor& x, const Tensor& g, bool weight, bool bias, bool moments,
                         std::optional<double>* dw_sq_norm) {
  GRADSTATS_CHECK_DIM("linear_stats", x, 3, "(B, T, I)");
  GRADSTATS_CHECK_DIM("linear_stats", g, 3, "(B, T, O)");
  GRADSTATS_CHECK_CPU("linear_stats", x);
  GRADSTATS_CHECK_CPU("linear_stats", g);
  GRADSTATS_CHECK_DTYPE("linear_stats", x);
  TORCH_CHECK(g.scalar_type() == x.scalar_type(), "linear_stats: g must have the dtype of x, ",
              x.scalar_type(), ", got ", g.scalar_type());
  TORCH_CHECK(g.size(0) == x.size(0) && g.size(1) == x.size(1),
              "linear_stats: g must have the (B, T) of x, which has shape ", x.sizes(),
              ", got shape ", g.sizes());
  std::optional<double> unwanted;
  std::optional<double>& norm = dw_sq_norm == nullptr ? unwanted : *dw_sq_norm;
  switch (x.scalar_type()) {
    case at::kFloat:
      return run<float>(x, g, weight, bias, moments, norm);
    case at::kDouble:
      return run<double>(x, g, weight, bias, moments, norm);
    default:
      return run<at::BFloat16>(x, g, weight, bias, moments, norm);
  }
}

}  // namespace gradstats::cpu
