// SPDX-License-Identifier: Apache-2.0
// Parameters and entry points of the backward kernels of memory_attention. Torch-free; strides are
// in elements.
#pragma once

#include "cpu/memory_attention.h"

namespace lychee {

// Query rows whose weights are held at a time, at most. A multiple of every register block.
constexpr int64_t kGradientRows = 48;

struct MemoryAttentionBwdParams {
  MemoryAttentionParams in;  // the forward's inputs; not its outputs, nor its partition
  const void *out, *dout;    // [B, num_heads, num_queries, head_dim]
  int64_t out_batch_stride, out_head_stride, out_token_stride;
  int64_t dout_batch_stride, dout_head_stride, dout_token_stride;
  const float* lse;     // [B, num_heads, num_queries]
  void *dq, *dk, *dv;   // dense, shapes of q, k and v
  int64_t chunk_batch;  // batch entries of a work item: one chunk of the batch and one kv head

  // Pages that several entries of one chunk read share a slot; the slots of a page are summed in
  // the end. All null: no gradient of the bank is wanted.
  const int64_t* tile_slot;   // per tile; of pages only
  const int64_t* slot_begin;  // [chunks + 1]
  float* slots;               // [slots, num_kv_heads, 2, page_tokens, head_dim]
  int64_t page_tokens;
  const int64_t* pages;       // [distinct pages] that are read
  const int64_t* page_begin;  // [distinct pages + 1] into page_slots
  const int64_t* page_slots;  // slots of each page, in the order of the batch
  void* dkv;                  // one layer of dense [bank pages, L, num_kv_heads, 2, tokens, dim]
  int64_t dkv_page_stride;
};

// Floats of scratch one thread needs: q, dout, dq and two numbers per row; six tiles of keys or
// values; two blocks of weights; who is kept.
static inline int64_t memory_attention_bwd_scratch(int64_t head_dim, int64_t rows) {
  const int64_t dim = padded_dim(head_dim);
  return 3 * rows * dim + 2 * rows + 6 * kTileKeys * dim + 2 * kGradientRows * kTileKeys +
         kTileKeys;
}

// Computes one work item, chunk * num_kv_heads + kv head; scratch is 64-byte aligned.
using MemoryAttentionBwdFn = void (*)(const MemoryAttentionBwdParams&, int64_t item,
                                      float* scratch);
void memory_attention_bwd_generic(const MemoryAttentionBwdParams&, int64_t item, float* scratch);
void memory_attention_bwd_avx2(const MemoryAttentionBwdParams&, int64_t item, float* scratch);
void memory_attention_bwd_avx512(const MemoryAttentionBwdParams&, int64_t item, float* scratch);

// Sums the slots of one kv head of one page into dkv; index is distinct page * num_kv_heads + head.
using SumSlotsFn = void (*)(const MemoryAttentionBwdParams&, int64_t index);
void sum_slots_generic(const MemoryAttentionBwdParams&, int64_t index);
void sum_slots_avx2(const MemoryAttentionBwdParams&, int64_t index);
void sum_slots_avx512(const MemoryAttentionBwdParams&, int64_t index);

}  // namespace lychee
