// See cuda_runtime.h.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t x;
};
struct __half2 {
  uint16_t x, y;
};

inline float __half2float(__half half) {
  const int exponent = half.x >> 10 & 31, fraction = half.x & 1023;
  const float sign = half.x & 0x8000 ? -1 : 1;
  if (exponent == 31) return sign * (fraction ? NAN : INFINITY);
  return sign * (float)std::ldexp(fraction + (exponent ? 1024 : 0), (exponent ? exponent : 1) - 25);
}
// To nearest, ties to even; a NaN becomes CUDA's own.
inline __half __float2half_rn(float x) {
  if (x != x) return {0x7fff};
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::fabs((double)x);
  if (size >= 65520) return {(uint16_t)(sign | 0x7c00)};
  const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
  const int fraction = (int)std::nearbyint(std::ldexp(size, 10 - exponent));  // with the leading one; it may carry
  return {(uint16_t)(sign | (((exponent + 14) << 10) + fraction))};
}
inline float2 __half22float2(__half2 x) { return {__half2float({x.x}), __half2float({x.y})}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x).x, __float2half_rn(y).x}; }
