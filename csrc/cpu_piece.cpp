// Writes elements [start, stop) of one row with one instruction set. Compiled once per set, with its own flags and
// RFT_AVX512, RFT_AVX2 or neither. Everything but the `Isa` is local, so that the linker cannot put a function built
// for a newer set in the place of one for an older set.
#include <cstring>

#include "cpu.h"
#include "cpu_norm.h"
#include "cpu_placed.h"

namespace rft {
namespace {

// Any n elements of float32, the first of them at `block`.
template <int NOISE, bool MASKED>
void span(float* out, const float* w0, const float* w1, int64_t n, uint64_t block, const Element& e, bool stream) {
  using L = Lanes;
  constexpr int64_t kLanes = L::kElements / 2;
  float eps[kTile], kept[kTile];
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t m = n - i < kTile ? n - i : kTile, whole = m / kLanes * kLanes;
    const int steps = (int)((m + L::kElements - 1) / L::kElements);
    const Consecutive blocks = {block + i / kBlock};
    if (is_random(NOISE)) noise_tile<NOISE>(eps, steps, blocks, e);
    if (MASKED) mask_tile(kept, steps, blocks, e);
    const float* added = NOISE == kOperand ? w0 + i : eps;
    if (stream) {
      formula<NOISE != kNoNoise, MASKED, true>(out + i, w0 + i, w1 + i, added, kept, whole, e);
    } else {
      formula<NOISE != kNoNoise, MASKED, false>(out + i, w0 + i, w1 + i, added, kept, whole, e);
    }
    if (const int64_t tail = m - whole) {
      float a[kLanes] = {}, b[kLanes] = {}, c[kLanes];
      std::memcpy(a, w0 + i + whole, sizeof(float) * tail);
      std::memcpy(b, w1 + i + whole, sizeof(float) * tail);
      formula<NOISE != kNoNoise, MASKED, false>(c, a, b, NOISE == kOperand ? a : eps + whole, kept + whole, kLanes, e);
      std::memcpy(out + i + whole, c, sizeof(float) * tail);
    }
  }
}

using Span = void (*)(float*, const float*, const float*, int64_t, uint64_t, const Element&, bool);

template <int NOISE>
Span pick_span(bool masked) {
  return masked ? span<NOISE, true> : span<NOISE, false>;
}

Span pick_span(const Element& e) {
  switch (e.noise) {
    case kNormal: return pick_span<kNormal>(e.masked);
    case kUniform: return pick_span<kUniform>(e.masked);
    case kRademacher: return pick_span<kRademacher>(e.masked);
    case kOperand: return span<kOperand, false>;
    default: return pick_span<kNoNoise>(e.masked);
  }
}

void piece(const Row& row, int64_t start, int64_t stop, const Element& e, bool past_caches) {
  const Span span = pick_span(e);
  const Ends ends(row, e);
  const uint64_t block = row.first_block + start / kBlock;
  if (ends.zeroshot_dtype == kFloat32 && ends.finetuned_dtype == kFloat32 && row.out_dtype == kFloat32) {
    float* out = (float*)row.out + start;
    const bool stream =
        past_caches && row.out != ends.zeroshot && row.out != ends.finetuned && (uintptr_t)out % kBytes == 0;
    span(out, (const float*)ends.zeroshot + start, (const float*)ends.finetuned + start, stop - start, block, e,
         stream);
    if (stream) Lanes::flush();
    return;
  }
  float w0[kTile], w1[kTile], out[kTile];
  for (int64_t i = start; i < stop; i += kTile) {
    const int64_t n = stop - i < kTile ? stop - i : kTile;
    load(w0, ends.zeroshot, ends.zeroshot_dtype, i, n);
    load(w1, ends.finetuned, ends.finetuned_dtype, i, n);
    span(out, w0, w1, n, block + (i - start) / kBlock, e, false);
    store(row.out, row.out_dtype, i, out, n);
  }
}

// Tiles [start, stop) of the row's grid.
void tiles(const Row& row, int64_t start, int64_t stop, const Element& e) {
  const Ends ends(row, e);
  const Grid grid(row);
  switch (e.noise) {
    case kNormal: return placed<kNormal>(row, ends, grid, start, stop, e);
    case kUniform: return placed<kUniform>(row, ends, grid, start, stop, e);
    case kRademacher: return placed<kRademacher>(row, ends, grid, start, stop, e);
    default: return placed<kNoNoise>(row, ends, grid, start, stop, e);
  }
}

void philox_once(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]) {
  using L = Lanes;
  const Keys<L> keys(key[0], key[1]);
  const Words<L> x = philox<L>(L::word(counter[0]), counter[1], counter[2], counter[3], keys);
  words[0] = (uint32_t)x.x0.a[0], words[1] = (uint32_t)x.x1.a[0];
  words[2] = (uint32_t)x.x2.a[0], words[3] = (uint32_t)x.x3.a[0];
}

template <int NOISE>
void noise_from_words(const uint32_t* words, int64_t blocks, float* out) {
  using L = Lanes;
  constexpr int kVector = L::kVector;
  for (int64_t i = 0; i < 2 * blocks; i += 2 * kVector) {
    float xa[2 * kVector] = {}, xb[2 * kVector] = {};
    const int64_t n = 2 * blocks - i < 2 * kVector ? 2 * blocks - i : 2 * kVector;
    for (int64_t j = 0; j < n; ++j) {
      xa[j] = float_of(words[2 * (i + j)]), xb[j] = float_of(words[2 * (i + j) + 1]);
    }
    L::F a, b;
    noise_pair<L, NOISE>(L::as_int(L::load(xa)), L::as_int(L::load(xb)), a, b);
    L::store(xa, a), L::store(xb, b);
    for (int64_t j = 0; j < n; ++j) out[2 * (i + j)] = xa[j], out[2 * (i + j) + 1] = xb[j];
  }
}

void noise(int kind, const uint32_t* words, int64_t blocks, float* out) {
  switch (kind) {
    case kNormal: return noise_from_words<kNormal>(words, blocks, out);
    case kUniform: return noise_from_words<kUniform>(words, blocks, out);
    default: return noise_from_words<kRademacher>(words, blocks, out);
  }
}

}  // namespace

#if defined(RFT_AVX512)
extern const Isa kAvx512 = {"avx512", piece, tiles, squares, philox_once, noise};
#elif defined(RFT_AVX2)
extern const Isa kAvx2 = {"avx2", piece, tiles, squares, philox_once, noise};
#else
extern const Isa kBaseline = {"baseline", piece, tiles, squares, philox_once, noise};
#endif

}  // namespace rft
