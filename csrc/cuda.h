// What the CUDA side offers to the bindings. No CUDA header here: the bindings are compiled by the C++ compiler.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cpu.h"

namespace rft {

// The rows of one table, for a device whose memory the caller manages: nothing is allocated or copied there.
// Immutable after construction, so it may be written from several threads and on several streams.
class CudaTable {
 public:
  explicit CudaTable(const std::vector<Row>& rows);
  ~CudaTable();
  CudaTable(const CudaTable&) = delete;
  CudaTable& operator=(const CudaTable&) = delete;

  size_t size() const;            // rows
  size_t bytes() const;           // of the table
  void fill(void* memory) const;  // puts the table into so much memory of the host

  // Launches one kernel per run on `stream` of the device, which must be current, and waits for nothing. memory: the
  // table, on the device, aligned to 16 bytes. Throws std::runtime_error with CUDA's own words, std::invalid_argument
  // where another device is current.
  void write(const void* memory, const Runs& runs, const Element& e, int device, void* stream) const;

 private:
  struct Layout;
  std::unique_ptr<Layout> layout_;
};

// Empty where the kernels of this build run on the device, which must be current, else why they do not.
std::string why_not_cuda(int device);

}  // namespace rft
