// The kernels: each is one function over a table of rows that lies on the device.
//
// The table is cut into tiles of kTile elements. A thread block writes a group of tiles, one after the other: one, or
// kLongTiles of a long row; `group_row` holds each group's row. A thread writes two Philox blocks of a tile: eight
// elements, whose loads are all issued before the first is used. A whole tile is read and written 16 bytes at a time if
// its row allows it; the last tile of a row, and rows of unaligned views, go element by element.
//
// With noise, 16-bit weights are bound by instructions rather than memory, so the inner loop decides nothing that is
// known before it. What a launch knows (noise, mask, the usual forms of the formula) selects the kernel. What a row
// knows (its storage types) is one branch that all threads of a block take alike, so that mixed models stay one launch.
//
// What few launches need has kernels of its own: numbers that differ from row to row, and noise in another order than
// that of memory. They lie in arrays beside the rows, so that the usual kernels stay as they are.
#pragma once

#include "cuda_layout.cuh"
#include "cuda_memory.cuh"
#include "element.h"

namespace rft {
namespace {

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

// That many whole tiles, at least one. The types are compile-time constants except for kByFour.
template <int NOISE, bool MASKED, int FORM, bool SIDE_BY_SIDE>
__device__ __forceinline__ void write_whole(const DeviceRow& row, int64_t start, int tiles, const Element& e,
                                            const Keys<Thread>& keys, int out_dtype, int zeroshot_dtype,
                                            int finetuned_dtype) {
  using P = Place<SIDE_BY_SIDE>;
#pragma unroll 1
  do {
    const auto tile = [start](const void* row, int dtype) { return (char*)row + start * (dtype == kFloat32 ? 4 : 2); };
    float w0[kUnroll][kBlock] = {}, w1[kUnroll][kBlock] = {}, out[kUnroll][kBlock];
    if (e.needs_zeroshot()) P::read(w0, tile(row.zeroshot, zeroshot_dtype), zeroshot_dtype);
    if (e.needs_finetuned()) P::read(w1, tile(row.finetuned, finetuned_dtype), finetuned_dtype);
    const uint64_t block = row.first_block + (uint64_t)(start / kBlock);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) compute<NOISE, MASKED, FORM>(out[u], w0[u], w1[u], block + P::block(u), e, keys);
    P::write(out, tile(row.out, out_dtype), out_dtype);
    start += kTile;
  } while (--tiles);
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
    write_rows(const DeviceRow* __restrict__ rows, const int32_t* __restrict__ group_row, int64_t begin,
               const __grid_constant__ Request request) {
  const int64_t group = begin + blockIdx.x;
  const DeviceRow row = rows[group_row[group]];
  const int64_t start = (group - row.first_group) * (row.tiles * kTile), left = row.size - start;
  Element e = known<FORM>(request.e);
  const Keys<Thread>& keys = request.keys;
  if (FORM == kByRow) {
    const int32_t index = group_row[group];
    if (request.numbers) e = of_row<NOISE>(e, request.numbers[index]);
    if (request.places && request.places[index].used) {
#pragma unroll 1
      for (int tile = 0; tile < row.tiles; ++tile) {
        write_scattered<NOISE, MASKED>(row, request.places[index], start + tile * kTile, e, keys);
      }
      return;
    }
  }
  const int whole = left >= row.tiles * kTile ? row.tiles : (int)left / kTile;
  if (row.access == kSingly || whole == 0) {
    write_singly<NOISE, MASKED, FORM>(row, start, e, keys);
    return;
  }
  if (((FORM == kGeneral || FORM == kByRow) && NOISE != kOperand) || row.access == kByFour) {
    write_whole<NOISE, MASKED, FORM, false>(row, start, whole, e, keys, row.out_dtype, row.zeroshot_dtype,
                                            row.finetuned_dtype);
  } else if (row.access == kAllFloat32) {
    write_whole<NOISE, MASKED, FORM, false>(row, start, whole, e, keys, kFloat32, kFloat32, kFloat32);
  } else if (row.access == kAllBFloat16) {
    write_whole<NOISE, MASKED, FORM, true>(row, start, whole, e, keys, kBFloat16, kBFloat16, kBFloat16);
  } else {
    write_whole<NOISE, MASKED, FORM, true>(row, start, whole, e, keys, kFloat16, kFloat16, kFloat16);
  }
  // The last tile of a row is a thread block of its own, unless others of its block come before it.
  if (whole < row.tiles) write_singly<NOISE, MASKED, FORM>(row, start + whole * kTile, e, keys);
}

}  // namespace
}  // namespace rft
