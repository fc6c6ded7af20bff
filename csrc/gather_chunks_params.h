// SPDX-License-Identifier: Apache-2.0
// Parameters of the gather_chunks kernels of every device. Torch-free; strides are in elements.
#pragma once

#include "dispatch.h"

namespace lychee {

// Which page stands where in which row, and at which positions its tokens stand.
struct PageTable {
  int64_t batch, max_pages, bank_pages;
  const int32_t *page, *len;  // [B, max_pages]; entries at or beyond num_pages are never read
  const int32_t* base;        // [B, max_pages], or null: no rotation
  const int32_t* num_pages;   // [B]
  const float *cos, *sin;     // [table_rows, head_dim / 2], or null: no rotation
  int64_t table_rows;
};

// Keys or values [layers, B, num_kv_heads, tokens, head_dim].
struct TokenRows {
  void* data;
  int64_t layer_stride, batch_stride, head_stride, token_stride;
};

struct GatherChunksParams {
  PageTable table;
  int64_t layers, num_kv_heads, page_tokens, head_dim;
  const void* kv;         // [pages, layers, num_kv_heads, 2, page_tokens, head_dim]
  const float* kv_scale;  // [pages, layers, num_kv_heads, 2, page_tokens], or null
  int64_t page_stride, layer_stride, head_stride, part_stride, token_stride;
  int64_t scale_page_stride, scale_layer_stride, scale_head_stride, scale_part_stride;
  Dtype bank_dtype, dtype;
  TokenRows k, v;  // at least max_pages * page_tokens tokens
  bool streamed;   // CPU only: write past the caches, where alignment permits
};

struct GatherChunksBwdParams {
  PageTable table;
  int64_t layers, num_kv_heads, page_tokens, head_dim;  // layers of dk and dv
  int64_t bank_layers, first_layer;                     // layers of dkv, where those of dk begin
  const void *dk, *dv;  // [layers, B, num_kv_heads, max_pages * page_tokens, head_dim]
  // CPU only: entries of the table (row * max_pages + i) sorted by their page, and where those of
  // each page begin, [bank pages + 1].
  const int64_t *readers, *reader_begin;
  Dtype dtype, bank_dtype;
  void* dkv;  // [bank pages, bank_layers, num_kv_heads, 2, page_tokens, head_dim]
};

}  // namespace lychee
