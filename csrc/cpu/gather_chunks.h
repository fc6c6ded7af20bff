// SPDX-License-Identifier: Apache-2.0
// Parameters and entry points of the gather_chunks kernels. Torch-free; strides are in elements.
#pragma once

#include "dispatch.h"

namespace lychee {

// Which page stands where in which row, and at which positions its tokens stand.
struct PageTable {
  int64_t batch, max_pages;
  const int32_t *page, *len;  // [B, max_pages]; entries at or beyond num_pages are never read
  const int32_t* base;        // [B, max_pages], or null: no rotation
  const int32_t* num_pages;   // [B]
  const float *cos, *sin;     // [positions, head_dim / 2], or null: no rotation
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
  bool streamed;   // write past the caches, where alignment permits
};

struct GatherChunksBwdParams {
  PageTable table;
  int64_t layers, num_kv_heads, page_tokens, head_dim;  // layers of dk and dv
  int64_t bank_layers, first_layer;                     // layers of dkv, where those of dk begin
  const void *dk, *dv;          // [layers, B, num_kv_heads, max_pages * page_tokens, head_dim]
  const int64_t* readers;       // entries of the table (row * max_pages + i), sorted by their page
  const int64_t* reader_begin;  // [bank pages + 1] into readers
  Dtype dtype, bank_dtype;
  void* dkv;  // [bank pages, bank_layers, num_kv_heads, 2, page_tokens, head_dim]
};

// Handles items [begin, end) of batch * max_pages * layers * num_kv_heads, in this order: a page of
// the bank is one run of memory, and its rows of the tables serve all layers and heads.
using GatherChunksFn = void (*)(const GatherChunksParams&, int64_t begin, int64_t end);
void gather_chunks_generic(const GatherChunksParams&, int64_t begin, int64_t end);
void gather_chunks_avx2(const GatherChunksParams&, int64_t begin, int64_t end);
void gather_chunks_avx512(const GatherChunksParams&, int64_t begin, int64_t end);

// Handles items [begin, end) of bank pages * bank_layers * num_kv_heads.
using GatherChunksBwdFn = void (*)(const GatherChunksBwdParams&, int64_t begin, int64_t end);
void gather_chunks_bwd_generic(const GatherChunksBwdParams&, int64_t begin, int64_t end);
void gather_chunks_bwd_avx2(const GatherChunksBwdParams&, int64_t begin, int64_t end);
void gather_chunks_bwd_avx512(const GatherChunksBwdParams&, int64_t begin, int64_t end);

}  // namespace lychee
