// The lanes of a GPU: one scalar per thread. element.h lists what lanes must provide.
#pragma once

#include <cstdint>

#include "element.h"

namespace rft {
namespace {

__device__ __forceinline__ float approximate_sqrt(float x) {
#ifdef __CUDA_ARCH__
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}

struct Thread {
  using F = float;
  using I = int32_t;
  using W = uint32_t;
  using M = bool;

  static RFT_FN F constant(float x) { return x; }
  static RFT_FN I constant_int(int32_t x) { return x; }
  static RFT_FN W word(uint32_t x) { return x; }
  static __device__ __forceinline__ F as_float(I x) { return __int_as_float(x); }
  static __device__ __forceinline__ I as_int(F x) { return __float_as_int(x); }
  static __device__ __forceinline__ I add(I x, int32_t y) { return (int32_t)((uint32_t)x + (uint32_t)y); }
  static __device__ __forceinline__ I shift_left(I x, int bits) { return (int32_t)((uint32_t)x << bits); }
  static __device__ __forceinline__ F abs(F x) { return fabsf(x); }
  static __device__ __forceinline__ F mad(F x, F y, F z) { return fmaf(x, y, z); }
  static __device__ __forceinline__ F select(bool mask, F yes, F no) { return mask ? yes : no; }
  static __device__ __forceinline__ F select_bit30(I bits, F yes, F no) { return bits & 0x40000000 ? yes : no; }
  static __device__ __forceinline__ F add_one_below_zero(F x, I sign) { return sign < 0 ? x + 1.0f : x; }
  static __device__ __forceinline__ F to_float(I x) { return __int2float_rn(x); }
  // Within 2^-23 of the true root, so that a normal is within 1.93e-6 in the worst case; the correctly rounded root
  // would give 1.57e-6 for three more instructions per element.
  static __device__ __forceinline__ F sqrt(F x) { return approximate_sqrt(x); }
  // One wide multiplication; __umulhi and x * m would be two.
  static __device__ __forceinline__ void multiply(W x, uint32_t m, W& hi, W& lo) {
    const uint64_t product = (uint64_t)x * m;
    hi = (uint32_t)(product >> 32);
    lo = (uint32_t)product;
  }
};

}  // namespace
}  // namespace rft
