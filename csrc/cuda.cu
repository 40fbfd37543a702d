// The GPU side: one kernel over a table of rows that lies on the device.
//
// The table is cut into tiles of kTile elements; `tile_row` tells each tile's row. A thread block takes one tile, a
// thread two Philox blocks of it: eight elements, whose loads are all under way before the first is used. A tile that
// is whole, and whose row allows it, is read and written four elements (16 or 8 bytes) at a time; the last tile of a
// row and rows of unaligned views go element by element. Storage types are data, not template parameters: a branch
// that a whole thread block takes alike costs nothing beside the memory, and mixed models stay one launch.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>

#include "cuda.h"
#include "element.h"

namespace rft {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // Philox blocks of a thread
constexpr int kTile = kThreads * kUnroll * kBlock;

// One element of a thread. See element.h for what is asked of lanes.
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
  static __device__ __forceinline__ F abs(F x) { return fabsf(x); }
  static __device__ __forceinline__ F mad(F x, F y, F z) { return fmaf(x, y, z); }
  static __device__ __forceinline__ F select(bool mask, F yes, F no) { return mask ? yes : no; }
  static __device__ __forceinline__ F select_sign(I sign, F yes, F no) { return sign < 0 ? yes : no; }
  static __device__ __forceinline__ F to_float(I x) { return __int2float_rn(x); }
  static __device__ __forceinline__ F sqrt(F x) { return __fsqrt_rn(x); }
  // One wide multiplication; __umulhi beside x * m would be two.
  static __device__ __forceinline__ void multiply(W x, uint32_t m, W& hi, W& lo) {
    const uint64_t product = (uint64_t)x * m;
    hi = (uint32_t)(product >> 32);
    lo = (uint32_t)product;
  }
};

struct DeviceRow {
  void* out;
  const void* zeroshot;
  const void* finetuned;
  int64_t size;
  uint64_t first_block;
  int64_t first_tile;
  int32_t out_dtype, zeroshot_dtype, finetuned_dtype;
  int32_t aligned;  // every four elements can be accessed at once
};

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

__device__ __forceinline__ void load4(float (&x)[kBlock], const void* from, int dtype, int64_t i) {
  if (dtype == kFloat32) {
    const float4 v = __ldca((const float4*)((const float*)from + i));
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    return;
  }
  const uint2 v = __ldca((const uint2*)((const uint16_t*)from + i));
  if (dtype == kBFloat16) {  // the upper half of a float32
    x[0] = __uint_as_float(v.x << 16), x[1] = __uint_as_float(v.x & 0xffff0000u);
    x[2] = __uint_as_float(v.y << 16), x[3] = __uint_as_float(v.y & 0xffff0000u);
  } else {
    const float2 low = __half22float2(*(const __half2*)&v.x), high = __half22float2(*(const __half2*)&v.y);
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
  }
}

__device__ __forceinline__ void store4(void* to, int dtype, int64_t i, const float (&x)[kBlock]) {
  if (dtype == kFloat32) {
    __stwb((float4*)((float*)to + i), make_float4(x[0], x[1], x[2], x[3]));
    return;
  }
  uint2 v;
  if (dtype == kBFloat16) {
    *(__nv_bfloat162*)&v.x = __floats2bfloat162_rn(x[0], x[1]);
    *(__nv_bfloat162*)&v.y = __floats2bfloat162_rn(x[2], x[3]);
  } else {
    *(__half2*)&v.x = __floats2half2_rn(x[0], x[1]);
    *(__half2*)&v.y = __floats2half2_rn(x[2], x[3]);
  }
  __stwb((uint2*)((uint16_t*)to + i), v);
}

// The four elements of one Philox block.
template <int NOISE, bool MASKED>
__device__ __forceinline__ void compute(float (&out)[kBlock], const float (&w0)[kBlock], const float (&w1)[kBlock],
                                        uint64_t block, const Element& e) {
  using L = Thread;
  const Keys<L> keys(e.key0, e.key1);
  const uint32_t low = (uint32_t)block, high = (uint32_t)(block >> 32);
  float eps[kBlock] = {};
  bool kept[kBlock] = {};
  if (NOISE != kNoNoise) {
    const Words<L> x = philox<L>(low, high, e.draw, kNoisePurpose, keys);
    noise_pair<L, NOISE>(x.x0, x.x1, eps[0], eps[1]);
    noise_pair<L, NOISE>(x.x2, x.x3, eps[2], eps[3]);
  }
  if (MASKED) {
    const Words<L> x = philox<L>(low, high, 0, kMaskPurpose, keys);
    kept[0] = x.x0 < e.threshold, kept[1] = x.x1 < e.threshold;
    kept[2] = x.x2 < e.threshold, kept[3] = x.x3 < e.threshold;
  }
#pragma unroll
  for (int j = 0; j < kBlock; ++j) {
    out[j] = element<L, NOISE != kNoNoise, MASKED>(e, w0[j], w1[j], eps[j], kept[j]);
  }
}

