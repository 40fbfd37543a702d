// The lanes of one CPU instruction set, chosen by the flags of the translation unit that includes this.
//
// Arithmetic, comparisons and bit operations are those of the compilers' vector types (GCC and Clang). Operations
// without an operator use intrinsics, or go lane by lane where there are none (Arm and others).
//
// A word occupies the low half of a 64-bit lane, with garbage above: the 32 x 32 -> 64 bit multiplication reads and
// leaves it there, so that a Philox round needs no shuffles. Lane 2j holds block j and lane 2j + 1 block j + lanes/2;
// in that order `interleave` puts the elements of consecutive blocks next to each other, in every width.
//
// Every lane type is two consecutive vectors: Philox and the polynomials are long chains of dependent instructions,
// and two independent chains keep more of the execution units busy.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "element.h"

namespace rft {
namespace {

#if defined(RFT_AVX512)
constexpr int kBytes = 64;
#elif defined(RFT_AVX2)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float Vf __attribute__((vector_size(kBytes)));
typedef int32_t Vi __attribute__((vector_size(kBytes)));
typedef uint32_t Vu __attribute__((vector_size(kBytes)));
typedef uint64_t Vw __attribute__((vector_size(kBytes)));

template <class V>
struct Two {
  V a, b;
};

// Signed lanes have no +, - and *, whose overflow is undefined: see Lanes::add.
#define RFT_TWO_FLOAT(op)                                                               \
  RFT_FN Two<Vf> operator op(Two<Vf> x, Two<Vf> y) { return {x.a op y.a, x.b op y.b}; } \
  RFT_FN Two<Vf> operator op(Two<Vf> x, float y) { return {x.a op y, x.b op y}; }
#define RFT_TWO_BITS(op)                          \
  template <class V>                              \
  RFT_FN Two<V> operator op(Two<V> x, Two<V> y) { \
    return {x.a op y.a, x.b op y.b};              \
  }                                               \
  RFT_TWO_INT(op)
#define RFT_TWO_INT(op) \
  RFT_FN Two<Vi> operator op(Two<Vi> x, int32_t y) { return {x.a op y, x.b op y}; }
RFT_TWO_FLOAT(+)
RFT_TWO_FLOAT(-)
RFT_TWO_FLOAT(*)
RFT_TWO_BITS(&)
RFT_TWO_BITS(|)
RFT_TWO_BITS(^)
RFT_TWO_INT(>>)
RFT_TWO_INT(==)
RFT_TWO_INT(<)
RFT_FN Two<Vi> operator~(Two<Vi> x) { return {~x.a, ~x.b}; }
#undef RFT_TWO_FLOAT
#undef RFT_TWO_BITS
#undef RFT_TWO_INT

// Operations without an operator, on one vector.

RFT_FN Vw multiply(Vw x, uint32_t m) {
#if defined(RFT_AVX512)
  return (Vw)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(m));
#elif defined(RFT_AVX2)
  return (Vw)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
  return (Vw)_mm_mul_epu32((__m128i)x, _mm_set1_epi64x(m));
#else
  return (x & 0xffffffffu) * m;
#endif
}

// The words of two W as 32-bit lanes: x0 y0 x1 y1 ...
RFT_FN Vi pack(Vw x, Vw y) {
#if defined(RFT_AVX512)
  return (Vi)_mm512_mask_blend_epi32(0xAAAA, (__m512i)x, (__m512i)(y << 32));
#elif defined(RFT_AVX2)
  return (Vi)_mm256_blend_epi32((__m256i)x, (__m256i)(y << 32), 0xAA);
#else
  return (Vi)((x & 0xffffffffu) | (y << 32));
#endif
}

RFT_FN Vf unpack_low(Vf x, Vf y) {
#if defined(RFT_AVX512)
  return (Vf)_mm512_unpacklo_ps((__m512)x, (__m512)y);
#elif defined(RFT_AVX2)
  return (Vf)_mm256_unpacklo_ps((__m256)x, (__m256)y);
#elif defined(__SSE2__)
  return (Vf)_mm_unpacklo_ps((__m128)x, (__m128)y);
#else
  return Vf{x[0], y[0], x[1], y[1]};
#endif
}

RFT_FN Vf unpack_high(Vf x, Vf y) {
#if defined(RFT_AVX512)
  return (Vf)_mm512_unpackhi_ps((__m512)x, (__m512)y);
#elif defined(RFT_AVX2)
  return (Vf)_mm256_unpackhi_ps((__m256)x, (__m256)y);
#elif defined(__SSE2__)
  return (Vf)_mm_unpackhi_ps((__m128)x, (__m128)y);
#else
  return Vf{x[2], y[2], x[3], y[3]};
#endif
}

RFT_FN Vf to_float(Vi x) {
#if defined(RFT_AVX512)
  return (Vf)_mm512_cvtepi32_ps((__m512i)x);
#elif defined(RFT_AVX2)
  return (Vf)_mm256_cvtepi32_ps((__m256i)x);
#elif defined(__SSE2__)
  return (Vf)_mm_cvtepi32_ps((__m128i)x);
#else
  return Vf{(float)x[0], (float)x[1], (float)x[2], (float)x[3]};
#endif
}

RFT_FN Vf square_root(Vf x) {
#if defined(RFT_AVX512)
  return (Vf)_mm512_sqrt_ps((__m512)x);
#elif defined(RFT_AVX2)
  return (Vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__SSE2__)
  return (Vf)_mm_sqrt_ps((__m128)x);
#else
  return Vf{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
#endif
}

struct Lanes {
  using F = Two<Vf>;
  using I = Two<Vi>;
  using W = Two<Vw>;
  using M = I;

  static constexpr int kVector = kBytes / 4;          // float32 elements of a vector
  static constexpr int kBlocks = kBytes / 4;          // blocks in a W
  static constexpr int kElements = kBlocks * kBlock;  // elements of a step: two F

  static RFT_FN F constant(float x) { return {Vf{} + x, Vf{} + x}; }
  static RFT_FN I constant_int(int32_t x) { return {Vi{} + x, Vi{} + x}; }
  static RFT_FN W word(uint32_t x) { return {Vw{} + x, Vw{} + x}; }
  static RFT_FN F as_float(I x) { return {(Vf)x.a, (Vf)x.b}; }
  static RFT_FN I as_int(F x) { return {(Vi)x.a, (Vi)x.b}; }
  static RFT_FN I add(I x, int32_t y) { return {(Vi)((Vu)x.a + (uint32_t)y), (Vi)((Vu)x.b + (uint32_t)y)}; }
  static RFT_FN I shift_left(I x, int bits) { return {(Vi)((Vu)x.a << bits), (Vi)((Vu)x.b << bits)}; }
  static RFT_FN F abs(F x) { return as_float(as_int(x) & 0x7fffffff); }
  static RFT_FN F mad(F x, F y, float z) { return x * y + z; }
  static RFT_FN F mad(F x, F y, F z) { return x * y + z; }
  static RFT_FN F select(I mask, F yes, F no) { return {mask.a ? yes.a : no.a, mask.b ? yes.b : no.b}; }
  static RFT_FN F select_bit30(I bits, F yes, F no) { return select(shift_left(bits, 1) < 0, yes, no); }
  static RFT_FN F add_one_below_zero(F x, I sign) { return x + as_float((sign >> 31) & 0x3f800000); }
  static RFT_FN F to_float(I x) { return {rft::to_float(x.a), rft::to_float(x.b)}; }
  static RFT_FN F sqrt(F x) { return {square_root(x.a), square_root(x.b)}; }
  static RFT_FN I pack(W x, W y) { return {rft::pack(x.a, y.a), rft::pack(x.b, y.b)}; }

  static RFT_FN void multiply(W x, uint32_t m, W& hi, W& lo) {
    lo = {rft::multiply(x.a, m), rft::multiply(x.b, m)};
    hi = {lo.a >> 32, lo.b >> 32};
  }

  static RFT_FN F load(const float* p) {
    F x;
    std::memcpy(&x.a, p, kBytes);
    std::memcpy(&x.b, p + kVector, kBytes);
    return x;
  }
  static RFT_FN void store(float* p, F x) {
    std::memcpy(p, &x.a, kBytes);
    std::memcpy(p + kVector, &x.b, kBytes);
  }

  // Stores past the caches; p is aligned to kBytes. `flush` orders these stores before later ones.
  static RFT_FN void stream(float* p, F x) {
#if defined(RFT_AVX512)
    _mm512_stream_ps(p, (__m512)x.a);
    _mm512_stream_ps(p + kVector, (__m512)x.b);
#elif defined(RFT_AVX2)
    _mm256_stream_ps(p, (__m256)x.a);
    _mm256_stream_ps(p + kVector, (__m256)x.b);
#elif defined(__SSE2__)
    _mm_stream_ps(p, (__m128)x.a);
    _mm_stream_ps(p + kVector, (__m128)x.b);
#else
    store(p, x);
#endif
  }
  static RFT_FN void flush() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
  }

  // The blocks first .. first + kBlocks - 1 in the order described above.
  static RFT_FN W blocks(uint64_t first) {
    constexpr int kHalf = kBlocks / 2;
    Vw lane;
    for (int j = 0; j < kHalf; ++j) lane[j] = j / 2 + (j % 2) * (kHalf / 2);
    return {lane + first, lane + first + kHalf};
  }
  // The same of any blocks: block i at slot(i). Only their low words are used.
  static RFT_FN W gather(const uint64_t* blocks) {
    W x;
    std::memcpy(&x.a, blocks, kBytes);
    std::memcpy(&x.b, blocks + kBlocks / 2, kBytes);
    return x;
  }
  static RFT_FN int slot(int i) {
    constexpr int kHalf = kBlocks / 2;
    const int own = i % kHalf;
    return i - own + own % (kHalf / 2) * 2 + own / (kHalf / 2);
  }
  static RFT_FN W next_blocks(W x) { return {x.a + kBlocks, x.b + kBlocks}; }

  // From the first and second element of every pair to consecutive elements.
  static RFT_FN void interleave(F x, F y, F& low, F& high) {
    low = {unpack_low(x.a, y.a), unpack_high(x.a, y.a)};
    high = {unpack_low(x.b, y.b), unpack_high(x.b, y.b)};
  }
};

}  // namespace
}  // namespace rft
