// The GPU side: one kernel over a table of rows that lies on the device.
//
// The table is cut into tiles of kTile elements; `tile_row` holds each tile's row. A thread block writes one tile, a
// thread two Philox blocks of it: eight elements, whose loads are all issued before the first is used. A whole tile is
// read and written 16 bytes at a time if its row allows it; the last tile of a row, and rows of unaligned views, go
// element by element.
//
// With noise, 16-bit weights are bound by instructions rather than memory, so the inner loop decides nothing that is
// known before it. What a launch knows (noise, mask, the usual forms of the formula) selects the kernel. What a row
// knows (its storage types) is one branch that all threads of a block take alike, so that mixed models stay one launch.
//
// What few launches need has kernels of its own: numbers that differ from row to row, and noise in another order than
// that of memory. They lie in arrays beside the rows, so that the usual kernels stay as they are.
//
// One file, because the layout of the table is shared by the kernels that read it and the host code that fills it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "cuda.h"
#include "element.h"

namespace rft {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // Philox blocks of a thread
constexpr int kTile = kThreads * kUnroll * kBlock;

__device__ __forceinline__ float approximate_sqrt(float x) {
#ifdef __CUDA_ARCH__
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}

// One element of a thread; element.h lists what lanes must provide.
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

// How the whole tiles of a row are read and written.
enum Access : int32_t {
  kSingly,      // element by element: not every four elements can be accessed at once
  kByFour,      // four elements at a time: storage types differ, or 16-bit weights are aligned to 8 bytes only
  kAllFloat32,  // 16 bytes at a time: the usual rows, of one storage type
  kAllBFloat16,
  kAllFloat16,
};

// Aligned, so that it is read 16 bytes at a time.
struct alignas(16) DeviceRow {
  void* out;
  const void* zeroshot;
  const void* finetuned;
  int64_t size;
  uint64_t first_block;
  int64_t first_tile;
  int32_t out_dtype, zeroshot_dtype, finetuned_dtype;
  Access access;
};

// The numbers of one row, where they differ from row to row.
struct alignas(16) RowNumbers {
  float k, scale;
  uint32_t threshold;
  int32_t flags;  // Flag
};

enum Flag : int32_t { kBase = 1, kNoisy = 2, kMasked = 4 };

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

// The arguments of one launch.
struct Request {
  Element e;
  Keys<Thread> keys;
  const RowNumbers* numbers;  // null: the same for all rows
  const Positions* places;    // null: all rows have their noise in the order of memory
};

// The usual writes have kernels of their own, with constants for what they share: the noise is normal, adaptive and on
// the fine-tuned end, and masked weights become 0. They differ in their position on the path.
enum Form : int {
  kGeneral,
  kNearZeroshot,   // lerp's base 0
  kNearFinetuned,  // base 1
  kFinetuned,      // alpha = 1: the zero-shot end is not read
  kByRow,          // as kGeneral, with numbers or places of each row
};

Form form_of(const Element& e) {
  const bool usual_noise = e.noise == kNoNoise || (e.noise == kNormal && e.factor == kMagnitude && !e.interpolated);
  const bool usual_mask = !e.masked || !e.fill_zeroshot;
  if (!usual_noise || !usual_mask) return kGeneral;
  if (e.k != 0.0f) return e.base ? kNearFinetuned : kNearZeroshot;
  return e.base ? kFinetuned : kGeneral;
}

template <int FORM>
__device__ __forceinline__ Element known(Element e) {
  if (FORM == kGeneral || FORM == kByRow) return e;
  e.factor = kMagnitude, e.interpolated = false, e.fill_zeroshot = false;
  e.base = FORM != kNearZeroshot;
  if (FORM == kFinetuned) {
    e.k = 0.0f;
  } else {
    __builtin_assume(e.k != 0.0f);
  }
  return e;
}

// One element, given its noise. A row that has none of its own keeps its bits, -0 and infinity included.
template <int NOISE, bool MASKED, int FORM>
__device__ __forceinline__ float one(const Element& e, float w0, float w1, float eps, bool kept) {
  if (FORM == kByRow) {
    kept = kept || !e.masked;
    if (e.noise == kNoNoise) return element<Thread, false, MASKED>(e, w0, w1, eps, kept);
  }
  return element<Thread, NOISE != kNoNoise, MASKED>(e, w0, w1, NOISE == kOperand ? w0 : eps, kept);
}

// The four elements of one Philox block.
template <int NOISE, bool MASKED, int FORM>
__device__ __forceinline__ void compute(float (&out)[kBlock], const float (&w0)[kBlock], const float (&w1)[kBlock],
                                        uint64_t block, const Element& e, const Keys<Thread>& keys) {
  using L = Thread;
  const uint32_t low = (uint32_t)block, high = (uint32_t)(block >> 32);
  float eps[kBlock] = {};
  bool kept[kBlock] = {};
  if (is_random(NOISE)) {
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
  for (int j = 0; j < kBlock; ++j) out[j] = one<NOISE, MASKED, FORM>(e, w0[j], w1[j], eps[j], kept[j]);
}

// One element whose noise lies anywhere: a Philox block for itself.
template <int NOISE, bool MASKED>
__device__ __forceinline__ float compute_at(float w0, float w1, uint64_t block, int lane, const Element& e,
                                            const Keys<Thread>& keys) {
  using L = Thread;
  const uint32_t low = (uint32_t)block, high = (uint32_t)(block >> 32);
  float eps = 0;
  bool kept = false;
  if (is_random(NOISE)) {
    const Words<L> x = philox<L>(low, high, e.draw, kNoisePurpose, keys);
    float first, second;
    noise_pair<L, NOISE>(lane < 2 ? x.x0 : x.x2, lane < 2 ? x.x1 : x.x3, first, second);
    eps = lane % 2 ? second : first;
  }
  if (MASKED) {
    const Words<L> x = philox<L>(low, high, 0, kMaskPurpose, keys);
    kept = (lane < 2 ? (lane ? x.x1 : x.x0) : (lane == 2 ? x.x2 : x.x3)) < e.threshold;
  }
  return one<NOISE, MASKED, kByRow>(e, w0, w1, eps, kept);
}

// A whole tile. The types are compile-time constants except for kByFour.
template <int NOISE, bool MASKED, int FORM, bool SIDE_BY_SIDE>
__device__ __forceinline__ void write_whole(const DeviceRow& row, int64_t start, const Element& e,
                                            const Keys<Thread>& keys, int out_dtype, int zeroshot_dtype,
                                            int finetuned_dtype) {
  using P = Place<SIDE_BY_SIDE>;
  const auto tile = [start](const void* row, int dtype) { return (char*)row + start * (dtype == kFloat32 ? 4 : 2); };
  float w0[kUnroll][kBlock] = {}, w1[kUnroll][kBlock] = {}, out[kUnroll][kBlock];
  if (e.needs_zeroshot()) P::read(w0, tile(row.zeroshot, zeroshot_dtype), zeroshot_dtype);
  if (e.needs_finetuned()) P::read(w1, tile(row.finetuned, finetuned_dtype), finetuned_dtype);
  const uint64_t block = row.first_block + (uint64_t)(start / kBlock);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) compute<NOISE, MASKED, FORM>(out[u], w0[u], w1[u], block + P::block(u), e, keys);
  P::write(out, tile(row.out, out_dtype), out_dtype);
}

// Any tile, element by element.
template <int NOISE, bool MASKED, int FORM>
__device__ __forceinline__ void write_singly(const DeviceRow& row, int64_t start, const Element& e,
                                             const Keys<Thread>& keys) {
#pragma unroll 1
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = start + (threadIdx.x + u * kThreads) * kBlock;
    if (i >= row.size) return;
    float w0[kBlock] = {}, w1[kBlock] = {}, out[kBlock];
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      if (i + j < row.size && e.needs_zeroshot()) w0[j] = load(row.zeroshot, row.zeroshot_dtype, i + j);
      if (i + j < row.size && e.needs_finetuned()) w1[j] = load(row.finetuned, row.finetuned_dtype, i + j);
    }
    compute<NOISE, MASKED, FORM>(out, w0, w1, row.first_block + (uint64_t)(i / kBlock), e, keys);
#pragma unroll
    for (int j = 0; j < kBlock; ++j) {
      if (i + j < row.size) store(row.out, row.out_dtype, i + j, out[j]);
    }
  }
}

