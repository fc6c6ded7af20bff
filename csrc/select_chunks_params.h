// SPDX-License-Identifier: Apache-2.0
// Parameters of the select_chunks kernels of every device. Torch-free; strides are in elements.
#pragma once

#include "dispatch.h"

namespace lychee {

struct SelectChunksParams {
  int64_t num_chunks;       // C
  int64_t slots;            // chunks a row may keep: min(max_chunks, C)
  int64_t pages_per_chunk;  // n
  int64_t page_tokens;
  Dtype dtype;
  double threshold;
  const void* scores;  // [B, C]
  int64_t score_batch_stride, score_stride;
  const int32_t* chunk_pages;  // [B, C, n]; batch stride 0 where the rows share it
  int64_t pages_batch_stride, pages_chunk_stride, pages_stride;
  const int32_t* chunk_tokens;  // [B, C]; batch stride 0 where the rows share it
  int64_t tokens_batch_stride, tokens_stride;

  int32_t *page_table, *page_len, *page_base;  // [B, slots * n]
  int32_t *num_pages, *num_tokens;             // [B]
  int32_t* chunks;                             // [B, slots]
  int32_t* num_chunks_out;                     // [B]
};

}  // namespace lychee
