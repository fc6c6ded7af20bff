// SPDX-License-Identifier: Apache-2.0
// Asynchronous copies to shared memory: a target holds NaN from the start of its copy to the wait.
#pragma once

#include <cstring>
#include <string>
#include <utility>

#include "block.h"

namespace lychee::emulator {

inline bool in_shared_memory(const void* address, size_t bytes) {
  const Block& block = *current_block;
  const auto* first = static_cast<const unsigned char*>(address);
  return first >= block.shared && first + bytes <= block.shared + block.shared_bytes;
}

inline void finish_copy(const Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.target, copy.source, copy.bytes);
  } else {
    std::memset(copy.target, 0, copy.bytes);
  }
}

inline void start_copy(void* target, const void* source, size_t bytes, bool valid, Site site) {
  const Copy copy{target, source, bytes, valid};
  {
    Hidden hidden;
    ++statistics.copies;
    const uintptr_t addresses =
        reinterpret_cast<uintptr_t>(target) | (valid ? reinterpret_cast<uintptr_t>(source) : 0);
    if (addresses % bytes) fail("copy_async: misaligned address, " + site.name());
    if (!in_shared_memory(target, bytes)) {
      fail("copy_async: target outside of shared memory, " + site.name());
    }
  }
  if (options.poison) {
    std::memset(target, 0xff, bytes);
  } else {
    finish_copy(copy);
  }
  Hidden hidden;
  current_thread->open_copies.push_back(copy);
}

inline void commit_copies() {
  Hidden hidden;
  current_thread->copy_groups.push_back(std::move(current_thread->open_copies));
  current_thread->open_copies.clear();
}

inline void wait_for_copies(size_t left) {
  auto& groups = current_thread->copy_groups;
  while (groups.size() > left) {
    for (const Copy& copy : groups.front()) finish_copy(copy);
    Hidden hidden;
    groups.erase(groups.begin());
  }
}

}  // namespace lychee::emulator