// Any tile of a row whose noise is not in the order of memory. Neighbouring threads take neighbouring elements.
template <int NOISE, bool MASKED>
__device__ __forceinline__ void write_scattered(const DeviceRow& row, const Positions& place, int64_t start,
                                                const Element& e, const Keys<Thread>& keys) {
#pragma unroll 1
  for (int u = 0; u < kUnroll * kBlock; ++u) {
    const int64_t i = start + threadIdx.x + u * kThreads;
    if (i >= row.size) return;
    const float w0 = e.needs_zeroshot() ? load(row.zeroshot, row.zeroshot_dtype, i) : 0.0f;
    const float w1 = e.needs_finetuned() ? load(row.finetuned, row.finetuned_dtype, i) : 0.0f;
    const uint64_t at = position(place, i);
    const uint64_t block = row.first_block + at / kBlock;
    store(row.out, row.out_dtype, i, compute_at<NOISE, MASKED>(w0, w1, block, (int)(at % kBlock), e, keys));
  }
}

// The numbers of a row.
template <int NOISE>
__device__ __forceinline__ Element of_row(Element e, const RowNumbers& own) {
  e.k = own.k, e.scale = own.scale, e.threshold = own.threshold;
  e.base = own.flags & kBase ? 1 : 0;
  e.noise = own.flags & kNoisy ? NOISE : kNoNoise;
  e.masked = own.flags & kMasked;
  return e;
}

