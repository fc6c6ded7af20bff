// SPDX-License-Identifier: Apache-2.0
// Parameters, work partition and entry points of the memory_attention kernels.
// Torch-free; strides are in elements.
#pragma once

#include "dispatch.h"

namespace lychee {

// Keys per tile. One tile of keys and values (2 * 64 * D floats) fits the first-level cache at
// D=64.
constexpr int64_t kTileKeys = 64;
// Query rows (tokens x heads of one kv head) that share a packed key tile, at most. A multiple of
// every register block; packing the tiles then costs 1% of the time at D=64.
constexpr int64_t kBlockRows = 576;
// Tiles per split, at least, when a block of few queries reads many keys.
constexpr int64_t kTilesPerSplit = 16;
// Rows that the splits of one block leave to be merged, at most: 9 MiB of scratch at D=128.
constexpr int64_t kSplitRows = 1 << 14;
// Rows of values and outputs in scratch are padded to whole vectors of any width.
constexpr int64_t kPadLanes = 16;

// Up to kTileKeys consecutive keys: of a page, or of the contiguous segment when page is -1.
struct KeyTile {
  int64_t page;      // index into the bank
  int64_t first;     // first token within the page or the segment
  int64_t count;     // tokens
  int64_t position;  // rotation of the first token; pages in affine mode only
};

struct MemoryAttentionParams {
  int64_t batch, num_queries, num_keys, num_heads, num_kv_heads, head_dim;
  const void* q;      // [B, num_heads, num_queries, head_dim]
  const void *k, *v;  // [B, num_kv_heads, num_keys, head_dim]
  int64_t q_batch_stride, q_head_stride, q_token_stride;
  int64_t k_batch_stride, k_head_stride, k_token_stride;
  int64_t v_batch_stride, v_head_stride, v_token_stride;
  Dtype dtype;

  const void* kv;         // one layer of [pages, num_kv_heads, 2, page_tokens, head_dim]
  const float* kv_scale;  // one layer of [pages, num_kv_heads, 2, page_tokens], or null
  int64_t page_stride, page_head_stride, page_part_stride, page_token_stride;
  int64_t scale_page_stride, scale_head_stride, scale_part_stride;
  Dtype bank_dtype;

  const bool* valid;  // [B, num_keys], or null
  int64_t valid_stride;
  const float *cos, *sin;  // [positions, head_dim / 2], or null: page keys as stored
  int64_t query_stride;
  float softmax_scale;

  const KeyTile* tiles;       // of all batch entries, pages before the contiguous segment
  const int64_t* tile_begin;  // [B + 1] into tiles

  // Work items are numbered ((batch * num_kv_heads + head) * num_blocks + block) * num_splits + s.
  int64_t block_tokens, num_blocks, num_splits;
  int64_t block_rows;  // block_tokens * query heads per kv head
  float* partial;  // [items, block_rows, partial_stride]: output, maximum, sum; null for one split
  int64_t partial_stride;

  void* out;   // [B, num_queries, num_heads, head_dim]
  float* lse;  // [B, num_heads, num_queries]
};

// Of a block of `rows` that reads `tiles`: they alone decide, so that results depend on neither the
// batch nor the number of threads.
static inline int64_t tiles_per_split(int64_t tiles, int64_t rows) {
  const int64_t splits = kSplitRows / rows;
  const int64_t fewest = (tiles + splits - 1) / splits;
  return fewest > kTilesPerSplit ? fewest : kTilesPerSplit;
}

static inline int64_t splits_of(int64_t tiles, int64_t rows) {
  const int64_t size = tiles_per_split(tiles, rows);
  return (tiles + size - 1) / size;
}

static inline int64_t padded_dim(int64_t head_dim) {
  return (head_dim + kPadLanes - 1) / kPadLanes * kPadLanes;
}

// Floats of scratch one thread needs: queries, output, key tile, value tile, scores, row state.
static inline int64_t memory_attention_scratch(int64_t head_dim, int64_t block_rows) {
  const int64_t dim = padded_dim(head_dim);
  return 2 * block_rows * dim + 2 * kTileKeys * dim + 8 * kTileKeys + kTileKeys +
         block_rows * (1 + kPadLanes);
}

// Computes one work item; scratch is 64-byte aligned.
using MemoryAttentionFn = void (*)(const MemoryAttentionParams&, int64_t item, float* scratch);
void memory_attention_generic(const MemoryAttentionParams&, int64_t item, float* scratch);
void memory_attention_avx2(const MemoryAttentionParams&, int64_t item, float* scratch);
void memory_attention_avx512(const MemoryAttentionParams&, int64_t item, float* scratch);

// The same for bfloat16 queries on AMX, whose tiles multiply in bfloat16 and sum up in float32.
constexpr int64_t kAmxRows = 16;
static inline int64_t memory_attention_amx_scratch(int64_t head_dim, int64_t block_rows) {
  const int64_t rows = (block_rows + kAmxRows - 1) / kAmxRows * kAmxRows;
  return rows * head_dim / 2 * 3 + kTileKeys * head_dim / 2 * 7 + kAmxRows * kTileKeys / 2 * 3 +
         kTileKeys + rows * (1 + kPadLanes);
}
static inline bool amx_takes(const MemoryAttentionParams& p) {
  return p.dtype == Dtype::kBFloat16 && p.head_dim % 32 == 0 && p.block_rows >= kAmxRows;
}
void memory_attention_amx(const MemoryAttentionParams&, int64_t item, float* scratch);

// Merges the splits of one block; `block` counts items without their splits.
using MergeSplitsFn = void (*)(const MemoryAttentionParams&, int64_t block);
void merge_splits_generic(const MemoryAttentionParams&, int64_t block);
void merge_splits_avx2(const MemoryAttentionParams&, int64_t block);
void merge_splits_avx512(const MemoryAttentionParams&, int64_t block);

}  // namespace lychee
