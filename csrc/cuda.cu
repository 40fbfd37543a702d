// The GPU side's host code: it fills tables, picks the kernel of a request (cuda_kernel.cuh), and launches it.
#include <cuda_runtime.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "cuda.h"
#include "cuda_kernel.cuh"

namespace rft {
namespace {

using Kernel = void(const DeviceRow*, const int32_t*, int64_t, Request);

template <int NOISE, bool MASKED>
Kernel* pick(Form form) {
  constexpr bool kUsual = NOISE == kNoNoise || NOISE == kNormal;
  switch (form) {
    case kNearZeroshot: return write_rows < NOISE, MASKED, kUsual ? kNearZeroshot : kGeneral > ;
    case kNearFinetuned: return write_rows < NOISE, MASKED, kUsual ? kNearFinetuned : kGeneral > ;
    case kFinetuned: return write_rows < NOISE, MASKED, kUsual ? kFinetuned : kGeneral > ;
    case kByRow: return write_rows<NOISE, MASKED, kByRow>;
    default: return write_rows<NOISE, MASKED, kGeneral>;
  }
}

Kernel* pick(int noise, bool masked, Form form) {
  switch (noise) {
    case kNormal: return masked ? pick<kNormal, true>(form) : pick<kNormal, false>(form);
    case kUniform: return masked ? pick<kUniform, true>(form) : pick<kUniform, false>(form);
    case kRademacher: return masked ? pick<kRademacher, true>(form) : pick<kRademacher, false>(form);
    case kOperand: return pick<kOperand, false>(form);
    default: return masked ? pick<kNoNoise, true>(form) : pick<kNoNoise, false>(form);
  }
}

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string("write: CUDA failed while ") + what + ": " + cudaGetErrorString(status));
  }
}

// The caller makes the device current through torch: only torch knows which device its user chose, and switching back
// to a device without a context would create one there, some 0.5 GB (cudaSetDevice does so since CUDA 12).
void check_current(int device) {
  int current = -1;
  check(cudaGetDevice(&current), "asking for the current device");
  if (current != device) {
    throw std::invalid_argument("native: the current device must be cuda:" + std::to_string(device) +
                                ", it is cuda:" + std::to_string(current));
  }
}

Access access_of(const Row& row) {
  bool by_sixteen = true, by_four = true;  // bytes; elements
  const auto look = [&](const void* p, int dtype) {
    by_sixteen &= (uintptr_t)p % 16 == 0;
    by_four &= (uintptr_t)p % (dtype == kFloat32 ? 16 : 8) == 0;
  };
  look(row.out, row.out_dtype), look(row.zeroshot, row.zeroshot_dtype), look(row.finetuned, row.finetuned_dtype);
  if (!by_four) return kSingly;
  if (!by_sixteen || row.out_dtype != row.zeroshot_dtype || row.out_dtype != row.finetuned_dtype) return kByFour;
  return row.out_dtype == kFloat32 ? kAllFloat32 : row.out_dtype == kBFloat16 ? kAllBFloat16 : kAllFloat16;
}

}  // namespace

struct CudaTable::Layout {
  std::vector<DeviceRow> rows;
  std::vector<int32_t> group_row;
  std::vector<int64_t> first_group = {0};  // of each row, and behind the last
  std::vector<Positions> places;           // of each row; empty where none is used

  // In this order.
  size_t row_bytes() const { return rows.size() * sizeof(DeviceRow); }
  size_t place_bytes() const { return places.size() * sizeof(Positions); }
  size_t group_bytes() const { return group_row.size() * sizeof(int32_t); }
};

