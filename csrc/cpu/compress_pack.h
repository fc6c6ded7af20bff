// SPDX-License-Identifier: Apache-2.0
// Parameters and entry points of the compress_pack kernels. Torch-free; strides are in elements.
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
  const int64_t* slots;  // [batch * memory]: page * page_tokens + offset, or -1 to skip the row
};

struct CompressPackParams {
  int64_t window;  // raw rows per batch entry
  int64_t memory;  // memory rows per batch entry
  int64_t batch, ratio, num_heads, num_kv_heads, head_dim;
  bool memory_queries_only;  // q holds memory rows only
  Dtype dtype;
  const void *q, *k, *v;  // rows in segment order: all raw rows, then all memory rows
  int64_t q_row_stride, q_head_stride;
  int64_t k_row_stride, k_head_stride;
  int64_t v_row_stride, v_head_stride;
  const float *cos, *sin;    // [positions, head_dim / 2]
  const int64_t* positions;  // [batch, window + memory], or null: pos0 + row
  int64_t pos0;
  void *q_rot, *k_rot, *v_out;  // [batch, heads, rows, head_dim], rows interleaved
  void *mem_k, *mem_v;          // [batch, num_kv_heads, memory, head_dim], or null
  BankWriter bank;              // data is null when nothing is written to a bank
};

// Handles rows [begin, end) of the batch * (window + memory) interleaved rows.
using CompressPackFn = void (*)(const CompressPackParams&, int64_t begin, int64_t end);
void compress_pack_generic(const CompressPackParams&, int64_t begin, int64_t end);
void compress_pack_avx2(const CompressPackParams&, int64_t begin, int64_t end);
void compress_pack_avx512(const CompressPackParams&, int64_t begin, int64_t end);

// Writes memory rows [begin, end) of batch * memory; k and v hold memory rows only.
using WriteMemoryFn = void (*)(const CompressPackParams&, int64_t begin, int64_t end);
void write_memory_generic(const CompressPackParams&, int64_t begin, int64_t end);
void write_memory_avx2(const CompressPackParams&, int64_t begin, int64_t end);
void write_memory_avx512(const CompressPackParams&, int64_t begin, int64_t end);

}  // namespace lychee
