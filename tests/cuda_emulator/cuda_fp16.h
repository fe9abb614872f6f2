// IEEE half precision for the emulator, converted as CUDA does: to the nearest, ties to even.
#pragma once
#include <cstdint>

struct __half {
  _Float16 value;
};

inline float __half2float(__half v) { return float(v.value); }
inline __half __float2half_rn(float v) { return {_Float16(v)}; }
