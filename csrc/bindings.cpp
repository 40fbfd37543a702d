// The module rft_fast._native: raw pointers, sizes and numbers, without torch. The Python side (kernels/native.py)
// has checked tensors and numbers; what could corrupt memory, or is cheap to check, is checked again here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu.h"
#if defined(RFT_CUDA)
#include "cuda.h"
#endif

namespace py = pybind11;

namespace rft {
namespace {

const Isa& find_isa(const std::string& name) {
  if (name.empty()) return usable_isas().back();
  std::string known;
  for (const Isa& isa : usable_isas()) {
    if (name == isa.name) return isa;
    known += std::string(known.empty() ? "" : ", ") + isa.name;
  }
  throw std::invalid_argument("native: instruction set '" + name + "' cannot run here; usable: " + known);
}

// Three addresses, three dtypes, size, first block; for a row with a place also its start, the inner sizes and the
// strides.
using Entry = std::vector<int64_t>;
constexpr size_t kPlain = 8, kPlaced = kPlain + 2 * kDimensions;

std::vector<Row> make_rows(const std::vector<Entry>& entries) {
  std::vector<Row> rows;
  rows.reserve(entries.size());
  for (const Entry& x : entries) {
    if (x.size() != kPlain && x.size() != kPlaced) throw std::invalid_argument("native: a row has 8 or 16 numbers");
    for (int i = 3; i < 6; ++i) {
      if (x[i] < kFloat32 || x[i] > kFloat16) throw std::invalid_argument("native: unknown dtype code");
    }
    const int64_t size = x[6];
    if (size < 0 || (size > 0 && !(x[0] && x[1] && x[2]))) {
      throw std::invalid_argument("native: a row has a null pointer or a negative size");
    }
    Row row = {(void*)x[0], (const void*)x[1], (const void*)x[2], (int)x[3], (int)x[4], (int)x[5], size, (uint64_t)x[7],
               {}};
    if (x.size() == kPlaced) {
      row.place.used = true, row.place.start = (uint64_t)x[kPlain];
      for (int d = 1; d < kDimensions; ++d) {
        row.place.sizes[d - 1] = x[kPlain + d];
        if (row.place.sizes[d - 1] <= 0) throw std::invalid_argument("native: a place has a size that is not positive");
      }
      const auto& inner = row.place.sizes;
      if (size % (inner[0] * inner[1] * inner[2])) throw std::invalid_argument("native: a place has no such size");
      for (int d = 0; d < kDimensions; ++d) row.place.strides[d] = x[kPlain + kDimensions + d];
    }
    rows.push_back(row);
  }
  return rows;
}

void check_elements(const std::vector<Element>& elements, size_t rows) {
  if (elements.size() != 1 && elements.size() != rows) {
    throw std::invalid_argument("native: elements must be one, or one for each row");
  }
  for (const Element& e : elements) {
    if (e.noise < kNoNoise || e.noise > kOperand || (e.noise == kOperand && e.masked)) {
      throw std::invalid_argument("native: unknown noise code");
    }
  }
}

void check_runs(const Runs& runs, size_t rows) {
  for (const auto& run : runs) {
    if (run.first < 0 || run.first > run.second || run.second > (int64_t)rows) {
      throw std::invalid_argument("native: a run lies outside the table");
    }
  }
}

// Immutable after construction, like CudaTable, hence safe to write from several threads.
class Table {
 public:
  explicit Table(const std::vector<Entry>& entries) : rows_(make_rows(entries)) {}

  void write(const Runs& runs, const std::vector<Element>& elements, int threads, const std::string& isa) const {
    check_runs(runs, rows_.size());
    check_elements(elements, rows_.size());
    write_cpu(rows_, runs, elements, threads, find_isa(isa));
  }

  double squares(int factor, int threads, const std::string& isa) const {
    if (factor < kOne || factor > kSquare) throw std::invalid_argument("native: unknown factor code");
    return squares_cpu(rows_, factor, threads, find_isa(isa));
  }

