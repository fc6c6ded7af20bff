// SPDX-License-Identifier: Apache-2.0
// Launch shape of select_chunks: plain C++, no CUDA, no Torch.
#pragma once

#include "cuda/row_plan.h"

namespace lychee::cuda {

constexpr int kSelectMostThreads = 1024;
constexpr int kSelectLeastThreads = 128;

// Threads of the one block that handles a row: one per score or entry of the page table, in whole
// warps; beyond 1024 of either, threads take several.
inline int plan_select_threads(int64_t num_chunks, int64_t width) {
  const int64_t most = num_chunks > width ? num_chunks : width;
  const int64_t threads = divide_up(most, kLanesPerWarp) * kLanesPerWarp;
  if (threads < kSelectLeastThreads) return kSelectLeastThreads;
  return threads > kSelectMostThreads ? kSelectMostThreads : static_cast<int>(threads);
}

}  // namespace lychee::cuda
