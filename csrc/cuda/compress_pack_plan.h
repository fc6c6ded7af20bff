// SPDX-License-Identifier: Apache-2.0
// Launch shape of compress_pack, write_memory and compress_pack_bwd: plain C++, no CUDA, no Torch.
#pragma once

#include "cuda/row_plan.h"

namespace lychee::cuda {

constexpr int kPackWarps = 4;  // rows of a block, one per warp
constexpr int kPackThreads = kPackWarps * kLanesPerWarp;
constexpr int kPackUnroll = 2;  // steps whose loads are under way at once
// Warps per multiprocessor to split rows for: as many as are resident with 96 registers. Each has
// 2 KiB under way; an H200 needs about 26 KiB per multiprocessor at 4.3 TB/s and 0.8 us.
constexpr int kPackWarpsWanted = 20;

// A warp takes one row; in each step its groups of lanes take one head each.
struct PackPlan {
  int lanes;       // that share a head of a row
  int64_t blocks;  // of kPackWarps rows: grid.x
  int steps;       // of one warp, a multiple of kPackUnroll
  int64_t splits;  // shares of a row's heads: grid.y
};

inline PackPlan plan_pack(int64_t rows, int64_t heads, int64_t half, int width,
                          int multiprocessors) {
  PackPlan plan{};
  plan.lanes = lanes_per_row(half, width);
  plan.blocks = divide_up(rows, kPackWarps);
  const int64_t all_steps = divide_up(heads, kLanesPerWarp / plan.lanes);
  if (rows == 0 || all_steps == 0) return plan;
  const int64_t wanted = divide_up(int64_t{multiprocessors} * kPackWarpsWanted, rows);
  const int64_t most = divide_up(all_steps, kPackUnroll);
  const int64_t splits = wanted < most ? wanted : most;
  plan.steps = static_cast<int>(divide_up(all_steps, splits * kPackUnroll)) * kPackUnroll;
  plan.splits = divide_up(all_steps, plan.steps);
  return plan;
}

}  // namespace lychee::cuda
