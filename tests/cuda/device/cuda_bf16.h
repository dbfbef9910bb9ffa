// In place of CUDA's: types that are named but not computed with, for the emulation stores fp32.
#pragma once

struct __nv_bfloat16 {};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16) { return 0.0f; }
inline __nv_bfloat162 __floats2bfloat162_rn(float, float) { return {}; }