template <int NOISE, bool MASKED>
__global__ void __launch_bounds__(kThreads)
    write_rows(const DeviceRow* __restrict__ rows, const int32_t* __restrict__ tile_row, int64_t begin,
               bool use_zeroshot, bool use_finetuned, const __grid_constant__ Element e) {
  const int64_t tile = begin + blockIdx.x;
  const DeviceRow row = rows[tile_row[tile]];
  const int64_t start = (tile - row.first_tile) * kTile;
  // The first element of each of this thread's Philox blocks: consecutive threads, consecutive blocks.
  const int64_t first = start + threadIdx.x * kBlock;
  constexpr int64_t kStride = kThreads * kBlock;
  const uint64_t block = row.first_block + (uint64_t)(first / kBlock);

  if (row.aligned && start + kTile <= row.size) {
    float w0[kUnroll][kBlock] = {}, w1[kUnroll][kBlock] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (use_zeroshot) load4(w0[u], row.zeroshot, row.zeroshot_dtype, first + u * kStride);
      if (use_finetuned) load4(w1[u], row.finetuned, row.finetuned_dtype, first + u * kStride);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float out[kBlock];
      compute<NOISE, MASKED>(out, w0[u], w1[u], block + u * kThreads, e);
      store4(row.out, row.out_dtype, first + u * kStride, out);
    }
    return;
  }
#pragma unroll 1
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kStride;
    if (i >= row.size) return;
    float w0[kBlock] = {}, w1[kBlock] = {}, out[kBlock];
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      if (i + j < row.size && use_zeroshot) w0[j] = load(row.zeroshot, row.zeroshot_dtype, i + j);
      if (i + j < row.size && use_finetuned) w1[j] = load(row.finetuned, row.finetuned_dtype, i + j);
    }
    compute<NOISE, MASKED>(out, w0, w1, block + u * kThreads, e);
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      if (i + j < row.size) store(row.out, row.out_dtype, i + j, out[j]);
    }
  }
}

const void* pick_kernel(const Element& e) {
  switch (e.noise) {
    case kNormal: return e.masked ? (const void*)write_rows<kNormal, true> : (const void*)write_rows<kNormal, false>;
    case kUniform: return e.masked ? (const void*)write_rows<kUniform, true> : (const void*)write_rows<kUniform, false>;
    case kRademacher:
      return e.masked ? (const void*)write_rows<kRademacher, true> : (const void*)write_rows<kRademacher, false>;
    default: return e.masked ? (const void*)write_rows<kNoNoise, true> : (const void*)write_rows<kNoNoise, false>;
  }
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("write: CUDA failed while ") + what + ": " + cudaGetErrorString(status));
  }
}

// Makes a device current, and the caller's one again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (before_ != device) check(cudaSetDevice(device), "choosing the device");
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

int element_size(int dtype) { return dtype == kFloat32 ? 4 : 2; }

bool is_aligned(const void* p, int dtype) { return (uintptr_t)p % (kBlock * element_size(dtype)) == 0; }

template <class T>
T* upload(const std::vector<T>& values) {
  if (values.empty()) return nullptr;
  T* there = nullptr;
  check(cudaMalloc(&there, values.size() * sizeof(T)), "allocating the table");
  const cudaError_t status = cudaMemcpy(there, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice);
  if (status != cudaSuccess) cudaFree(there);
  check(status, "copying the table");
  return there;
}

}  // namespace

CudaTable::CudaTable(const std::vector<Row>& rows, int device) : device_(device) {
  const DeviceGuard guard(device);
  std::vector<DeviceRow> there;
  std::vector<int32_t> tile_row;
  first_tile_ = {0};
  for (const Row& row : rows) {
    const bool aligned = is_aligned(row.out, row.out_dtype) && is_aligned(row.zeroshot, row.zeroshot_dtype) &&
                         is_aligned(row.finetuned, row.finetuned_dtype);
    const int64_t tiles = (row.size + kTile - 1) / kTile;
    tile_row.insert(tile_row.end(), tiles, (int32_t)there.size());
    there.push_back({row.out, row.zeroshot, row.finetuned, row.size, row.first_block, first_tile_.back(), row.out_dtype,
                     row.zeroshot_dtype, row.finetuned_dtype, aligned});
    first_tile_.push_back(first_tile_.back() + tiles);
  }
  rows_ = upload(there);
  try {
    tile_row_ = upload(tile_row);
  } catch (...) {
    cudaFree(rows_);
    throw;
  }
}

CudaTable::~CudaTable() {
  try {
    const DeviceGuard guard(device_);
    cudaFree(rows_);  // waits for the kernels that still read it
    cudaFree(tile_row_);
  } catch (const std::exception&) {
    // The device is gone, and the memory with it.
  }
}

void CudaTable::write(const Runs& runs, const Element& given, void* stream) const {
  const DeviceGuard guard(device_);
  Element e = given;
  bool use_zeroshot = e.needs_zeroshot(), use_finetuned = e.needs_finetuned();
  const DeviceRow* rows = (const DeviceRow*)rows_;
  const int32_t* tile_row = tile_row_;
  for (const auto& run : runs) {
    int64_t begin = first_tile_[run.first];
    const int64_t tiles = first_tile_[run.second] - begin;
    if (tiles == 0) continue;
    void* arguments[] = {&rows, &tile_row, &begin, &use_zeroshot, &use_finetuned, &e};
    check(cudaLaunchKernel(pick_kernel(e), dim3((unsigned)tiles), dim3(kThreads), arguments, 0, (cudaStream_t)stream),
          "launching the kernel");
  }
}

std::string why_not_cuda(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, (const void*)write_rows<kNormal, true>);
    if (status == cudaSuccess) return "";
    cudaGetLastError();  // this question shall not fail the next call
    return cudaGetErrorString(status);
  } catch (const std::exception& error) {
    cudaGetLastError();
    return error.what();
  }
}

}  // namespace rft
