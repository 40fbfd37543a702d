// Tiles of random numbers, and the formula over a tile.
//
// n elements at a time go through three short loops: random words, noise from words, the formula. One long loop would
// be bound by the latency of its dependent chain; of a short loop several iterations are in flight at once.
#pragma once

#include "cpu_grid.h"
#include "cpu_lanes.h"

namespace rft {
namespace {

// An end that is not needed is not read: its lanes load the other end, which is in the cache anyway.
struct Ends {
  const void *zeroshot, *finetuned;
  int zeroshot_dtype, finetuned_dtype;

  Ends(const Row& row, const Element& e) {
    const bool use0 = e.needs_zeroshot(), use1 = e.needs_finetuned();
    zeroshot = use0 ? row.zeroshot : row.finetuned, finetuned = use1 ? row.finetuned : row.zeroshot;
    zeroshot_dtype = use0 ? row.zeroshot_dtype : row.finetuned_dtype;
    finetuned_dtype = use1 ? row.finetuned_dtype : row.zeroshot_dtype;
  }
};

constexpr int kSteps = kTile / Lanes::kElements;

// The blocks of a tile: consecutive, or a list of them. The high word is the same for all, see cut() and gather().
struct Consecutive {
  uint64_t block;
  uint32_t high() const { return (uint32_t)(block >> 32); }
  Lanes::W first() const { return Lanes::blocks(block); }
  Lanes::W next(Lanes::W x, int) const { return Lanes::next_blocks(x); }
};

struct Gathered {
  const uint64_t* blocks;  // block i at Lanes::slot(i); one step more than is used
  uint32_t high() const { return (uint32_t)(blocks[0] >> 32); }
  Lanes::W first() const { return Lanes::gather(blocks); }
  Lanes::W next(Lanes::W, int step) const { return Lanes::gather(blocks + step * Lanes::kBlocks); }
};

// The words of `steps` steps, as pairs of lanes in element order.
template <class B>
void random_words(Lanes::I* first, Lanes::I* second, int steps, B from, uint32_t draw, uint32_t purpose,
                  const Element& e) {
  using L = Lanes;
  const uint32_t high = from.high();
  const Keys<L> keys(e.key0, e.key1);
  // Hide from the compiler that the keys are sums of two numbers: otherwise it computes and broadcasts all twenty in
  // every iteration, instead of reading them as operands from the first-level cache.
  asm volatile("" : : "r"(&keys) : "memory");
  L::W blocks = from.first();
  for (int s = 0; s < steps; ++s) {
    const Words<L> x = philox<L>(blocks, high, draw, purpose, keys);
    first[s] = L::pack(x.x0, x.x2);
    second[s] = L::pack(x.x1, x.x3);
    blocks = from.next(blocks, s + 1);
  }
}

template <int NOISE, class B>
void noise_tile(float* eps, int steps, B block, const Element& e) {
  using L = Lanes;
  L::I first[kSteps], second[kSteps];
  random_words(first, second, steps, block, e.draw, kNoisePurpose, e);
  for (int s = 0; s < steps; ++s) {
    L::F a, b, low, high;
    noise_pair<L, NOISE>(first[s], second[s], a, b);
    L::interleave(a, b, low, high);
    L::store(eps + s * L::kElements, low);
    L::store(eps + s * L::kElements + L::kElements / 2, high);
  }
}

// All ones where a weight is kept, else zero.
template <class B>
void mask_tile(float* kept, int steps, B block, const Element& e) {
  using L = Lanes;
  L::I first[kSteps], second[kSteps];
  random_words(first, second, steps, block, 0, kMaskPurpose, e);
  // Flipping the top bit of both sides makes the signed comparison an unsigned one.
  const int32_t threshold = (int32_t)(e.threshold ^ 0x80000000u);
  for (int s = 0; s < steps; ++s) {
    L::F low, high;
    L::interleave(L::as_float((first[s] ^ INT32_MIN) < threshold), L::as_float((second[s] ^ INT32_MIN) < threshold),
                  low, high);
    L::store(kept + s * L::kElements, low);
    L::store(kept + s * L::kElements + L::kElements / 2, high);
  }
}

// n is a multiple of the lanes; eps and kept are read only where they are used.
template <bool NOISY, bool MASKED, bool STREAM>
void formula(float* out, const float* w0, const float* w1, const float* eps, const float* kept, int64_t n,
             const Element& given) {
  using L = Lanes;
  const Element e = given;  // a local copy, which the stores below cannot alias
  constexpr int kLanes = L::kElements / 2;
  for (int64_t i = 0; i < n; i += kLanes) {
    const L::F noise = NOISY ? L::load(eps + i) : L::F{};
    const L::I keep = MASKED ? L::as_int(L::load(kept + i)) : L::I{};
    const L::F x = element<L, NOISY, MASKED>(e, L::load(w0 + i), L::load(w1 + i), noise, keep);
    STREAM ? L::stream(out + i, x) : L::store(out + i, x);
  }
}

}  // namespace
}  // namespace rft
