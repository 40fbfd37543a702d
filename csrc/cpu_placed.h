// Writes tiles of a row whose noise is in another order than its memory.
#pragma once

#include <cstring>

#include "cpu_formats.h"
#include "cpu_tiles.h"

namespace rft {
namespace {

// Stretches of a tile that are contiguous in memory: runs, or else one element of every run.
struct Stretches {
  int64_t memory, stride, size, length;

  Stretches(const Grid& grid, const Grid::Tile& tile) : memory(tile.memory), size(tile.runs * tile.length) {
    const bool by_run = grid.along == kDimensions - 1;
    stride = grid.strides[by_run ? grid.across : grid.along];
    length = by_run ? tile.length : tile.runs;
    if (stride == length) length = size;
  }

  // visit(first element in the tile, and in memory)
  template <class Visit>
  void each(Visit visit) const {
    for (int64_t i = 0, at = memory; i < size; i += length, at += stride) visit(i, at);
  }
};

RFT_FN void prefetch(const void* from, int dtype, int64_t first, int64_t n) {
  const int64_t bytes = dtype == kFloat32 ? 4 : 2;
  for (int64_t i = 0; i < n * bytes; i += 64) __builtin_prefetch((const char*)from + first * bytes + i);
}

// Same as memcpy, whose call takes longer than copying so few numbers does.
RFT_FN void copy_short(char* to, const char* from, int64_t bytes) {
  for (; bytes >= 32; to += 32, from += 32, bytes -= 32) std::memcpy(to, from, 32);
  for (; bytes >= 4; to += 4, from += 4, bytes -= 4) std::memcpy(to, from, 4);
}

RFT_FN void load_short(float* to, const void* from, int dtype, int64_t first, int64_t n) {
  dtype == kFloat32 ? copy_short((char*)to, (const char*)from + 4 * first, 4 * n) : load(to, from, dtype, first, n);
}

RFT_FN void store_short(void* to, int dtype, int64_t first, const float* from, int64_t n) {
  dtype == kFloat32 ? copy_short((char*)to + 4 * first, (const char*)from, 4 * n) : store(to, dtype, first, from, n);
}

// The blocks of a tile of the grid, each once, and where the random numbers of each run lie in theirs.
struct Scattered {
  uint64_t blocks[kTile / kBlock + Lanes::kBlocks];  // block i at Lanes::slot(i)
  uint64_t first = 0, last = 0;
  int16_t from[kTile];
  int count = 0;

  Scattered(const Row& row, const Grid& grid, const Grid::Tile& tile) {
    for (int64_t j = 0; j < tile.runs; ++j) {
      const uint64_t at = grid.run(tile, j), end = row.first_block + (at + tile.length - 1) / kBlock;
      uint64_t block = row.first_block + at / kBlock;
      if (count == 0) first = block;
      if (count && block == last) --count;  // shared with the run before
      from[j] = (int16_t)(count * kBlock + at % kBlock);
      while (block <= end) blocks[Lanes::slot(count++)] = block++;
      last = end;
    }
    for (int i = count; i < count + Lanes::kBlocks; ++i) blocks[Lanes::slot(i)] = last;
  }

  // Puts the numbers of the blocks into the order of the tile in memory. make(to, steps, blocks) computes them.
  template <class Make>
  void numbers(float* to, const Grid& grid, const Grid::Tile& tile, Make make) const {
    float found[kTile];
    const int steps = (count + Lanes::kBlocks - 1) / Lanes::kBlocks;
    if (first >> 32 != last >> 32) {  // the high word must be the same for all that are made at once
      float one[Lanes::kElements];
      for (int i = 0; i < count; ++i) {
        make(one, 1, Consecutive{blocks[Lanes::slot(i)]});
        std::memcpy(found + i * kBlock, one, kBlock * sizeof(float));
      }
    } else if (last - first == (uint64_t)(count - 1)) {
      make(found, steps, Consecutive{first});
    } else {
      make(found, steps, Gathered{blocks});
    }
    // Bits, not numbers: masks are no floats.
    const auto copy = [](float* a, const float* b, int64_t n) { std::memcpy(a, b, n * sizeof(float)); };
    if (grid.along == kDimensions - 1) {
      for (int64_t j = 0; j < tile.runs; ++j) copy(to + j * tile.length, found + from[j], tile.length);
      return;
    }
    for (int64_t i = 0; i < tile.length; ++i) {
      for (int64_t j = 0; j < tile.runs; ++j) copy(to + i * tile.runs + j, found + from[j] + i, 1);
    }
  }
};

template <int NOISE, bool MASKED>
void placed(const Row& row, const Ends& ends, const Grid& grid, int64_t start, int64_t stop, const Element& e) {
  constexpr int64_t kLanes = Lanes::kElements / 2;
  // The formula goes beyond the last element.
  float w0[kTile] = {}, w1[kTile] = {}, out[kTile], eps[kTile] = {}, kept[kTile] = {};
  for (int64_t index = start; index < stop; ++index) {
    const Grid::Tile tile = grid.tile(index);
    const Scattered random(row, grid, tile);
    if (index + 1 < stop) {  // the processor does not foresee these jumps; the noise of this tile takes long enough
      const Stretches next(grid, grid.tile(index + 1));
      next.each([&](int64_t, int64_t from) {
        prefetch(ends.zeroshot, ends.zeroshot_dtype, from, next.length);
        prefetch(ends.finetuned, ends.finetuned_dtype, from, next.length);
        prefetch(row.out, row.out_dtype, from, next.length);
      });
    }
    if (is_random(NOISE)) {
      random.numbers(eps, grid, tile,
                     [&](float* to, int steps, auto blocks) { noise_tile<NOISE>(to, steps, blocks, e); });
    }
    if (MASKED) {
      random.numbers(kept, grid, tile, [&](float* to, int steps, auto blocks) { mask_tile(to, steps, blocks, e); });
    }
    const Stretches here(grid, tile);
    here.each([&](int64_t i, int64_t from) {
      load_short(w0 + i, ends.zeroshot, ends.zeroshot_dtype, from, here.length);
      load_short(w1 + i, ends.finetuned, ends.finetuned_dtype, from, here.length);
    });
    formula<NOISE != kNoNoise, MASKED, false>(out, w0, w1, eps, kept, (here.size + kLanes - 1) / kLanes * kLanes, e);
    here.each([&](int64_t i, int64_t to) { store_short(row.out, row.out_dtype, to, out + i, here.length); });
  }
}

template <int NOISE>
void placed(const Row& row, const Ends& ends, const Grid& grid, int64_t start, int64_t stop, const Element& e) {
  e.masked ? placed<NOISE, true>(row, ends, grid, start, stop, e)
           : placed<NOISE, false>(row, ends, grid, start, stop, e);
}

}  // namespace
}  // namespace rft