// Thread blocks that a multiprocessor must be able to hold at once. Without it, the compiler saves registers for one
// more, and spills.
constexpr int resident(int noise, int form) { return form == kByRow ? 4 : noise == kNoNoise ? 6 : 5; }

template <int NOISE, bool MASKED, int FORM>
__global__ void __launch_bounds__(kThreads, resident(NOISE, FORM))
    write_rows(const DeviceRow* __restrict__ rows, const int32_t* __restrict__ tile_row, int64_t begin,
               const __grid_constant__ Request request) {
  const int64_t tile = begin + blockIdx.x;
  const DeviceRow row = rows[tile_row[tile]];
  const int64_t start = (tile - row.first_tile) * kTile;
  Element e = known<FORM>(request.e);
  const Keys<Thread>& keys = request.keys;
  if (FORM == kByRow) {
    const int32_t index = tile_row[tile];
    if (request.numbers) e = of_row<NOISE>(e, request.numbers[index]);
    if (request.places && request.places[index].used) {
      write_scattered<NOISE, MASKED>(row, request.places[index], start, e, keys);
      return;
    }
  }
  if (row.access == kSingly || start + kTile > row.size) {
    write_singly<NOISE, MASKED, FORM>(row, start, e, keys);
  } else if (((FORM == kGeneral || FORM == kByRow) && NOISE != kOperand) || row.access == kByFour) {
    write_whole<NOISE, MASKED, FORM, false>(row, start, e, keys, row.out_dtype, row.zeroshot_dtype,
                                            row.finetuned_dtype);
  } else if (row.access == kAllFloat32) {
    write_whole<NOISE, MASKED, FORM, false>(row, start, e, keys, kFloat32, kFloat32, kFloat32);
  } else if (row.access == kAllBFloat16) {
    write_whole<NOISE, MASKED, FORM, true>(row, start, e, keys, kBFloat16, kBFloat16, kBFloat16);
  } else {
    write_whole<NOISE, MASKED, FORM, true>(row, start, e, keys, kFloat16, kFloat16, kFloat16);
  }
}