 private:
  std::vector<Row> rows_;
};

Element make_element(int base, float k, int noise, float scale, int factor, bool interpolated, bool masked,
                     uint32_t threshold, bool fill_zeroshot, uint64_t seed, uint32_t draw) {
  return {base,
          k,
          noise,
          scale,
          factor,
          interpolated,
          masked,
          fill_zeroshot,
          threshold,
          (uint32_t)seed,
          (uint32_t)(seed >> 32),
          draw};
}

std::array<uint32_t, 4> philox_words(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key,
                                     const std::string& isa) {
  std::array<uint32_t, 4> words;
  find_isa(isa).philox(counter.data(), key.data(), words.data());
  return words;
}

py::array_t<float> noise_of_words(int kind, py::array_t<uint32_t, py::array::c_style> words, const std::string& isa) {
  if (kind < kNormal || kind > kRademacher) throw std::invalid_argument("native: unknown noise code");
  if (words.size() % kBlock) throw std::invalid_argument("native: words come in blocks of four");
  py::array_t<float> out(words.size());
  find_isa(isa).noise(kind, words.data(), words.size() / kBlock, out.mutable_data());
  return out;
}

PYBIND11_MODULE(_native, m) {
  m.doc() = "The kernels of rft_fast in C++, on raw pointers.";
  m.attr("VERSION") = 5;  // as in kernels/native.py

  py::class_<Element>(m, "Element")
      .def(py::init(&make_element), py::arg("base"), py::arg("k"), py::arg("noise"), py::arg("scale"),
           py::arg("factor"), py::arg("interpolated"), py::arg("masked"), py::arg("threshold"),
           py::arg("fill_zeroshot"), py::arg("seed"), py::arg("draw"));

  py::class_<Table>(m, "Table")
      .def(py::init<const std::vector<Entry>&>())
      .def("write", &Table::write, py::arg("runs"), py::arg("elements"), py::arg("threads"), py::arg("isa") = "",
           py::call_guard<py::gil_scoped_release>())
      .def("squares", &Table::squares, py::arg("factor"), py::arg("threads"), py::arg("isa") = "",
           py::call_guard<py::gil_scoped_release>());

#if defined(RFT_CUDA)
  m.attr("CUDA") = true;
  py::class_<CudaTable>(m, "CudaTable")
      .def(py::init([](const std::vector<Entry>& entries) { return std::make_unique<CudaTable>(make_rows(entries)); }),
           py::arg("entries"))
      .def_property_readonly("bytes", &CudaTable::bytes)
      .def(
          "fill", [](const CudaTable& table, uintptr_t memory) { table.fill((void*)memory); }, py::arg("memory"))
      .def_property_readonly("number_bytes", &CudaTable::number_bytes)
      .def(
          "fill_numbers",
          [](const CudaTable& table, uintptr_t memory, const std::vector<Element>& elements) {
            if (elements.size() != table.size()) throw std::invalid_argument("native: each row needs an element");
            table.fill_numbers((void*)memory, elements);
          },
          py::arg("memory"), py::arg("elements"))
      .def(
          "write",
          [](const CudaTable& table, uintptr_t memory, const Runs& runs, const std::vector<Element>& elements,
             uintptr_t numbers, int device, uintptr_t stream) {
            check_runs(runs, table.size());
            check_elements(elements, table.size());
            if (memory % 16) throw std::invalid_argument("native: the table is not aligned to 16 bytes");
            if (numbers % 16) throw std::invalid_argument("native: the numbers are not aligned to 16 bytes");
            if (elements.size() > 1 && !numbers) throw std::invalid_argument("native: the numbers have no memory");
            table.write((const void*)memory, runs, elements, (const void*)numbers, device, (void*)stream);
          },
          py::arg("memory"), py::arg("runs"), py::arg("elements"), py::arg("numbers"), py::arg("device"),
          py::arg("stream"), py::call_guard<py::gil_scoped_release>());
  m.def("why_not_cuda", &why_not_cuda, "Why the kernels do not run on a device; empty where they do.",
        py::arg("device"));
#else
  m.attr("CUDA") = false;
#endif

  m.def("philox", &philox_words, "One Philox4x32-10 block: counter and key to four words.", py::arg("counter"),
        py::arg("key"), py::arg("isa") = "");
  m.def("noise", &noise_of_words, "Words (uint32, four a block) to noise (float32).", py::arg("kind"), py::arg("words"),
        py::arg("isa") = "");
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const Isa& isa : usable_isas()) names.emplace_back(isa.name);
        return names;
      },
      "Instruction sets that this build has and this machine can run; the last one is used.");
}

}  // namespace
}  // namespace rft
