// The arguments of a convolution's statistics, checked and turned into its geometry.
#pragma once

#include <ATen/ATen.h>

#include "../checks.h"
#include "conv_plan.h"

namespace gradstats::cpu::conv {

using at::IntArrayRef;
using at::Tensor;

inline Dims dims_of(const char* name, IntArrayRef values, int64_t spatial, int64_t fill) {
  TORCH_CHECK(static_cast<int64_t>(values.size()) == spatial, "conv_stats: ", name, " must have ",
              spatial, " entries (one per spatial dimension of x), got ", values);
  Dims dims{fill, fill, fill};
  std::copy(values.begin(), values.end(), dims.end() - spatial);
  return dims;
}

inline Geometry check(const Tensor& x, const Tensor& g, IntArrayRef kernel_size, IntArrayRef stride,
                      IntArrayRef padding, IntArrayRef dilation, int64_t groups) {
  GRADSTATS_CHECK_CPU("conv_stats", x);
  GRADSTATS_CHECK_CPU("conv_stats", g);
  GRADSTATS_CHECK_DTYPE("conv_stats", x);
  const int64_t spatial = x.dim() - 2;
  TORCH_CHECK(spatial >= 1 && spatial <= 3,
              "conv_stats: x must be (B, I, *spatial) with 1 to 3 spatial dimensions, got ",
              x.sizes());
  TORCH_CHECK(g.dim() == x.dim() && g.size(0) == x.size(0),
              "conv_stats: g must be (B, O, *out) as ", "x is ", x.sizes(), ", got ", g.sizes());
  TORCH_CHECK(g.scalar_type() == x.scalar_type(), "conv_stats: g must have the dtype of x, ",
              x.scalar_type(), ", got ", g.scalar_type());
  Geometry geo{dims_of("spatial", x.sizes().slice(2), spatial, 1),
               dims_of("out", g.sizes().slice(2), spatial, 1),
               dims_of("kernel_size", kernel_size, spatial, 1),
               dims_of("stride", stride, spatial, 1),
               dims_of("padding", padding, spatial, 0),
               dims_of("dilation", dilation, spatial, 1),
               x.size(0),
               x.size(1),
               g.size(1),
               groups};
  TORCH_CHECK(groups >= 1 && geo.in_channels % groups == 0 && geo.out_channels % groups == 0,
              "conv_stats: groups must divide the channels of x ", x.sizes(), " and g ", g.sizes(),
              ", got ", groups);
  for (int d = 0; d < 3; ++d) {
    TORCH_CHECK(
        geo.kernel[d] >= 1 && geo.stride[d] >= 1 && geo.dilation[d] >= 1 && geo.padding[d] >= 0,
        "conv_stats: kernel_size, stride and dilation must be positive, padding not ",
        "negative, got ", kernel_size, ", ", stride, ", ", dilation, ", ", padding);
    const int64_t reach = geo.dilation[d] * (geo.kernel[d] - 1) + 1;
    const int64_t room = geo.in[d] + 2 * geo.padding[d] - reach;
    TORCH_CHECK(room >= 0 && geo.out[d] == room / geo.stride[d] + 1, "conv_stats: g has shape ",
                g.sizes(), ", which no convolution of x ", x.sizes(), " with kernel_size ",
                kernel_size, ", stride ", stride, ", padding ", padding, ", dilation ", dilation,
                " has");
  }
  return geo;
}

// Where a kernel is one wide, a stride leaves pixels out: they are left out of x at once.
inline void cut_stride(Geometry& geo, Tensor& x) {
  const int64_t spatial = x.dim() - 2;
  for (int d = 3 - static_cast<int>(spatial); d < 3; ++d) {
    if (geo.kernel[d] > 1 || geo.padding[d] > 0 || geo.stride[d] == 1) continue;
    x = x.slice(d + spatial - 1, 0, c10::nullopt, geo.stride[d]);
    x = x.slice(d + spatial - 1, 0, geo.out[d]);
    geo.in[d] = geo.out[d];
    geo.stride[d] = 1;
  }
}

}  // namespace gradstats::cpu::conv
