// SPDX-License-Identifier: Apache-2.0
// Memory of large outputs, kept for the next call. The C library gives blocks of this size back to
// the system at once, and the page faults of a fresh one take several times as long as filling it:
// 17 ms against 4 for the 35 MiB of 2560 rows of 28 heads of 128 in float32.
#pragma once

#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "stable.h"

// In torch 2.11 and later. Weak: the library also loads into torch 2.10, which keeps nothing.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* tensor,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace lychee {

// From here on glibc maps each allocation by itself.
constexpr size_t kReusedBytes = 32 << 20;

class OutputMemory {
 public:
  // A block of at least `bytes`, at a multiple of 64, and its real size.
  std::pair<void*, size_t> take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      auto best = free_.end();
      for (auto it = free_.begin(); it != free_.end(); ++it) {
        const bool fits = it->second >= bytes && it->second / 2 <= bytes;
        if (fits && (best == free_.end() || it->second < best->second)) best = it;
      }
      if (best != free_.end()) {
        const auto block = *best;
        free_.erase(best);
        return block;
      }
    }
    bytes = (bytes + 63) / 64 * 64;
    void* data = std::aligned_alloc(64, bytes);
    if (data == nullptr) throw std::bad_alloc();
    return {data, bytes};
  }

  void give_back(void* data, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.emplace_back(data, bytes);
    size_t total = 0;
    for (const auto& block : free_) total += block.second;
    while (total > kMostBytes || free_.size() > kMostBlocks) {
      total -= free_.front().second;
      std::free(free_.front().first);
      free_.erase(free_.begin());
    }
  }

  // Never destroyed: tensors may outlive every static object.
  static OutputMemory& instance() {
    static auto* memory = new OutputMemory;
    return *memory;
  }

 private:
  static constexpr size_t kMostBytes = 512 << 20, kMostBlocks = 4;
  std::mutex mutex_;
  std::vector<std::pair<void*, size_t>> free_;  // oldest first
};

// new_output(), from kept memory where the tensor is large.
inline torch::stable::Tensor new_large_output(const std::vector<int64_t>& sizes,
                                              torch::headeronly::ScalarType dtype) {
  size_t bytes = dtype == torch::headeronly::ScalarType::Float ? 4 : 2;
  std::vector<int64_t> strides(sizes.size());
  int64_t numel = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = numel;
    numel *= sizes[i];
  }
  bytes *= numel;
  if (bytes < kReusedBytes || torch_from_blob == nullptr) return new_output(sizes, dtype);
  const auto [data, size] = OutputMemory::instance().take(bytes);
  const auto give_back = [](void* block, void* context) {
    OutputMemory::instance().give_back(block, reinterpret_cast<size_t>(context));
  };
  const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_from_blob(data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0,
                      type, aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
                      nullptr, 0, give_back, reinterpret_cast<void*>(size)));
  if (poison_outputs()) std::memset(data, 0xFF, bytes);
  return torch::stable::Tensor(handle);
}

}  // namespace lychee
