// One element, one formula: Philox4x32-10, its mapping to noise, and the write itself, for host and device.
//
// Everything is a template over `L`, the lanes it runs on: a vector of an instruction set on the CPU, one scalar
// per thread on a GPU. L provides the types F (float32 lanes), I (int32 lanes), W (lanes that hold one 32-bit word
// each, possibly with garbage in the bits above) and the few operations that have no operator (cpu_lanes.h). Sums
// and left shifts of I are L::add and L::shift_left, modulo 2^32, because overflow of signed integers is undefined.
//
// The formula's multiplications and additions are never contracted into fused multiply-adds (-ffp-contract=off,
// nvcc -fmad=false), so that every backend rounds them alike. Only L::mad may fuse: it is used where the product is
// exact (by a power of two), and in the polynomials, because normals are specified to 2e-6 and not to the bit.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RFT_FN __host__ __device__ __forceinline__
#define RFT_UNROLL _Pragma("unroll")
#else
#define RFT_FN inline __attribute__((always_inline))
#define RFT_UNROLL _Pragma("GCC unroll 10")
#endif

namespace rft {

// kOperand: what is added is no noise, but read from the zero-shot end.
enum Noise : int { kNoNoise = 0, kNormal = 1, kUniform = 2, kRademacher = 3, kOperand = 4 };
RFT_FN constexpr bool is_random(int noise) { return noise != kNoNoise && noise != kOperand; }

enum Factor : int { kOne = 0, kMagnitude = 1, kSquare = 2 };
enum Purpose : uint32_t { kNoisePurpose = 0, kMaskPurpose = 1 };
enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int kBlock = 4;  // consecutive elements served by one Philox block

// The numbers of one write, as contract.Write derives them. Plain data, passed to kernels by value.
struct Element {
  int base;            // lerp(w0, w1) = (base ? w1 : w0) + (w1 - w0) * k
  float k;             // 0: the base's bits
  int noise;           // Noise
  float scale;         // sign * rho
  int factor;          // Factor: noise scaled by 1, |w| or w * w
  bool interpolated;   // perturb lerp(w0, w1) instead of w1
  bool masked;         // some fine-tuned weights may be replaced
  bool fill_zeroshot;  // by w0 instead of 0
  uint32_t threshold;  // a weight is kept when its mask word is below
  uint32_t key0, key1;
  uint32_t draw;

  // At alpha = 1 the zero-shot weights need not be read.
  RFT_FN bool needs_zeroshot() const {
    return base == 0 || k != 0.0f || (masked && fill_zeroshot) || noise == kOperand;
  }
  // At alpha = 0 the fine-tuned weights need not be read.
  RFT_FN bool needs_finetuned() const { return base == 1 || k != 0.0f; }
};

// Positions of elements whose order in memory is not that of their noise: the element at (i0, i1, i2, i3), counted in
// the order of memory, has the position start + the sum of i * stride behind the row's first block.
constexpr int kDimensions = 4;

struct Positions {
  bool used;  // false: the positions follow in the order of memory
  uint64_t start;
  int64_t sizes[kDimensions - 1];  // of the inner dimensions
  int64_t strides[kDimensions];
};

RFT_FN uint64_t position(const Positions& place, int64_t element) {
  uint64_t at = place.start;
  RFT_UNROLL
  for (int d = kDimensions - 1; d > 0; --d) {
    const int64_t outer = element / place.sizes[d - 1];
    at += (uint64_t)((element - outer * place.sizes[d - 1]) * place.strides[d]);
    element = outer;
  }
  return at + (uint64_t)(element * place.strides[0]);
}

template <class L>
struct Words {
  typename L::W x0, x1, x2, x3;
};

// The keys of Philox's ten rounds.
template <class L>
struct Keys {
  typename L::W first[10], second[10];

  RFT_FN Keys(uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
      first[round] = L::word(key0 + round * 0x9E3779B9u);
      second[round] = L::word(key1 + round * 0xBB67AE85u);
    }
  }
};

// Philox4x32-10. Counter: (block, block_high, draw, purpose).
template <class L>
RFT_FN Words<L> philox(typename L::W block, uint32_t block_high, uint32_t draw, uint32_t purpose, const Keys<L>& keys) {
  using W = typename L::W;
  W c0 = block, c1 = L::word(block_high), c2 = L::word(draw), c3 = L::word(purpose);
  RFT_UNROLL
  for (int round = 0; round < 10; ++round) {
    W hi0, lo0, hi1, lo1;
    L::multiply(c0, 0xD2511F53u, hi0, lo0);
    L::multiply(c2, 0xCD9E8D57u, hi1, lo1);
    c0 = hi1 ^ (c1 ^ keys.first[round]);
    c1 = lo1;
    c2 = hi0 ^ (c3 ^ keys.second[round]);
    c3 = lo0;
  }
  return {c0, c1, c2, c3};
}

