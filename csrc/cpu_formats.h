// Storage types to float32 and back, for the instruction set of the translation unit that includes this.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu_grid.h"
#include "cpu_lanes.h"

namespace rft {
namespace {

RFT_FN uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

RFT_FN float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

RFT_FN uint16_t to_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Half precision without hardware support; the bits equal those of the hardware.
RFT_FN float from_float16(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) {  // infinity, or NaN (made quiet)
    return float_of(sign | 0x7f800000u | ((rest & 0x3ffu) << 13) | (rest > 0x7c00u ? 0x400000u : 0u));
  }
  if (rest < 0x400u) return float_of(sign | bits_of((float)rest * 0x1p-24f));  // zero and subnormals
  return float_of(sign | ((rest << 13) + (112u << 23)));
}

RFT_FN uint16_t to_float16(float x) {
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((rest >> 13) & 0x3ffu));
  if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // 65520 and beyond round to infinity
  if (rest < 0x38800000u) {
    // Below 2^-14: adding 1/2 leaves the subnormal's bits, rounded to nearest even, in the low mantissa.
    return (uint16_t)(sign | (bits_of(float_of(rest) + 0.5f) - 0x3f000000u));
  }
  return (uint16_t)(sign | ((rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13));
}

// At most kTile elements.
void load(float* to, const void* from, int dtype, int64_t first, int64_t n) {
  if (dtype == kFloat32) {
    std::memcpy(to, (const char*)from + 4 * first, 4 * n);
    return;
  }
  uint16_t half[kTile];
  std::memcpy(half, (const char*)from + 2 * first, 2 * n);
  if (dtype == kBFloat16) {
    for (int64_t i = 0; i < n; ++i) to[i] = float_of((uint32_t)half[i] << 16);
    return;
  }
  int64_t i = 0;
#if defined(RFT_AVX512)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(half + i))));
#elif defined(RFT_AVX2)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(half + i))));
#endif
  for (; i < n; ++i) to[i] = from_float16(half[i]);
}

void store(void* to, int dtype, int64_t first, const float* from, int64_t n) {
  if (dtype == kFloat32) {
    std::memcpy((char*)to + 4 * first, from, 4 * n);
    return;
  }
  uint16_t half[kTile];
  if (dtype == kBFloat16) {
    for (int64_t i = 0; i < n; ++i) half[i] = to_bfloat16(from[i]);
  } else {
    int64_t i = 0;
#if defined(RFT_AVX512)
    for (; i + 16 <= n; i += 16)
      _mm256_storeu_si256((__m256i*)(half + i), _mm512_cvtps_ph(_mm512_loadu_ps(from + i), 0));
#elif defined(RFT_AVX2)
    for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(half + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
    for (; i < n; ++i) half[i] = to_float16(from[i]);
  }
  std::memcpy((char*)to + 2 * first, half, 2 * n);
}

}  // namespace
}  // namespace rft