using Kernel = void(const DeviceRow*, const int32_t*, int64_t, Request);

template <int NOISE, bool MASKED>
Kernel* pick(Form form) {
  constexpr bool kUsual = NOISE == kNoNoise || NOISE == kNormal;
  switch (form) {
    case kNearZeroshot: return write_rows < NOISE, MASKED, kUsual ? kNearZeroshot : kGeneral > ;
    case kNearFinetuned: return write_rows < NOISE, MASKED, kUsual ? kNearFinetuned : kGeneral > ;
    case kFinetuned: return write_rows < NOISE, MASKED, kUsual ? kFinetuned : kGeneral > ;
    case kByRow: return write_rows<NOISE, MASKED, kByRow>;
    default: return write_rows<NOISE, MASKED, kGeneral>;
  }
}

Kernel* pick(int noise, bool masked, Form form) {
  switch (noise) {
    case kNormal: return masked ? pick<kNormal, true>(form) : pick<kNormal, false>(form);
    case kUniform: return masked ? pick<kUniform, true>(form) : pick<kUniform, false>(form);
    case kRademacher: return masked ? pick<kRademacher, true>(form) : pick<kRademacher, false>(form);
    case kOperand: return pick<kOperand, false>(form);
    default: return masked ? pick<kNoNoise, true>(form) : pick<kNoNoise, false>(form);
  }
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("write: CUDA failed while ") + what + ": " + cudaGetErrorString(status));
  }
}

// The caller makes the device current through torch: only torch knows which device its user chose, and switching back
// to a device without a context would create one there, some 0.5 GB (cudaSetDevice does so since CUDA 12).
void check_current(int device) {
  int current = -1;
  check(cudaGetDevice(&current), "asking for the current device");
  if (current != device) {
    throw std::invalid_argument("native: the current device must be cuda:" + std::to_string(device) +
                                ", it is cuda:" + std::to_string(current));
  }
}

Access access_of(const Row& row) {
  bool by_sixteen = true, by_four = true;  // bytes; elements
  const auto look = [&](const void* p, int dtype) {
    by_sixteen &= (uintptr_t)p % 16 == 0;
    by_four &= (uintptr_t)p % (dtype == kFloat32 ? 16 : 8) == 0;
  };
  look(row.out, row.out_dtype), look(row.zeroshot, row.zeroshot_dtype), look(row.finetuned, row.finetuned_dtype);
  if (!by_four) return kSingly;
  if (!by_sixteen || row.out_dtype != row.zeroshot_dtype || row.out_dtype != row.finetuned_dtype) return kByFour;
  return row.out_dtype == kFloat32 ? kAllFloat32 : row.out_dtype == kBFloat16 ? kAllBFloat16 : kAllFloat16;
}

}  // namespace

struct CudaTable::Layout {
  std::vector<DeviceRow> rows;
  std::vector<int32_t> tile_row;
  std::vector<int64_t> first_tile = {0};  // of each row, and behind the last
  std::vector<Positions> places;          // of each row; empty where none is used

  // In this order.
  size_t row_bytes() const { return rows.size() * sizeof(DeviceRow); }
  size_t place_bytes() const { return places.size() * sizeof(Positions); }
  size_t tile_bytes() const { return tile_row.size() * sizeof(int32_t); }
};

