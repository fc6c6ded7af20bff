// SPDX-License-Identifier: Apache-2.0
// select_chunks without Torch, so that the sanitizers can watch it: strides past 2^31 elements,
// outputs of exactly the size they need. And its plan.
#include <emulator.h>

#include <vector>

#include "cuda/select_chunks.cuh"
#include "sparse_memory.h"

namespace lychee::cuda {
namespace {

using emulator::expect;
using emulator::SparseMemory;

constexpr int64_t kFar = (int64_t{1} << 31) + 64;  // elements

EMULATOR_CASE(select_far_rows) {
  constexpr int64_t kBatch = 2, kChunks = 300, kSlots = 5, kPages = 2, kPageTokens = 4;
  const SparseMemory scores(2 * kFar * sizeof(float)), pages(2 * kFar * sizeof(int32_t));
  std::vector<int32_t> tokens(kChunks, 6);
  std::vector<int32_t> table(kBatch * kSlots * kPages, -9), len(table), base(table);
  std::vector<int32_t> chunks(kBatch * kSlots, -9), num_pages(kBatch), num_tokens(num_pages),
      num_chunks(num_pages);
  for (int64_t c = 0; c < kChunks; ++c) {
    scores.as<float>()[kFar + 2 * c] = static_cast<float>(c % 60);  // row 1 ties by five
    for (int i : {0, 1}) {
      pages.as<int32_t>()[kFar + c * kPages + i] = static_cast<int32_t>(10 * c + i);
    }
  }
  SelectChunksParams p{};
  p.num_chunks = kChunks, p.slots = kSlots, p.pages_per_chunk = kPages, p.page_tokens = kPageTokens;
  p.dtype = Dtype::kFloat32, p.threshold = 58.0;
  p.scores = scores.as<float>(), p.score_batch_stride = kFar, p.score_stride = 2;
  p.chunk_pages = pages.as<int32_t>(), p.pages_batch_stride = kFar;
  p.pages_chunk_stride = kPages, p.pages_stride = 1;
  p.chunk_tokens = tokens.data(), p.tokens_stride = 1;
  p.page_table = table.data(), p.page_len = len.data(), p.page_base = base.data();
  p.num_pages = num_pages.data(), p.num_tokens = num_tokens.data();
  p.chunks = chunks.data(), p.num_chunks_out = num_chunks.data();
  const unsigned threads = plan_select_threads(kChunks, kSlots * kPages);
  emulator::launch(dim3{kBatch, 1, 1}, dim3{threads, 1, 1}, sizeof(SelectShared),
                   [&] { select_chunks_kernel<float>(p); });
  // of row 0 nothing passes; of row 1 the five scores of 59, not those of 58
  expect(num_chunks[0] == 0 && num_pages[0] == 0 && num_chunks[1] == 5, "counts");
  expect(num_pages[1] == 10 && num_tokens[1] == 30, "counts of pages and tokens");
  for (int64_t i = 0; i < kSlots; ++i) {
    const int32_t chunk = static_cast<int32_t>(60 * i + 59);
    expect(chunks[i] == -1 && chunks[kSlots + i] == chunk, "chunks past 2^31 elements");
    for (int64_t page : {0, 1}) {
      const int64_t none = i * kPages + page, at = kSlots * kPages + none;
      expect(table[none] == -1 && len[none] == 0 && base[none] == 0, "padding");
      expect(table[at] == 10 * chunk + page && len[at] == (page ? 2 : 4) &&
                 base[at] == 6 * i + 4 * page,
             "pages past 2^31 elements");
    }
  }
}

EMULATOR_CASE(select_plan) {
  expect(plan_select_threads(0, 0) == 128 && plan_select_threads(100, 3) == 128, "a least block");
  expect(plan_select_threads(129, 3) == 160 && plan_select_threads(3, 257) == 288, "whole warps");
  expect(plan_select_threads(4096, 64) == 1024 && plan_select_threads(9, 1 << 20) == 1024,
         "a largest block");
}

}  // namespace
}  // namespace lychee::cuda
