// SPDX-License-Identifier: Apache-2.0
// Launches a kernel: every block of the grid, in shuffled order, with shared memory of exact size.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "block.h"

namespace lychee::emulator {

// Exactly as long as asked for, so that AddressSanitizer sees an overrun of one byte.
class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes) {
    if (posix_memalign(&data, 128, bytes ? bytes : 1)) throw std::bad_alloc();
  }
  ~SharedMemory() { std::free(data); }
  SharedMemory(const SharedMemory&) = delete;

  void* data = nullptr;
};

inline std::vector<unsigned> block_order(Block& block, unsigned count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  for (unsigned i = count; options.seed && i > 1; --i) {
    std::swap(order[i - 1], order[block.random() % i]);
  }
  return order;
}

// After a report: fibers that stopped in the middle of a kernel are not to be resumed.
inline void abandon_fibers(Block& block) {
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer does not let a fiber end while it is hidden.
  for (auto& fiber : block.fibers) fiber.release();
#endif
  block.fibers.clear();
}

// What every GPU from sm_80 on can launch; shared memory as on sm_80.
inline void check_limits(dim3 grid, unsigned threads, size_t shared_bytes) {
  constexpr size_t kMaxShared = 163 << 10;
  const auto check = [](bool condition, const char* what, size_t got) {
    if (!condition) throw std::runtime_error(what + std::to_string(got));
  };
  check(threads >= 1 && threads <= 1024, "expected 1 to 1024 threads, got ", threads);
  check(shared_bytes <= kMaxShared, "expected at most 163 KiB of shared memory, got ",
        shared_bytes);
  check(grid.x < 1u << 31, "expected less than 2^31 blocks in x, got ", grid.x);
  check(grid.y < 1u << 16, "expected less than 2^16 blocks in y, got ", grid.y);
  check(grid.z < 1u << 16, "expected less than 2^16 blocks in z, got ", grid.z);
}

// Runs `kernel()` as every thread of the grid; throws std::runtime_error with the block and the
// report where a thread breaks a rule.
template <class Kernel>
void launch(dim3 grid, dim3 threads, size_t shared_bytes, const Kernel& kernel) {
  static thread_local Block block;
  const std::function<void()> body = kernel;
  const SharedMemory shared(shared_bytes);
  block.count = threads.x * threads.y * threads.z;
  check_limits(grid, block.count, shared_bytes);
  block.warps.resize((block.count + 31) / 32);
  block.threads = threads;
  block.grid = grid;
  block.kernel = &body;
  block.random_state = options.seed * 0x9e3779b97f4a7c15ull | 1;
  block.error.clear();
  block.shared = static_cast<unsigned char*>(shared.data);
  block.shared_bytes = shared_bytes;
#if defined(__SANITIZE_THREAD__)
  block.scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
  set_current(&block, nullptr);
  for (unsigned i : block_order(block, grid.x * grid.y * grid.z)) {
    block.index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    run_block(block);
    if (block.error.empty()) continue;
    abandon_fibers(block);
    throw std::runtime_error("block (" + std::to_string(block.index.x) + ", " +
                             std::to_string(block.index.y) + ", " + std::to_string(block.index.z) +
                             "): " + block.error);
  }
}

}  // namespace lychee::emulator
