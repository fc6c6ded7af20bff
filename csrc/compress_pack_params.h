// SPDX-License-Identifier: Apache-2.0
// Parameters of the compress_pack kernels of every device. Torch-free; strides are in elements.
#pragma once

#include "dispatch.h"

namespace lychee {

// One layer of a memory bank, as the place memory rows are written to.
struct BankWriter {
  void* data;    // kv[0, layer, 0, 0, 0, 0]
  float* scale;  // kv_scale[0, layer, 0, 0, 0], or null when the bank is not quantised
  Dtype dtype;
  int64_t page_tokens;
  int64_t page_stride, head_stride, part_stride, token_stride;
  int64_t scale_page_stride, scale_head_stride, scale_part_stride;
  // CPU only: [batch * memory], page * page_tokens + offset, or -1 to skip the row.
  const int64_t* slots;
};

// Where the valid memory rows of each batch entry go: densely, from slot0 on, along its pages.
struct SlotTable {
  const int32_t* page;   // [batch, max_pages]
  const int32_t* first;  // [batch], the slot of each batch entry's first valid row
  const bool* valid;     // [batch, memory], or null: every row
  int64_t max_pages, bank_pages;
};

// A window's rows: segment order is all raw rows, then all memory rows; interleaved order has each
// memory row behind its `ratio` raw ones.
struct RowOrder {
  int64_t batch, ratio;
  int64_t window;          // raw rows per batch entry
  int64_t memory;          // memory rows per batch entry
  const float *cos, *sin;  // [table_rows, half], or null: no rotation
  int64_t table_rows;
  int64_t half;              // head_dim / 2
  const int64_t* positions;  // [batch, window + memory], or null: pos0 + interleaved row
  int64_t pos0;
};

struct CompressPackParams {
  RowOrder order;
  int64_t num_heads, num_kv_heads, head_dim;
  bool memory_queries_only;  // q holds memory rows only
  Dtype dtype;
  const void *q, *k, *v;  // [rows in segment order, heads, head_dim]
  int64_t q_row_stride, q_head_stride;
  int64_t k_row_stride, k_head_stride;
  int64_t v_row_stride, v_head_stride;
  void *q_rot, *k_rot, *v_out;  // [batch, heads, interleaved rows, head_dim]
  // CPU only: store q_rot, or k_rot and v_out, past the cache; 64-byte aligned.
  bool stream_q, stream_kv;
  void *mem_k, *mem_v;  // [batch, num_kv_heads, memory, head_dim], or null
  BankWriter bank;      // data is null when nothing is written to a bank
};

// The gradient of q, k or v from those of its outputs.
struct CompressPackBwdParams {
  RowOrder order;
  int64_t num_heads, head_dim;
  bool memory_only;  // grad and out hold memory rows only
  Dtype dtype;
  const void* grad;  // of [batch, num_heads, interleaved rows, head_dim], or null
  int64_t grad_batch_stride, grad_head_stride, grad_row_stride;
  const void* mem_grad;  // of [batch, num_heads, memory, head_dim], added to memory rows, or null
  int64_t mem_batch_stride, mem_head_stride, mem_row_stride;
  void* out;    // [rows in segment order, num_heads, head_dim]
  bool stream;  // CPU only: store out past the cache; 64-byte aligned
};

}  // namespace lychee
