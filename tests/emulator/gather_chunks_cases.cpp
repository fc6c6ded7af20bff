// SPDX-License-Identifier: Apache-2.0
// gather_chunks and its backward without Torch, so that the sanitizers can watch them: a bank,
// outputs and gradients past 2^31 elements. And their plan.
#include <emulator.h>

#include <vector>

#include "cuda/gather_chunks_bwd.cuh"
#include "sparse_memory.h"

namespace lychee::cuda {
namespace {

using emulator::expect;
using emulator::SparseMemory;

constexpr int64_t kFar = (int64_t{1} << 31) + 64;  // elements

template <bool kFast>
void check_gather(int64_t dim) {
  constexpr int64_t kTokens = 3, kPages = 3, kUsed = 2;
  const SparseMemory kv(kPages * kFar), scale(kPages * kFar * sizeof(float));
  const SparseMemory k(2 * kFar * sizeof(float)), v(2 * kFar * sizeof(float));
  const int32_t page[] = {kPages - 1, -(1 << 30)}, len[] = {kUsed, 1 << 30}, count = 1;
  bool valid[2 * kTokens];
  lychee::GatherChunksParams p{};
  p.table = {1, 2, kPages, page, len, nullptr, &count, nullptr, nullptr, 0};
  p.layers = 2, p.num_kv_heads = 1, p.page_tokens = kTokens, p.head_dim = dim;
  p.kv = kv.as<int8_t>(), p.kv_scale = scale.as<float>();
  p.page_stride = kFar, p.layer_stride = 2 * kTokens * dim;
  p.part_stride = kTokens * dim, p.token_stride = dim;
  p.scale_page_stride = kFar, p.scale_layer_stride = 2 * kTokens, p.scale_part_stride = kTokens;
  p.bank_dtype = Dtype::kInt8, p.dtype = Dtype::kFloat32;
  p.k = {k.as<float>(), kFar, 0, 0, dim};
  p.v = {v.as<float>(), kFar, 0, 0, dim};
  int8_t* stored = kv.as<int8_t>() + (kPages - 1) * kFar;
  float* factors = scale.as<float>() + (kPages - 1) * kFar;
  for (int64_t i = 0; i < 4 * kTokens * dim; ++i) stored[i] = static_cast<int8_t>(i % 251 - 125);
  for (int64_t i = 0; i < 4 * kTokens; ++i) factors[i] = static_cast<float>(i + 1);

  const GatherPlan plan = plan_gather(2, kTokens, 2, dim / 2, kRunWidth<float, kFast>, 4);
  emulator::launch(dim3{static_cast<unsigned>(plan.blocks), 1, 1}, dim3{kGatherThreads, 1, 1}, 0,
                   [&] { gather_chunks_kernel<float, int8_t, kFast>({p, valid, plan}); });
  for (int64_t i = 0; i < 2 * 2 * 2 * kTokens * dim; ++i) {
    const int64_t d = i % dim, token = i / dim % (2 * kTokens), layer = i / dim / (2 * kTokens) % 2;
    const int64_t part = i / dim / (2 * kTokens) / 2, row = (layer * 2 + part) * kTokens + token;
    const float actual = (part ? v : k).as<float>()[layer * kFar + token * dim + d];
    const float expected = token < kUsed ? stored[row * dim + d] * factors[row] : 0.0f;
    expect(actual == expected && valid[token] == (token < kUsed), "tokens past 2^31 elements");
  }
}

EMULATOR_CASE(gather_in_runs) { check_gather<true>(64); }
EMULATOR_CASE(gather_by_elements) { check_gather<false>(24); }

EMULATOR_CASE(gather_bwd_sums_in_order) {
  constexpr int64_t kDim = 24, kTokens = 2, kMaxPages = 3, kRun = kTokens * kDim;
  constexpr int64_t kLayer = 2 * kMaxPages * kRun, kLast = kFar / kLayer;
  const int32_t page[] = {5, 1, 0, 1, 1, -9}, count[] = {3, 1};
  const int32_t len[] = {kTokens, 1, 0, kTokens, kTokens, 1 << 30};
  const SparseMemory dk(2 * kFar * sizeof(float)), dv(2 * kFar * sizeof(float));
  for (int64_t i = 0; i < kLayer; ++i) {
    dk.as<float>()[kLast * kLayer + i] = static_cast<float>(i);
    dv.as<float>()[kLast * kLayer + i] = static_cast<float>(-2 * i);
  }
  std::vector<float> dkv(2 * 2 * kRun, -99.0f);  // two pages of one layer
  lychee::GatherChunksBwdParams p{};
  p.table = {2, kMaxPages, 2, page, len, nullptr, count, nullptr, nullptr, 0};
  p.num_kv_heads = 1, p.page_tokens = kTokens, p.head_dim = kDim;
  // the bank's only layer is the last one of the gradients, past 2^31 elements
  p.layers = kLast + 1, p.bank_layers = 1, p.first_layer = -kLast;
  p.dk = dk.as<float>(), p.dv = dv.as<float>(), p.dkv = dkv.data();
  p.dtype = p.bank_dtype = Dtype::kFloat32;
  const GatherPlan plan = plan_gather(2, kTokens, 1, kDim / 2, 4, 4);
  emulator::launch(dim3{static_cast<unsigned>(plan.blocks), 1, 1}, dim3{kGatherThreads, 1, 1},
                   sizeof(ReaderList),
                   [&] { gather_chunks_bwd_kernel<float, float, true>({p, plan}); });
  for (int64_t i = 0; i < 2 * 2 * kRun; ++i) {
    // page 1 is read as entry 1, its first token alone, and as entry 3; page 0 by nobody's token
    const int64_t at = i % kRun, first = at < kDim ? 1 * kRun + at : 0, second = 3 * kRun + at;
    const float sum = i < 2 * kRun ? 0.0f : static_cast<float>(first + second);
    expect(dkv[i] == (i / kRun % 2 ? -2.0f * sum : sum), "sums of the readers of each page");
  }
}

EMULATOR_CASE(gather_plan_covers_every_token) {
  for (int64_t half = 4; half <= 128; half += 4) {
    for (int width : {4, 8}) {
      for (int64_t pages : {1, 16, 6836}) {
        for (int64_t tokens : {1, 7, 64, 1024}) {
          for (int64_t heads : {0, 1, 3, 112}) {
            const GatherPlan plan = plan_gather(pages, tokens, heads, half, width, 132);
            expect(plan.lanes * plan.tokens == kGatherThreads, "whole rows");
            expect(plan.token_blocks * plan.tokens >= tokens, "tokens");
            expect(plan.head_blocks >= 1 && plan.head_blocks * plan.heads >= heads, "heads");
            expect(heads == 0 || (plan.head_blocks - 1) * plan.heads < heads, "blocks with work");
            expect(plan.blocks == pages * plan.head_blocks * plan.token_blocks, "blocks");
          }
        }
      }
    }
  }
}

EMULATOR_CASE(gather_plan_shares_angles) {
  expect(plan_gather(1024, 64, 112, 64, 8, 132).heads == 8, "large gathers to share angles");
  expect(plan_gather(16, 64, 112, 64, 8, 132).heads == 3, "enough blocks for one chunk");
  expect(plan_gather(1, 64, 8, 64, 8, 132).heads == 1, "small gathers to be spread");
  expect(plan_gather(0, 64, 8, 64, 8, 132).blocks == 0, "no block without entries");
}

}  // namespace
}  // namespace lychee::cuda
