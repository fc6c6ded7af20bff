// SPDX-License-Identifier: Apache-2.0
// select_chunks on CPU: checks, parameters, registration.
#include "select_chunks_params.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/select_chunks_kernel.inl"
#include "stable.h"

namespace lychee {
namespace {

constexpr const char* kOp = "select_chunks";
// Scores a thread reads at least: some 10 microseconds of work.
constexpr int64_t kScoresPerTask = 1 << 14;

const int32_t* chunk_ints(const Tensor& t, std::initializer_list<int64_t> sizes,
                          const char* argument) {
  check_cpu(t, kOp, argument);
  check_shape(t, sizes, kOp, argument);
  check_dtype(t, ScalarType::Int, kOp, argument);
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// Shapes and strides of the page lists and token counts, shared by all rows or one per row.
void set_chunks(SelectChunksParams* p, int64_t batch, const Tensor& chunk_pages,
                const Tensor& chunk_tokens) {
  const int64_t chunks = p->num_chunks;
  const bool own_pages = chunk_pages.dim() > 2, own_tokens = chunk_tokens.dim() > 1;
  p->chunk_pages = own_pages ? chunk_ints(chunk_pages, {batch, chunks, -1}, "chunk_pages")
                             : chunk_ints(chunk_pages, {chunks, -1}, "chunk_pages");
  p->chunk_tokens = own_tokens ? chunk_ints(chunk_tokens, {batch, chunks}, "chunk_tokens")
                               : chunk_ints(chunk_tokens, {chunks}, "chunk_tokens");
  p->pages_per_chunk = chunk_pages.size(own_pages + 1);
  p->pages_batch_stride = own_pages ? chunk_pages.stride(0) : 0;
  p->pages_chunk_stride = chunk_pages.stride(own_pages);
  p->pages_stride = chunk_pages.stride(own_pages + 1);
  p->tokens_batch_stride = own_tokens ? chunk_tokens.stride(0) : 0;
  p->tokens_stride = chunk_tokens.stride(own_tokens);
}

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
  check_cpu(scores, kOp, "scores");
  check_shape(scores, {-1, -1}, kOp, "scores");
  check(max_chunks >= 1, kOp, "max_chunks", ">= 1", std::to_string(max_chunks));
  check_range(page_tokens, 1, INT32_MAX, kOp, "page_tokens");
  const int64_t batch = scores.size(0);
  SelectChunksParams p{};
  p.dtype = io_dtype(scores, kOp, "scores");
  p.num_chunks = scores.size(1);
  p.slots = std::min(max_chunks, p.num_chunks);
  p.page_tokens = page_tokens;
  p.threshold = threshold;
  p.scores = scores.const_data_ptr();
  p.score_batch_stride = scores.stride(0), p.score_stride = scores.stride(1);
  set_chunks(&p, batch, chunk_pages, chunk_tokens);

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
