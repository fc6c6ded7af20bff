// SPDX-License-Identifier: Apache-2.0
// select_chunks on CPU: checks, parameters, registration.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "cpu/select_chunks_kernel.inl"
#include "select_chunks_checks.h"
#include "stable.h"

namespace lychee {
namespace {

constexpr const char* kOp = "select_chunks";
// Scores a thread reads at least: some 10 microseconds of work.
constexpr int64_t kScoresPerTask = 1 << 14;

// Chunks that were not chosen may have any number of tokens: a row may not have them at all.
void check_tokens(const SelectChunksParams& p, int64_t batch) {
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t i = 0; i < p.num_chunks_out[row]; ++i) {
      const int64_t chunk = p.chunks[row * p.slots + i];
      check_range(p.chunk_tokens[row * p.tokens_batch_stride + chunk * p.tokens_stride], 0,
                  p.pages_per_chunk * p.page_tokens, kOp, "chunk_tokens");
    }
  }
}

using Selection = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Selection select_chunks_cpu(const Tensor& scores, double threshold, int64_t max_chunks,
                            const Tensor& chunk_pages, const Tensor& chunk_tokens,
                            int64_t page_tokens) {
  SelectChunksParams p = select_params(scores, threshold, max_chunks, chunk_pages, chunk_tokens,
                                       page_tokens, check_cpu, kOp);
  const int64_t batch = scores.size(0);
  const auto ints = [](const std::vector<int64_t>& sizes, int32_t** data) {
    Tensor output = new_output(sizes, ScalarType::Int);
    *data = static_cast<int32_t*>(output.mutable_data_ptr());
    return output;
  };
  const int64_t width = p.slots * p.pages_per_chunk;
  Tensor page_table = ints({batch, width}, &p.page_table);
  Tensor page_len = ints({batch, width}, &p.page_len);
  Tensor page_base = ints({batch, width}, &p.page_base);
  Tensor num_pages = ints({batch}, &p.num_pages), num_tokens = ints({batch}, &p.num_tokens);
  Tensor chunks = ints({batch, p.slots}, &p.chunks);
  Tensor num_chunks = ints({batch}, &p.num_chunks_out);

  const int64_t grain = kScoresPerTask / std::max<int64_t>(p.num_chunks, 1) + 1;
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> candidates(p.num_chunks);
    for (int64_t row = begin; row < end; ++row) choose_chunks_kernel(p, row, candidates.data());
  });
  check_tokens(p, batch);
  torch::stable::parallel_for(0, batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) list_pages_kernel(p, row);
  });
  return {page_table, page_len, page_base, num_pages, num_tokens, chunks, num_chunks};
}

}  // namespace
}  // namespace lychee

STABLE_TORCH_LIBRARY_IMPL(lychee, CPU, m) {
  m.impl("select_chunks", TORCH_BOX(&lychee::select_chunks_cpu));
}
