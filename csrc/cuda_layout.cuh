// What host and device share: how a table lies in the device's memory, and the arguments of a launch.
#pragma once

#include <cstdint>

#include "cuda_lanes.cuh"
#include "element.h"

namespace rft {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // Philox blocks of a thread
constexpr int kTile = kThreads * kUnroll * kBlock;

// A thread block writes several consecutive tiles of a long row: they share the work of finding them. Tests lower the
// bound, so that small rows are long.
#ifndef RFT_LONG_ROW
#define RFT_LONG_ROW (4 << 20)
#endif
constexpr int64_t kLongRow = RFT_LONG_ROW;  // elements
constexpr int kLongTiles = 4;

// How the whole tiles of a row are read and written.
enum Access : int16_t {
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
  int64_t first_group;  // number of its first thread block
  int32_t out_dtype, zeroshot_dtype, finetuned_dtype;
  Access access;
  int16_t tiles;  // of each thread block
};

// Rows that go element by element are bound by other things.
inline int tiles_of_block(int64_t size, Access access) {
  return size >= kLongRow && access != kSingly ? kLongTiles : 1;
}

// The numbers of one row, where they differ from row to row.
struct alignas(16) RowNumbers {
  float k, scale;
  uint32_t threshold;
  int32_t flags;  // Flag
};

enum Flag : int32_t { kBase = 1, kNoisy = 2, kMasked = 4 };

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

}  // namespace
}  // namespace rft
