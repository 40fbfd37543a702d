// What the CUDA side offers to the bindings. No CUDA header here: the bindings are compiled by the C++ compiler.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu.h"

namespace rft {

// The rows of one table, resident on one device. Immutable after construction, so it may be written from several
// threads and on several streams. All functions throw std::runtime_error with CUDA's own words.
class CudaTable {
 public:
  CudaTable(const std::vector<Row>& rows, int device);
  ~CudaTable();
  CudaTable(const CudaTable&) = delete;
  CudaTable& operator=(const CudaTable&) = delete;

  size_t size() const { return first_tile_.size() - 1; }

  // Launches one kernel per run on `stream` and waits for nothing.
  void write(const Runs& runs, const Element& e, void* stream) const;

 private:
  int device_;
  std::vector<int64_t> first_tile_;  // of each row, and behind the last
  void* table_ = nullptr;            // the rows, and behind them each tile's row
  size_t row_bytes_ = 0;
};

// As a table of these rows that is written once, in order with `stream`, and waits for nothing. Not to be captured.
void write_once(const std::vector<Row>& rows, const Element& e, int device, void* stream);

// Empty where the kernels of this build run on the device, else why they do not.
std::string why_not_cuda(int device);

}  // namespace rft
