// SPDX-License-Identifier: Apache-2.0
// Checks and parameters of select_chunks, for every device. No value that may lie on a device is
// read.
#pragma once

#include <algorithm>

#include "check.h"
#include "select_chunks_params.h"

namespace lychee {

inline const int32_t* chunk_ints(const Tensor& t, std::initializer_list<int64_t> sizes,
                                 const CheckDevice& check_device, const char* op,
                                 const char* argument) {
  check_device(t, op, argument);
  check_shape(t, sizes, op, argument);
  check_dtype(t, ScalarType::Int, op, argument);
  return static_cast<const int32_t*>(t.const_data_ptr());
}

// Shapes and strides of the page lists and token counts, shared by all rows or one per row.
inline void set_chunks(SelectChunksParams* p, int64_t batch, const Tensor& chunk_pages,
                       const Tensor& chunk_tokens, const CheckDevice& check_device,
                       const char* op) {
  const int64_t chunks = p->num_chunks;
  const bool own_pages = chunk_pages.dim() > 2, own_tokens = chunk_tokens.dim() > 1;
  p->chunk_pages =
      own_pages ? chunk_ints(chunk_pages, {batch, chunks, -1}, check_device, op, "chunk_pages")
                : chunk_ints(chunk_pages, {chunks, -1}, check_device, op, "chunk_pages");
  p->chunk_tokens =
      own_tokens ? chunk_ints(chunk_tokens, {batch, chunks}, check_device, op, "chunk_tokens")
                 : chunk_ints(chunk_tokens, {chunks}, check_device, op, "chunk_tokens");
  p->pages_per_chunk = chunk_pages.size(own_pages + 1);
  p->pages_batch_stride = own_pages ? chunk_pages.stride(0) : 0;
  p->pages_chunk_stride = chunk_pages.stride(own_pages);
  p->pages_stride = chunk_pages.stride(own_pages + 1);
  p->tokens_batch_stride = own_tokens ? chunk_tokens.stride(0) : 0;
  p->tokens_stride = chunk_tokens.stride(own_tokens);
}

inline SelectChunksParams select_params(const Tensor& scores, double threshold, int64_t max_chunks,
                                        const Tensor& chunk_pages, const Tensor& chunk_tokens,
                                        int64_t page_tokens, const CheckDevice& check_device,
                                        const char* op) {
  check_device(scores, op, "scores");
  check_shape(scores, {-1, -1}, op, "scores");
  check(max_chunks >= 1, op, "max_chunks", ">= 1", std::to_string(max_chunks));
  check_range(page_tokens, 1, INT32_MAX, op, "page_tokens");
  SelectChunksParams p{};
  p.dtype = io_dtype(scores, op, "scores");
  p.num_chunks = scores.size(1);
  p.slots = std::min(max_chunks, p.num_chunks);
  p.page_tokens = page_tokens;
  p.threshold = threshold;
  p.scores = scores.const_data_ptr();
  p.score_batch_stride = scores.stride(0), p.score_stride = scores.stride(1);
  set_chunks(&p, scores.size(0), chunk_pages, chunk_tokens, check_device, op);
  // Positions of tokens are int32.
  check(p.slots * p.pages_per_chunk <= INT32_MAX / page_tokens, op, "chunk_pages",
        "at most 2147483647 tokens a row",
        std::to_string(p.slots * p.pages_per_chunk) + " pages of " + std::to_string(page_tokens));
  return p;
}

}  // namespace lychee
