// How a row whose noise is in another order than its memory is cut into tiles that use each Philox block once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu.h"

namespace rft {
namespace {  // local to each translation unit, which has its own instruction set

constexpr int64_t kTile = 1024;  // elements of a tile, whose buffers fit into the first-level cache

// A tile consists of runs: elements whose positions are consecutive (along one dimension, `along`), repeated over the
// dimension that is contiguous in memory (`across`; the next outer one where both are the same).
struct Grid {
  struct Tile {
    int64_t memory;  // its first element, counted in the order of memory
    uint64_t at;     // its position
    int64_t length;  // of a run
    int64_t runs;
  };

  int along = kDimensions - 1, across;
  int64_t sizes[kDimensions], strides[kDimensions];  // elements; steps in memory
  int64_t extents[kDimensions];                      // of a tile
  int64_t tiles = 1;

  explicit Grid(const Row& row) : place_(row.place) {
    int64_t inner = 1;
    for (int d = kDimensions - 1; d >= 0; inner *= sizes[d--]) {
      sizes[d] = d ? place_.sizes[d - 1] : row.size / inner;
      strides[d] = inner, extents[d] = 1;
      if (sizes[d] > 1 && (sizes[along] == 1 || place_.strides[d] < place_.strides[along])) along = d;
    }
    across = kDimensions - (along == kDimensions - 1 ? 2 : 1);
    const bool consecutive = place_.strides[along] == 1;
    if (!consecutive) {  // no two elements share a block
      extents[across] = std::min(sizes[across], kTile / kBlock);
    } else {
      // So large that all blocks of a tile, used in part or whole, have kTile elements; in memory mostly a square.
      constexpr int64_t kSide = 32, kEnds = 2 * (kBlock - 1);  // elements of a run's first and last block that it lacks
      const bool adjacent = place_.strides[across] == sizes[along] && sizes[along] <= 2 * kSide;  // as one long run
      bool aligned = place_.start % kBlock == 0;
      for (int d = 0; d < kDimensions; ++d) aligned &= d == along || place_.strides[d] % kBlock == 0;
      const int64_t room = along == kDimensions - 1 ? kTile - 2 * kBlock : kTile / std::min(sizes[across], kSide);
      const int64_t length =
          adjacent ? sizes[along] : std::min(sizes[along], std::max<int64_t>(kBlock, room / kBlock * kBlock));
      const int64_t reserved = adjacent ? length : (length + (aligned ? kBlock - 1 : kEnds)) / kBlock * kBlock;
      extents[along] = length;
      extents[across] = std::min(sizes[across], (kTile - (adjacent ? kEnds : 0)) / reserved);
    }
    for (int d = 0; d < kDimensions; ++d) tiles *= (sizes[d] + extents[d] - 1) / extents[d];
  }

  Tile tile(int64_t index) const {
    Tile found = {0, place_.start, 0, 0};
    for (int d = kDimensions - 1; d >= 0; --d) {
      const int64_t count = (sizes[d] + extents[d] - 1) / extents[d], first = index % count * extents[d];
      index /= count;
      found.memory += first * strides[d];
      found.at += (uint64_t)(first * place_.strides[d]);
      const int64_t extent = std::min(extents[d], sizes[d] - first);
      if (d == along) found.length = extent;
      if (d == across) found.runs = extent;
    }
    return found;
  }

  uint64_t run(const Tile& tile, int64_t j) const { return tile.at + (uint64_t)(j * place_.strides[across]); }

 private:
  const Positions& place_;
};

}  // namespace
}  // namespace rft
