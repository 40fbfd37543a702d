// The CPU side: the instruction sets of this machine, and how a write is divided among threads.
#include "cpu.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>

#include "cpu_grid.h"

#if defined(__SSE2__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace rft {
namespace {

// Elements that a thread takes at a time: enough that taking a piece costs nothing, few enough that threads finish
// together. A multiple of kBlock.
constexpr int64_t kPiece = 1 << 16;

// With fewer elements a thread costs more than it saves: starting one takes some 20 microseconds.
constexpr int64_t kThreadWorth = 1 << 16;

// From this many elements on (128 MB of float32), a write is assumed to exceed the last-level cache.
constexpr int64_t kPastCaches = 1 << 25;

struct Task {
  const Row* row;
  const Element* element;
  int64_t start, stop;
  bool tiles;  // start and stop count tiles of the row's grid instead of elements
};

// Whether the row is written by tiles of its grid. Without random numbers their order does not matter.
bool by_tiles(const Row& row, const Element& e) { return row.place.used && (is_random(e.noise) || e.masked); }

void cut(std::vector<Task>& tasks, const Row& row, const Element& element) {
  if (by_tiles(row, element)) {
    const int64_t tiles = Grid(row).tiles, most = kPiece / kTile;
    for (int64_t start = 0; start < tiles; start += most) {
      tasks.push_back({&row, &element, start, std::min(start + most, tiles), true});
    }
    return;
  }
  for (int64_t start = 0, stop; start < row.size; start = stop) {
    stop = std::min(start + kPiece, row.size);
    // Within a piece the high word of the block number stays the same.
    const uint64_t block = row.first_block + start / kBlock;
    const uint64_t left = (((block >> 32) + 1) << 32) - block;
    if (left < (uint64_t)kPiece / kBlock) stop = std::min(stop, start + (int64_t)left * kBlock);
    tasks.push_back({&row, &element, start, stop, false});
  }
}

// IEEE rounding with subnormals, whatever the calling thread has set (torch.set_flush_denormal).
class IeeeMode {
 public:
  IeeeMode() : saved_(get()) { set(kDefault); }
  ~IeeeMode() { set(saved_); }

 private:
#if defined(__SSE2__)
  using Register = unsigned;
  static constexpr Register kDefault = 0x1f80;
  static Register get() { return _mm_getcsr(); }
  static void set(Register mode) { _mm_setcsr(mode); }
#elif defined(__aarch64__)
  using Register = uint64_t;
  static constexpr Register kDefault = 0;
  static Register get() {
    Register mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(Register mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
  using Register = int;
  static constexpr Register kDefault = 0;
  static Register get() { return 0; }
  static void set(Register) {}
#endif
  Register saved_;
};

#if defined(RFT_X86)
bool has_f16c() {  // Clang's __builtin_cpu_supports does not know it
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

std::vector<Isa> find_isas() {
  std::vector<Isa> isas = {kBaseline};
#if defined(RFT_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && has_f16c()) {
    isas.push_back(kAvx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) isas.push_back(kAvx512);
  }
#endif
  return isas;
}

// Calls work(i) for every i below `count`, on as many threads as `size` elements are worth.
template <class Work>
void share(size_t count, int64_t size, int threads, const Work& work) {
  const int64_t useful = std::min<int64_t>(size / kThreadWorth, (int64_t)count);
  const int helpers = (int)std::max<int64_t>(0, std::min<int64_t>(threads, useful) - 1);
  std::atomic<size_t> next{0};
  const auto take = [&] {
    const IeeeMode mode;
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
  };
  std::vector<std::thread> pool;
  try {
    pool.reserve(helpers);
    for (int i = 0; i < helpers; ++i) pool.emplace_back(take);
  } catch (const std::exception&) {
    // The system grants no more threads: those that started, and this one, do all the work.
  }
  take();
  for (std::thread& thread : pool) thread.join();
}

}  // namespace

const std::vector<Isa>& usable_isas() {
  // Found once: in a virtual machine cpuid takes longer than the write of a small layer.
  static const std::vector<Isa> isas = find_isas();
  return isas;
}

void write_cpu(const std::vector<Row>& rows, const Runs& runs, const std::vector<Element>& elements, int threads,
               const Isa& isa) {
  std::vector<Task> tasks;
  int64_t size = 0;
  for (const auto& run : runs) {
    for (int64_t r = run.first; r < run.second; ++r) {
      cut(tasks, rows[r], elements[elements.size() == 1 ? 0 : r]);
      size += rows[r].size;
    }
  }
  share(tasks.size(), size, threads, [&](size_t i) {
    const Task& task = tasks[i];
    if (task.tiles) {
      isa.tiles(*task.row, task.start, task.stop, *task.element);
    } else {
      isa.piece(*task.row, task.start, task.stop, *task.element, size >= kPastCaches);
    }
  });
}

double squares_cpu(const std::vector<Row>& rows, int factor, int threads, const Isa& isa) {
  std::vector<Task> tasks;
  int64_t size = 0;
  for (const Row& row : rows) {
    for (int64_t start = 0; start < row.size; start += kPiece) {
      tasks.push_back({&row, nullptr, start, std::min(start + kPiece, row.size), false});
    }
    size += row.size;
  }
  std::vector<double> sums(tasks.size());
  share(tasks.size(), size, threads,
        [&](size_t i) { sums[i] = isa.squares(*tasks[i].row, tasks[i].start, tasks[i].stop, factor); });
  double sum = 0;
  for (double own : sums) sum += own;
  return sum;
}

}  // namespace rft
