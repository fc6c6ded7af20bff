// SPDX-License-Identifier: Apache-2.0
// Scratch memory of the kernels, and the loop of threads that each own a part of it.
#include "cpu/scratch.h"

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <string>

#include "check.h"
#include "huge_pages.h"

namespace lychee {

FloatBuffer allocate_floats(int64_t count, const char* op) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  float* data = static_cast<float*>(std::aligned_alloc(64, bytes));
  check(data != nullptr, op, "scratch", std::to_string(bytes) + " bytes", "none: out of memory");
  prefer_huge_pages(data, bytes);
  return FloatBuffer(data, &std::free);
}

void for_each_item(int64_t items, int64_t scratch_floats, const char* op,
                   const std::function<void(int64_t, float*)>& fn) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = threads < items ? threads : items;
  const int64_t stride = (scratch_floats + 15) / 16 * 16;
  const FloatBuffer buffers = allocate_floats(workers * stride, op);
  std::atomic<int64_t> next{items};
  std::atomic<int64_t> worker{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    float* scratch = buffers.get() + worker.fetch_add(1) * stride;
    for (int64_t item = next.fetch_sub(1) - 1; item >= 0; item = next.fetch_sub(1) - 1) {
      fn(item, scratch);
    }
  });
}

}  // namespace lychee
