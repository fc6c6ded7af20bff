// SPDX-License-Identifier: Apache-2.0
// Huge pages behind large fresh memory. Torch-free.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lychee {

// Asks for huge pages behind a large fresh buffer: the faults of 4 KiB pages take several times as
// long as filling it. Beyond 128 MiB, finding huge pages was seen to take longer still.
inline void prefer_huge_pages(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20, kLeast = 4 << 20, kMost = 128 << 20;
  const uintptr_t first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (first + kPage - 1) / kPage * kPage;
  const uintptr_t end = (first + bytes) / kPage * kPage;
  if (bytes < kLeast || bytes > kMost || begin >= end) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // only a hint
#endif
}

}  // namespace lychee
