// SPDX-License-Identifier: Apache-2.0
// Zeroed memory of any size; only pages that are touched take room.
#pragma once

#include <sys/mman.h>

#include <cstdint>

#include "harness.h"

namespace lychee::emulator {

class SparseMemory {
 public:
  explicit SparseMemory(int64_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    expect(data_ != MAP_FAILED, "address space");
  }
  SparseMemory(const SparseMemory&) = delete;
  ~SparseMemory() { munmap(data_, bytes_); }

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  int64_t bytes_;
  void* data_;
};

}  // namespace lychee::emulator