CudaTable::CudaTable(const std::vector<Row>& rows) : layout_(std::make_unique<Layout>()) {
  auto& [there, tile_row, first_tile, places] = *layout_;
  bool placed = false;
  for (const Row& row : rows) {
    const int64_t tiles = (row.size + kTile - 1) / kTile;
    tile_row.insert(tile_row.end(), tiles, (int32_t)there.size());
    there.push_back({row.out, row.zeroshot, row.finetuned, row.size, row.first_block, first_tile.back(), row.out_dtype,
                     row.zeroshot_dtype, row.finetuned_dtype, access_of(row)});
    first_tile.push_back(first_tile.back() + tiles);
    places.push_back(row.place);
    placed |= row.place.used;
  }
  if (!placed) places.clear();
}

CudaTable::~CudaTable() = default;

size_t CudaTable::size() const { return layout_->rows.size(); }

size_t CudaTable::bytes() const { return layout_->row_bytes() + layout_->place_bytes() + layout_->tile_bytes(); }

void CudaTable::fill(void* memory) const {
  char* to = (char*)memory;
  // An empty vector has no address that memcpy may be given.
  const auto put = [&to](const void* from, size_t bytes) {
    if (bytes) std::memcpy(to, from, bytes);
    to += bytes;
  };
  put(layout_->rows.data(), layout_->row_bytes());
  put(layout_->places.data(), layout_->place_bytes());
  put(layout_->tile_row.data(), layout_->tile_bytes());
}

size_t CudaTable::number_bytes() const { return size() * sizeof(RowNumbers); }

void CudaTable::fill_numbers(void* memory, const std::vector<Element>& elements) const {
  auto* to = (RowNumbers*)memory;
  for (const Element& e : elements) {
    *to++ = {e.k, e.scale, e.threshold,
             (e.base ? kBase : 0) | (e.noise != kNoNoise ? kNoisy : 0) | (e.masked ? kMasked : 0)};
  }
}

void CudaTable::write(const void* memory, const Runs& runs, const std::vector<Element>& elements, const void* numbers,
                      int device, void* stream) const {
  check_current(device);
  Element e = elements[0];
  for (const Element& other : elements) {
    if (other.noise != kNoNoise) e.noise = other.noise;
    e.masked |= other.masked;
  }
  const auto* rows = (const DeviceRow*)memory;
  const auto* places = (const Positions*)((const char*)memory + layout_->row_bytes());
  const auto* tile_row = (const int32_t*)((const char*)places + layout_->place_bytes());
  Request request = {e, Keys<Thread>(e.key0, e.key1), elements.size() > 1 ? (const RowNumbers*)numbers : nullptr,
                     layout_->places.empty() ? nullptr : places};
  Kernel* const kernel = pick(e.noise, e.masked, request.numbers || request.places ? kByRow : form_of(e));
  for (const auto& run : runs) {
    int64_t begin = layout_->first_tile[run.first];
    const int64_t tiles = layout_->first_tile[run.second] - begin;
    if (tiles == 0) continue;
    void* arguments[] = {&rows, &tile_row, &begin, &request};
    check(cudaLaunchKernel(kernel, dim3((unsigned)tiles), dim3(kThreads), arguments, 0, (cudaStream_t)stream),
          "launching the kernel");
  }
}

// Querying every kernel loads them all, so that none has to be loaded while a graph is captured.
std::string why_not_cuda(int device) {
  try {
    check_current(device);
    for (int noise : {kNoNoise, kNormal, kUniform, kRademacher, kOperand}) {
      for (bool masked : {false, true}) {
        for (Form form : {kGeneral, kNearZeroshot, kNearFinetuned, kFinetuned, kByRow}) {
          cudaFuncAttributes attributes;
          const cudaError_t status = cudaFuncGetAttributes(&attributes, pick(noise, masked, form));
          if (status == cudaSuccess) continue;
          cudaGetLastError();  // so that the next call does not report this error
          return cudaGetErrorString(status);
        }
      }
    }
    return "";
  } catch (const std::exception& error) {
    cudaGetLastError();
    return error.what();
  }
}

}  // namespace rft