CudaTable::CudaTable(const std::vector<Row>& rows) : layout_(std::make_unique<Layout>()) {
  auto& [there, group_row, first_group, places] = *layout_;
  bool placed = false;
  for (const Row& row : rows) {
    const Access access = access_of(row);
    const int tiles = tiles_of_block(row.size, access), size = tiles * kTile;
    const int64_t groups = (row.size + size - 1) / size;
    group_row.insert(group_row.end(), groups, (int32_t)there.size());
    there.push_back({row.out, row.zeroshot, row.finetuned, row.size, row.first_block, first_group.back(), row.out_dtype,
                     row.zeroshot_dtype, row.finetuned_dtype, access, (int16_t)tiles});
    first_group.push_back(first_group.back() + groups);
    places.push_back(row.place);
    placed |= row.place.used;
  }
  if (!placed) places.clear();
}

CudaTable::~CudaTable() = default;

size_t CudaTable::size() const { return layout_->rows.size(); }

size_t CudaTable::bytes() const { return layout_->row_bytes() + layout_->place_bytes() + layout_->group_bytes(); }

void CudaTable::fill(void* memory) const {
  char* to = (char*)memory;
  // An empty vector has no address that memcpy may be given.
  const auto put = [&to](const void* from, size_t bytes) {
    if (bytes) std::memcpy(to, from, bytes);
    to += bytes;
  };
  put(layout_->rows.data(), layout_->row_bytes());
  put(layout_->places.data(), layout_->place_bytes());
  put(layout_->group_row.data(), layout_->group_bytes());
}

size_t CudaTable::number_bytes() const { return size() * sizeof(RowNumbers); }

void CudaTable::fill_numbers(void* memory, const std::vector<Element>& elements) const {
  auto* to = (RowNumbers*)memory;
  for (const Element& e : elements) {
    *to++ = {e.k, e.scale, e.threshold,
             (e.base ? kBase : 0) | (e.noise != kNoNoise ? kNoisy : 0) | (e.masked ? kMasked : 0)};
  }
}

void CudaTable::write(const void* memory, const Runs& runs, const std::vector<Element>& elements, const void* numbers,
                      int device, void* stream) const {
  check_current(device);
  Element e = elements[0];
  for (const Element& other : elements) {
    if (other.noise != kNoNoise) e.noise = other.noise;
    e.masked |= other.masked;
  }
  const auto* rows = (const DeviceRow*)memory;
  const auto* places = (const Positions*)((const char*)memory + layout_->row_bytes());
  const auto* group_row = (const int32_t*)((const char*)places + layout_->place_bytes());
  Request request = {e, Keys<Thread>(e.key0, e.key1), elements.size() > 1 ? (const RowNumbers*)numbers : nullptr,
                     layout_->places.empty() ? nullptr : places};
  Kernel* const kernel = pick(e.noise, e.masked, request.numbers || request.places ? kByRow : form_of(e));
  for (const auto& run : runs) {
    int64_t begin = layout_->first_group[run.first];
    const int64_t groups = layout_->first_group[run.second] - begin;
    if (groups == 0) continue;
    void* arguments[] = {&rows, &group_row, &begin, &request};
    check(cudaLaunchKernel(kernel, dim3((unsigned)groups), dim3(kThreads), arguments, 0, (cudaStream_t)stream),
          "launching the kernel");
  }
}

// Querying every kernel loads them all, so that none has to be loaded while a graph is captured.
std::string why_not_cuda(int device) {
  try {
    check_current(device);
    for (int noise : {kNoNoise, kNormal, kUniform, kRademacher, kOperand}) {
      for (bool masked : {false, true}) {
        for (Form form : {kGeneral, kNearZeroshot, kNearFinetuned, kFinetuned, kByRow}) {
          cudaFuncAttributes attributes;
          const cudaError_t status = cudaFuncGetAttributes(&attributes, pick(noise, masked, form));
          if (status == cudaSuccess) continue;
          cudaGetLastError();  // so that the next call does not report this error
          return cudaGetErrorString(status);
        }
      }
    }
    return "";
  } catch (const std::exception& error) {
    cudaGetLastError();
    return error.what();
  }
}

}  // namespace rft
