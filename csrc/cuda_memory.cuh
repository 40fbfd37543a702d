// Weights of any storage type, read and written one, two, four or eight at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda_layout.cuh"

namespace rft {
namespace {

__device__ __forceinline__ float load(const void* from, int dtype, int64_t i) {
  if (dtype == kFloat32) return ((const float*)from)[i];
  if (dtype == kBFloat16) return __bfloat162float(((const __nv_bfloat16*)from)[i]);
  return __half2float(((const __half*)from)[i]);
}

__device__ __forceinline__ void store(void* to, int dtype, int64_t i, float x) {
  if (dtype == kFloat32) {
    ((float*)to)[i] = x;
  } else if (dtype == kBFloat16) {
    ((__nv_bfloat16*)to)[i] = __float2bfloat16_rn(x);
  } else {
    ((__half*)to)[i] = __float2half_rn(x);
  }
}

// Two 16-bit weights in one word.
__device__ __forceinline__ void unpack(float* x, uint32_t word, int dtype) {
  if (dtype == kBFloat16) {  // the upper half of a float32
    x[0] = __uint_as_float(word << 16), x[1] = __uint_as_float(word & 0xffff0000u);
  } else {
    const float2 pair = __half22float2(*(const __half2*)&word);
    x[0] = pair.x, x[1] = pair.y;
  }
}

__device__ __forceinline__ uint32_t pack(const float* x, int dtype) {
  uint32_t word;
  if (dtype == kBFloat16) {
    *(__nv_bfloat162*)&word = __floats2bfloat162_rn(x[0], x[1]);
  } else {
    *(__half2*)&word = __floats2half2_rn(x[0], x[1]);
  }
  return word;
}

__device__ __forceinline__ void load4(float* x, const void* from, int dtype, int64_t i) {
  if (dtype == kFloat32) {
    const float4 v = __ldca((const float4*)((const float*)from + i));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else {
    const uint2 v = __ldca((const uint2*)((const uint16_t*)from + i));
    unpack(x, v.x, dtype), unpack(x + 2, v.y, dtype);
  }
}

__device__ __forceinline__ void store4(void* to, int dtype, int64_t i, const float* x) {
  if (dtype == kFloat32) {
    __stwb((float4*)((float*)to + i), make_float4(x[0], x[1], x[2], x[3]));
  } else {
    __stwb((uint2*)((uint16_t*)to + i), make_uint2(pack(x, dtype), pack(x + 2, dtype)));
  }
}

// A thread's two blocks of a whole tile. Where all weights have 16 bits, the blocks are adjacent and one access;
// otherwise they are a stride apart, so that neighbouring threads access neighbouring 16 bytes of float32, too.
template <bool SIDE_BY_SIDE>
struct Place {
  static_assert(kUnroll == 2, "eight elements of 16 bits are 16 bytes");

  static __device__ __forceinline__ int block(int u) {
    return SIDE_BY_SIDE ? threadIdx.x * kUnroll + u : threadIdx.x + u * kThreads;
  }

  static __device__ __forceinline__ void read(float (&x)[kUnroll][kBlock], const void* tile, int dtype) {
    if (SIDE_BY_SIDE) {
      const uint4 v = __ldca((const uint4*)tile + threadIdx.x);
      unpack(x[0], v.x, dtype), unpack(x[0] + 2, v.y, dtype), unpack(x[1], v.z, dtype), unpack(x[1] + 2, v.w, dtype);
    } else {
      load4(x[0], tile, dtype, block(0) * kBlock), load4(x[1], tile, dtype, block(1) * kBlock);
    }
  }

  static __device__ __forceinline__ void write(const float (&x)[kUnroll][kBlock], void* tile, int dtype) {
    if (SIDE_BY_SIDE) {
      __stwb((uint4*)tile + threadIdx.x,
             make_uint4(pack(x[0], dtype), pack(x[0] + 2, dtype), pack(x[1], dtype), pack(x[1] + 2, dtype)));
    } else {
      store4(tile, dtype, block(0) * kBlock, x[0]), store4(tile, dtype, block(1) * kBlock, x[1]);
    }
  }
};

}  // namespace
}  // namespace rft
