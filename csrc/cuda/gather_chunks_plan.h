// SPDX-License-Identifier: Apache-2.0
// Launch shape of gather_chunks and gather_chunks_bwd: plain C++, no CUDA, no Torch.
#pragma once

#include "cuda/row_plan.h"

namespace lychee::cuda {

constexpr int kGatherThreads = 128;
// Layers and heads that a block handles one after another share its cosines and sines, which else
// were read once for each key: with eight of them the tables add 8% to what is read.
constexpr int kGatherMostHeads = 8;
// Blocks per multiprocessor worth having before blocks take more heads.
constexpr int kGatherBlocksWanted = 16;

// A block handles some tokens of a page for some of the (layer, head) pairs, keys and values.
struct GatherPlan {
  int lanes;             // that share a row of a token
  int tokens;            // of a block
  int64_t token_blocks;  // of a page
  int64_t heads;         // (layer, head) pairs of a block
  int64_t head_blocks;   // at least one
  int64_t blocks;        // page * head_blocks * token_blocks
};

// `pages` entries of the table, or pages of the bank; `heads` counts (layer, head) pairs.
inline GatherPlan plan_gather(int64_t pages, int64_t page_tokens, int64_t heads, int64_t half,
                              int width, int multiprocessors) {
  GatherPlan plan{};
  plan.lanes = lanes_per_row(half, width);
  plan.tokens = kGatherThreads / plan.lanes;
  plan.token_blocks = divide_up(page_tokens, plan.tokens);
  const int64_t wanted = int64_t{multiprocessors} * kGatherBlocksWanted;
  const int64_t fair = pages * plan.token_blocks * heads / wanted;
  plan.heads = fair < 1 ? 1 : fair > kGatherMostHeads ? kGatherMostHeads : fair;
  plan.head_blocks = heads > 0 ? divide_up(heads, plan.heads) : 1;
  plan.blocks = pages * plan.head_blocks * plan.token_blocks;
  return plan;
}

}  // namespace lychee::cuda