// r(x) = sqrt(-2 ln((x + 1/2) / 2^32)).
//
// Let u = (x + 1/2) / 2^32. Read as a signed integer, x gives g = u in (0, 1/2] where its top bit is clear, and
// g = u - 1 in [-1/2, 0) where it is set: near u = 1, where ln u vanishes, the float keeps 1 - u exactly.
template <class L>
RFT_FN typename L::F radius(typename L::I x) {
  using F = typename L::F;
  using I = typename L::I;
  const F g = L::mad(L::to_float(x), L::constant(0x1p-32f), 0x1p-33f);
  const F u = L::add_one_below_zero(g, x);
  // u = 2^exponent * m with m in [sqrt(1/2), sqrt(2)).
  const I bits = L::add(L::as_int(u), -0x3f3504f3);
  const I exponent = bits >> 23;
  const F m = L::as_float(L::add(bits & 0x007fffff, 0x3f3504f3));
  const F f = L::select(exponent == 0, g, m - 1.0f);
  // -2 log1p(f) / f on [sqrt(1/2) - 1, sqrt(2) - 1], minimax, relative error 1.7e-7. Evaluated in pairs (Estrin)
  // rather than in one chain (Horner), because the surrounding loop is bound by latency.
  const F f2 = f * f;
  const F q01 = L::mad(L::constant(1.0000073f), f, -1.9999999f);
  const F q23 = L::mad(L::constant(0.49939817f), f, -0.6667012f);
  const F q45 = L::mad(L::constant(0.3450166f), f, -0.3980033f);
  const F q67 = L::mad(L::constant(0.20213786f), f, -0.3244516f);
  const F q = L::mad(L::mad(q67, f2, q45), f2 * f2, L::mad(q23, f2, q01));
  return L::sqrt(L::mad(q, f, L::to_float(exponent) * -1.3862944f));  // -2 ln 2 per octave
}

// (cos, sin) of a(x) = 2 pi (x + 1/2) / 2^32.
//
// The nearest quarter turn is in the top bits of x + 2^29. The rest, t in [-1/8, 1/8) turns, is exactly the low 30
// bits read as a signed number; shifted left by two they are an int32, four times as large.
template <class L>
RFT_FN void turn(typename L::I x, typename L::F& cosine, typename L::F& sine) {
  using F = typename L::F;
  using I = typename L::I;
  const F t = L::mad(L::to_float(L::shift_left(x, 2)), L::constant(0x1p-34f), 0x1p-33f);
  const F z = t * t;
  // sin(2 pi t) / t and cos(2 pi t), minimax: 1.5e-9 and 2.8e-8.
  F s = L::constant(-75.264832f);
  s = L::mad(s, z, 81.588852f);
  s = L::mad(s, z, -41.341633f);
  s = L::mad(s, z, 6.283185f);
  s = s * t;
  F c = L::constant(-83.592613f);
  c = L::mad(c, z, 64.92125f);
  c = L::mad(c, z, -19.739153f);
  c = L::mad(c, z, 1.0f);
  const I quarter = L::add(x, 0x20000000);  // top two bits: quarter turns
  const I top = L::constant_int(INT32_MIN);
  // Bit 30: an odd number of quarter turns swaps cosine and sine.
  cosine = L::as_float(L::as_int(L::select_bit30(quarter, s, c)) ^ (L::add(quarter, 0x40000000) & top));
  sine = L::as_float(L::as_int(L::select_bit30(quarter, c, s)) ^ (quarter & top));
}

// Two words to two noise values, in the order of their elements.
template <class L, int NOISE>
RFT_FN void noise_pair(typename L::I xa, typename L::I xb, typename L::F& a, typename L::F& b) {
  if (NOISE == kNormal) {
    turn<L>(xb, a, b);
    const typename L::F r = radius<L>(xa);
    a = a * r;
    b = b * r;
  } else if (NOISE == kUniform) {
    a = L::mad(L::to_float(xa ^ INT32_MIN), L::constant(0x1p-31f), 0x1p-32f);
    b = L::mad(L::to_float(xb ^ INT32_MIN), L::constant(0x1p-31f), 0x1p-32f);
  } else {
    // The sign of the uniform: +1 where the top bit is set.
    a = L::as_float((~xa & INT32_MIN) | 0x3f800000);
    b = L::as_float((~xb & INT32_MIN) | 0x3f800000);
  }
}

template <class L>
RFT_FN typename L::F lerp(const Element& e, typename L::F w0, typename L::F w1) {
  const typename L::F start = e.base ? w1 : w0;
  if (e.k == 0.0f) return start;
  return start + (w1 - w0) * e.k;
}

template <class L>
RFT_FN typename L::F perturbed(const Element& e, typename L::F w, typename L::F eps) {
  if (e.factor == kOne) return w + eps * e.scale;
  if (e.factor == kSquare) return w + w * w * e.scale * eps;
  return w + L::abs(w) * e.scale * eps;
}

// The write. `kept` is all-ones or true where the fine-tuned weight survives the mask.
template <class L, bool NOISY, bool MASKED>
RFT_FN typename L::F element(const Element& e, typename L::F w0, typename L::F w1, typename L::F eps,
                             typename L::M kept) {
  if (MASKED) w1 = L::select(kept, w1, e.fill_zeroshot ? w0 : L::constant(0.0f));
  if (!NOISY) return lerp<L>(e, w0, w1);
  if (e.interpolated) return perturbed<L>(e, lerp<L>(e, w0, w1), eps);
  return lerp<L>(e, w0, perturbed<L>(e, w1, eps));
}

}  // namespace rft
