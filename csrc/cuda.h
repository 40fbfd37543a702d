// What the CUDA side offers to the bindings. No CUDA header here: the bindings are compiled by the C++ compiler.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu.h"

namespace rft {

// The rows of one table. The caller manages the device's memory: nothing is allocated or copied here. Immutable after
// construction, so that several threads and streams may write it.
class CudaTable {
 public:
  explicit CudaTable(const std::vector<Row>& rows);
  ~CudaTable();
  CudaTable(const CudaTable&) = delete;
  CudaTable& operator=(const CudaTable&) = delete;

  size_t size() const;            // rows
  size_t bytes() const;           // of the table
  void fill(void* memory) const;  // writes the table to host memory of that size

  // The numbers of each row, where they differ, as they lie on the device.
  size_t number_bytes() const;
  void fill_numbers(void* memory, const std::vector<Element>& elements) const;

  // Launches one kernel per run on `stream` of the device, which must be current, and waits for nothing. memory: the
  // table on the device; elements: one for all rows, or one for each, whose numbers then lie on the device, too; both
  // aligned to 16 bytes. Throws std::runtime_error with CUDA's message, and std::invalid_argument when another device
  // is current.
  void write(const void* memory, const Runs& runs, const std::vector<Element>& elements, const void* numbers,
             int device, void* stream) const;

 private:
  struct Layout;
  std::unique_ptr<Layout> layout_;
};

// Why the kernels of this build do not run on the device, which must be current; empty where they do.
std::string why_not_cuda(int device);

}  // namespace rft
