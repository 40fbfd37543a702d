// Sums of squares, for norms.
#pragma once

#include <cstring>

#include "cpu_formats.h"

namespace rft {
namespace {

// Sixteen sums, whatever the instruction set, so that each adds the same numbers in the same order.
constexpr int kSums = 16;
typedef double Vd __attribute__((vector_size(kBytes)));
typedef float Vh __attribute__((vector_size(kBytes / 2)));
constexpr int kDoubles = kBytes / 8;

RFT_FN Vd widened(const float* p) {
  Vh x;
  std::memcpy(&x, p, sizeof x);
  return __builtin_convertvector(x, Vd);
}

// n is a multiple of kSums. Exact products but for their rounding to float64: what is added is (factor(w) b)^2.
template <int FACTOR>
void add_squares(Vd* sums, const float* b, const float* w, int64_t n) {
  constexpr int kVectors = kSums / kDoubles;
  Vd own[kVectors];
  for (int v = 0; v < kVectors; ++v) own[v] = sums[v];
  for (int64_t i = 0; i < n; i += kSums) {
    RFT_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Vd x = widened(b + i + v * kDoubles);
      if (FACTOR != kOne) {
        const Vd factor = widened(w + i + v * kDoubles);
        x *= FACTOR == kSquare ? factor * factor : factor;  // the sign of |w| is squared away
      }
      own[v] += x * x;
    }
  }
  for (int v = 0; v < kVectors; ++v) sums[v] = own[v];
}

// The sum over elements [start, stop) of a row of (factor(w) b)^2, b the zero-shot end and w the fine-tuned one.
template <int FACTOR>
double squares(const Row& row, int64_t start, int64_t stop) {
  const bool plain = row.zeroshot_dtype == kFloat32 && (FACTOR == kOne || row.finetuned_dtype == kFloat32);
  const int64_t whole = plain ? (stop - start) / kSums * kSums : 0;
  Vd sums[kSums / kDoubles] = {};
  if (plain) add_squares<FACTOR>(sums, (const float*)row.zeroshot + start, (const float*)row.finetuned + start, whole);
  for (int64_t i = start + whole; i < stop; i += kTile) {
    const int64_t n = stop - i < kTile ? stop - i : kTile;
    float b[kTile + kSums] = {}, w[kTile + kSums] = {};  // zeros behind the last element
    load(b, row.zeroshot, row.zeroshot_dtype, i, n);
    if (FACTOR != kOne) load(w, row.finetuned, row.finetuned_dtype, i, n);
    add_squares<FACTOR>(sums, b, w, (n + kSums - 1) / kSums * kSums);
  }
  double each[kSums], sum = 0;
  std::memcpy(each, sums, sizeof each);
  for (double own : each) sum += own;
  return sum;
}

double squares(const Row& row, int64_t start, int64_t stop, int factor) {
  switch (factor) {
    case kMagnitude: return squares<kMagnitude>(row, start, stop);
    case kSquare: return squares<kSquare>(row, start, stop);
    default: return squares<kOne>(row, start, stop);
  }
}

}  // namespace
}  // namespace rft
