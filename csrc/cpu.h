// What the CPU side offers to the bindings, and what its instruction-set builds offer to it.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "element.h"

namespace rft {

// One entry of a table, as kernels/rows.py checked it.
struct Row {
  void* out;
  const void* zeroshot;
  const void* finetuned;
  int out_dtype, zeroshot_dtype, finetuned_dtype;  // Dtype
  int64_t size;                                    // elements
  uint64_t first_block;                            // where the row's noise starts
  Positions place;
};

using Runs = std::vector<std::pair<int64_t, int64_t>>;  // half-open ranges of rows

// What one instruction set offers; all give the same bits.
struct Isa {
  const char* name;
  // Writes elements [start, stop) of a row; start is a multiple of kBlock. past_caches: the write is larger than the
  // caches, so that storing around them saves reading lines that are about to be overwritten.
  void (*piece)(const Row& row, int64_t start, int64_t stop, const Element& e, bool past_caches);
  // Writes tiles [start, stop) of the grid of a row with a place (cpu_grid.h).
  void (*tiles)(const Row& row, int64_t start, int64_t stop, const Element& e);
  // Returns the sum of (factor(w) b)^2 over elements [start, stop), in float64: b the zero-shot end, w the other.
  double (*squares)(const Row& row, int64_t start, int64_t stop, int factor);
  // For tests against known answers and float64: Philox alone, and noise from `blocks` times four words.
  void (*philox)(const uint32_t counter[4], const uint32_t key[2], uint32_t words[4]);
  void (*noise)(int kind, const uint32_t* words, int64_t blocks, float* out);
};

extern const Isa kBaseline;
#if defined(RFT_X86)
extern const Isa kAvx2, kAvx512;
#endif

// The instruction sets of this build that run on this machine, the fastest last.
const std::vector<Isa>& usable_isas();

// elements: one for all rows, or one for each.
void write_cpu(const std::vector<Row>& rows, const Runs& runs, const std::vector<Element>& elements, int threads,
               const Isa& isa);

// The sum of squares of all rows. The same bits with any number of threads.
double squares_cpu(const std::vector<Row>& rows, int factor, int threads, const Isa& isa);

}  // namespace rft
