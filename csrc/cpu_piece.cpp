// Writes elements [start, stop) of one row with one instruction set. Compiled once per set, with its own flags and
// RFT_AVX512, RFT_AVX2 or neither. Everything but the `Isa` is local, so that the linker cannot put a function built
// for a newer set in the place of one for an older set.
#include <cstring>

#include "cpu.h"
#include "cpu_lanes.h"

namespace rft {
namespace {

// 16-bit types pass through float buffers of this many elements, which fit into the first-level cache.
constexpr int64_t kTile = 1024;

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

// n elements at a time go through three short loops: random words, noise from words, the formula. One long loop would
// be bound by the latency of its dependent chain; of a short loop several iterations are in flight at once.
constexpr int kSteps = kTile / Lanes::kElements;

// The blocks of a tile: consecutive, or a list of them. The high word is the same for all, see cut() and gather().
struct Consecutive {
  uint64_t block;
  uint32_t high() const { return (uint32_t)(block >> 32); }
  Lanes::W first() const { return Lanes::blocks(block); }
  Lanes::W next(Lanes::W x, int) const { return Lanes::next_blocks(x); }
};

struct Gathered {
  const uint64_t* blocks;  // one step more than is used
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

// Up to kTile elements whose noise lies anywhere: the blocks that they need, each once where neighbours share it.
struct Scattered {
  static constexpr int kMost = kTile / kBlock;
  uint64_t blocks[kMost + Lanes::kBlocks] = {};
  int16_t from[kTile];  // where an element's noise lies in that of the blocks
  int steps = 0;

  // Takes elements [start, stop) until the blocks are full or their high word changes; returns where it ended.
  int64_t take(const Row& row, int64_t start, int64_t stop) {
    const Positions& place = row.place;
    const int64_t inner = place.sizes[kDimensions - 2], step = place.strides[kDimensions - 1];
    int64_t i = start, left = 0;
    int count = 0;
    for (uint64_t at = 0; i < stop && i < start + kTile; ++i, at += step, --left) {
      if (left == 0) at = position(place, i), left = inner - i % inner;  // a new stretch of the inner dimension
      const uint64_t block = row.first_block + at / kBlock;
      if (count == 0 || blocks[count - 1] != block) {
        if (count == kMost || (count && (block >> 32) != (blocks[0] >> 32))) break;
        blocks[count++] = block;
      }
      from[i - start] = (int16_t)((count - 1) * kBlock + at % kBlock);
    }
    steps = (count + Lanes::kBlocks - 1) / Lanes::kBlocks;
    return i;
  }
};

template <int NOISE, bool MASKED>
void span_at(float* out, const float* w0, const float* w1, int64_t n, const Scattered& places, const Element& e) {
  using L = Lanes;
  constexpr int64_t kLanes = L::kElements / 2;
  float tile[kTile], eps[kTile] = {}, kept[kTile] = {};
  if (is_random(NOISE)) {
    noise_tile<NOISE>(tile, places.steps, Gathered{places.blocks}, e);
    for (int64_t i = 0; i < n; ++i) eps[i] = tile[places.from[i]];
  }
  if (MASKED) {
    mask_tile(tile, places.steps, Gathered{places.blocks}, e);
    for (int64_t i = 0; i < n; ++i) std::memcpy(kept + i, tile + places.from[i], sizeof(float));  // bits, not numbers
  }
  // All of a tile has memory: w0, w1 and out have kTile elements.
  formula<NOISE != kNoNoise, MASKED, false>(out, w0, w1, eps, kept, (n + kLanes - 1) / kLanes * kLanes, e);
}

using SpanAt = void (*)(float*, const float*, const float*, int64_t, const Scattered&, const Element&);

template <int NOISE>
SpanAt pick_span_at(bool masked) {
  return masked ? span_at<NOISE, true> : span_at<NOISE, false>;
}

SpanAt pick_span_at(const Element& e) {
  switch (e.noise) {
    case kNormal: return pick_span_at<kNormal>(e.masked);
    case kUniform: return pick_span_at<kUniform>(e.masked);
    case kRademacher: return pick_span_at<kRademacher>(e.masked);
    default: return pick_span_at<kNoNoise>(e.masked);
  }
}

void piece(const Row& row, int64_t start, int64_t stop, const Element& e, bool past_caches) {
  const Span span = pick_span(e);
  // An end that is not needed is not read: its lanes load the other end, which is in the cache anyway.
  const bool use0 = e.needs_zeroshot(), use1 = e.needs_finetuned();
  const void* p0 = use0 ? row.zeroshot : row.finetuned;
  const void* p1 = use1 ? row.finetuned : row.zeroshot;
  const int d0 = use0 ? row.zeroshot_dtype : row.finetuned_dtype;
  const int d1 = use1 ? row.finetuned_dtype : row.zeroshot_dtype;
  const uint64_t block = row.first_block + start / kBlock;
  const bool scattered = row.place.used && (is_random(e.noise) || e.masked);
  if (!scattered && d0 == kFloat32 && d1 == kFloat32 && row.out_dtype == kFloat32) {
    float* out = (float*)row.out + start;
    const bool stream = past_caches && row.out != p0 && row.out != p1 && (uintptr_t)out % kBytes == 0;
    span(out, (const float*)p0 + start, (const float*)p1 + start, stop - start, block, e, stream);
    if (stream) Lanes::flush();
    return;
  }
  float w0[kTile], w1[kTile], out[kTile];
  if (scattered) {
    std::memset(w0, 0, sizeof w0), std::memset(w1, 0, sizeof w1);  // the formula goes beyond the last element
    Scattered places;
    const SpanAt span = pick_span_at(e);
    for (int64_t i = start, end; i < stop; i = end) {
      end = places.take(row, i, stop);
      load(w0, p0, d0, i, end - i);
      load(w1, p1, d1, i, end - i);
      span(out, w0, w1, end - i, places, e);
      store(row.out, row.out_dtype, i, out, end - i);
    }
    return;
  }
  for (int64_t i = start; i < stop; i += kTile) {
    const int64_t n = stop - i < kTile ? stop - i : kTile;
    load(w0, p0, d0, i, n);
    load(w1, p1, d1, i, n);
    span(out, w0, w1, n, block + (i - start) / kBlock, e, false);
    store(row.out, row.out_dtype, i, out, n);
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
extern const Isa kAvx512 = {"avx512", piece, philox_once, noise};
#elif defined(RFT_AVX2)
extern const Isa kAvx2 = {"avx2", piece, philox_once, noise};
#else
extern const Isa kBaseline = {"baseline", piece, philox_once, noise};
#endif

}  // namespace rft
