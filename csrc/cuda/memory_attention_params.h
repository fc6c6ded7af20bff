// SPDX-License-Identifier: Apache-2.0
// Parameters of the memory_attention kernels on a GPU. Torch-free; strides are in elements.
#pragma once

#include <cstdint>

#include "dispatch.h"

namespace lychee::cuda {

struct MemoryAttentionParams {
  int64_t num_queries, num_keys;
  int32_t num_heads, num_kv_heads, head_dim;
  int32_t group;      // query heads of one kv head
  const void* q;      // [B, num_heads, num_queries, head_dim]
  const void *k, *v;  // [B, num_kv_heads, num_keys, head_dim]
  int64_t q_batch_stride, q_head_stride, q_token_stride;
  int64_t k_batch_stride, k_head_stride, k_token_stride;
  int64_t v_batch_stride, v_head_stride, v_token_stride;
  Dtype dtype;

  const void* kv;         // one layer of [pages, num_kv_heads, 2, page_tokens, head_dim], or null
  const float* kv_scale;  // one layer of [pages, num_kv_heads, 2, page_tokens], or null
  int64_t page_stride, page_head_stride, page_part_stride, page_token_stride;
  int64_t scale_page_stride, scale_head_stride, scale_part_stride;
  Dtype bank_dtype;
  int32_t bank_pages, page_tokens, tiles_per_page, max_pages;
  const int32_t *page_table, *page_len, *page_base;  // [B, max_pages]; base null: as stored
  const int32_t* num_pages;                          // [B]

  const bool* valid;  // [B, num_keys], or null
  int64_t valid_stride;
  const float *cos, *sin;  // [positions, head_dim / 2], or null: page keys as stored
  int32_t positions;
  int64_t query_stride;
  float scale_log2;  // softmax scale * log2(e)

  int32_t page_splits, segment_splits, block_rows;
  float* partial;     // [B, num_kv_heads, splits, partial_floats(block_rows, head_dim)], or null
  unsigned* tickets;  // [B, num_kv_heads], zeros; splits that have finished

  void* out;   // [B, num_queries, num_heads, head_dim]
  float* lse;  // [B, num_heads, num_queries]
};

}  // namespace lychee::cuda
