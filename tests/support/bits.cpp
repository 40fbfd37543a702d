// The bits that csrc/ writes on the CPU that this is compiled for: Philox's known answers, a hash of every kind of
// noise, and one of every kind of write. test_other_cpus.py compares them between CPUs.
#include <cstdio>
#include <vector>

#include "cpu.h"

namespace {

uint64_t hash(const void* data, size_t bytes) {  // FNV-1a
  uint64_t h = 0xcbf29ce484222325u;
  for (size_t i = 0; i < bytes; ++i) h = (h ^ ((const unsigned char*)data)[i]) * 0x100000001b3u;
  return h;
}

// Patterns of bits: odd and even, NaN, infinite, subnormal and negative numbers among them.
std::vector<uint32_t> patterns(size_t n, uint32_t seed) {
  std::vector<uint32_t> found(n);
  for (uint32_t& x : found) x = seed = seed * 1664525u + 1013904223u;
  return found;
}

// The same with the exponents of weights, where noise and interpolation round.
void tame(std::vector<uint32_t>& bits, int dtype) {
  for (size_t i = 0; i < bits.size(); i += 2) {
    if (dtype == rft::kFloat32) bits[i] = (bits[i] & 0x83ffffffu) | 0x3c000000u;
    if (dtype == rft::kBFloat16) bits[i] = (bits[i] & 0x83ff83ffu) | 0x3c003c00u;
    if (dtype == rft::kFloat16) bits[i] = (bits[i] & 0x9fff9fffu) | 0x20002000u;
  }
}

// NaN without its payload, which no contract names and which CPUs choose differently.
void settle(std::vector<uint32_t>& bits, int dtype) {
  const uint32_t infinity = dtype == rft::kBFloat16 ? 0x7f80u : 0x7c00u;
  for (uint32_t& x : bits) {
    if (dtype == rft::kFloat32) {
      if ((x & 0x7fffffffu) > 0x7f800000u) x = 0x7fc00000u;
      continue;
    }
    uint32_t low = x & 0xffffu, high = x >> 16;
    if ((low & 0x7fffu) > infinity) low = 0x7fffu;
    if ((high & 0x7fffu) > infinity) high = 0x7fffu;
    x = low | high << 16;
  }
}

void write(int dtype, const rft::Element& e, bool placed, const rft::Isa& isa) {
  const int64_t n = 2 * (70001 / 2);  // several pieces, and a tail
  const size_t words = dtype == rft::kFloat32 ? n : n / 2;
  std::vector<uint32_t> zeroshot = patterns(words, 1), finetuned = patterns(words, 2), out(words);
  tame(zeroshot, dtype), tame(finetuned, dtype);
  rft::Row row = {out.data(), zeroshot.data(), finetuned.data(), dtype, dtype, dtype, n, 5, {}};
  if (placed) row.place = {true, 3, {1, 1, 2}, {7, 1, 1, n}};
  rft::write_cpu({row}, {{0, 1}}, {e}, 3, isa);
  settle(out, dtype);
  std::printf("write dtype=%d noise=%d base=%d k=%g factor=%d interpolated=%d masked=%d fill=%d placed=%d %016llx\n",
              dtype, e.noise, e.base, e.k, e.factor, e.interpolated, e.masked, e.fill_zeroshot, placed,
              (unsigned long long)hash(out.data(), 4 * out.size()));
}

}  // namespace

int main() {
  const rft::Isa& isa = rft::usable_isas().front();
  const uint32_t counters[3][4] = {
      {0, 0, 0, 0}, {~0u, ~0u, ~0u, ~0u}, {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}};
  const uint32_t keys[3][2] = {{0, 0}, {~0u, ~0u}, {0xa4093822, 0x299f31d0}};
  for (int i = 0; i < 3; ++i) {
    uint32_t x[4];
    isa.philox(counters[i], keys[i], x);
    std::printf("philox %08x %08x %08x %08x\n", x[0], x[1], x[2], x[3]);
  }
  const int64_t blocks = 1 << 18;
  const std::vector<uint32_t> random = patterns(4 * blocks, 3);
  std::vector<float> noise(4 * blocks);
  for (int kind = rft::kNormal; kind <= rft::kRademacher; ++kind) {
    isa.noise(kind, random.data(), blocks, noise.data());
    std::printf("noise=%d %016llx\n", kind, (unsigned long long)hash(noise.data(), 4 * noise.size()));
  }
  for (int dtype = rft::kFloat32; dtype <= rft::kFloat16; ++dtype) {
    for (int kind = rft::kNoNoise; kind <= rft::kOperand; ++kind) {
      for (int how = 0; how < 16; ++how) {
        const bool masked = how & 1, placed = how & 8;
        if (kind == rft::kOperand && (masked || placed)) continue;
        rft::Element e = {how & 2 ? 1 : 0, how & 4 ? -0.3f : 0.3f, kind,        0.7f,  how % 3, (how & 2) != 0,
                          masked,          (how & 4) != 0,         0x80000000u, 12345, 678,     9};
        write(dtype, e, placed, isa);
      }
    }
  }
}
