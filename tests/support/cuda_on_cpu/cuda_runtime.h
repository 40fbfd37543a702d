// As much of CUDA as csrc/cuda*.cu* use, on the CPU: threads run one after the other, device memory is memory.
//
// So a C++ compiler alone can build the kernels, and tests can run them where there is no GPU. It is stricter than
// a GPU where it can be: wide accesses must be aligned, assumptions must hold, and the approximate root is as wrong
// as a GPU's may be.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#define __device__
#define __global__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace on_cpu {

inline void demand(bool claim, const char* what) {
  if (!claim) throw std::logic_error(std::string("cuda_on_cpu: not so: ") + what);
}

template <class T>
T& aligned(T* p) {
  demand((uintptr_t)p % sizeof(T) == 0, "a wide access is aligned");
  return *p;
}

}  // namespace on_cpu

#define __builtin_assume(claim) on_cpu::demand(claim, #claim)

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x) : x(x) {}
};

inline thread_local dim3 blockIdx{0}, threadIdx{0};

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class To, class From>
To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(x));
  return y;
}
inline float __int_as_float(int32_t x) { return same_bits<float>(x); }
inline float __uint_as_float(uint32_t x) { return same_bits<float>(x); }
inline int32_t __float_as_int(float x) { return same_bits<int32_t>(x); }
inline float __int2float_rn(int32_t x) { return (float)x; }

// PTX promises sqrt.approx a relative error of 2^-23 at most. Here it is that, up or down by the bits of x.
inline float rough_sqrt(float x) {
  const double error = __builtin_popcount(same_bits<uint32_t>(x)) % 2 ? 0x1p-23 : -0x1p-23;
  return (float)(std::sqrt((double)x) * (1 + error));
}
#define sqrtf rough_sqrt

template <class T>
T __ldca(const T* p) {
  return on_cpu::aligned(p);
}
template <class T>
void __stwb(T* p, T x) {
  on_cpu::aligned(p) = x;
}

// ---- the runtime

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorInvalidResourceHandle };
using cudaStream_t = void*;
struct cudaFuncAttributes {};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidResourceHandle ? "invalid resource handle" : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
// Device 0 is current. There is no cudaSetDevice, which creates contexts: devices are chosen by torch.
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
template <class T>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, T*) {
  return cudaSuccess;
}

template <class... Parameters, size_t... I>
void run_thread(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*(Parameters*)arguments[I]...);
}

template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t,
                             cudaStream_t stream) {
  if (stream == (cudaStream_t)-1) return cudaErrorInvalidResourceHandle;
  if (grid.x == 0 || grid.x > 0x7fffffffu || block.x == 0 || block.x > 1024) return cudaErrorInvalidConfiguration;
  for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) {
      run_thread(kernel, arguments, std::index_sequence_for<Parameters...>());
    }
  }
  return cudaSuccess;
}
