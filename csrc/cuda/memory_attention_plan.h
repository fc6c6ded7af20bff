// SPDX-License-Identifier: Apache-2.0
// How memory_attention cuts its work on a GPU: kernel, row blocks, splits of the keys. Plain
// functions of sizes, without CUDA and without Torch, so that they are tested anywhere.
//
// No op computes a schedule of splits beforehand. The grid has room for the longest row that shapes
// allow; each block finds its split from its row's number of pages on the device (find_work in
// memory_attention_tiles.cuh), and blocks without one exit. So select_chunks has nothing to add, a
// captured graph serves every selection, and a row's bits do not depend on the batch around it.
#pragma once

#include <cstdint>

#include "dispatch.h"

#if defined(__CUDACC__)
#define LYCHEE_PLAN __host__ __device__ constexpr
#else
#define LYCHEE_PLAN constexpr
#endif

namespace lychee::cuda {

// Keys that a block of threads loads at once: a page of the bank, or a part of a larger one.
constexpr int kTileKeys = 64;
// Rows (query tokens x heads of one kv head) of a block of threads.
constexpr int kDecodeRows = 16;
constexpr int kPrefillRows = 64;
// Threads of a block of every kernel: four warps, each with 16 keys of a tile or 16 rows.
constexpr int kAttentionThreads = 128;

enum class AttentionKernel { kDecode, kPrefill, kSimple };

LYCHEE_PLAN int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles that one split reads, of a row's own number of tiles only, so that results do not depend
// on the batch: few for few, since latency counts there; at most 64 splits of many.
LYCHEE_PLAN int64_t tiles_per_split(int64_t tiles) {
  const int64_t sixteenth = divide_up(tiles, 16), share = divide_up(tiles, 64);
  const int64_t short_row = sixteenth < 2 ? 2 : sixteenth > 8 ? 8 : sixteenth;
  return share > short_row ? share : short_row;
}

LYCHEE_PLAN int64_t num_splits(int64_t tiles) { return divide_up(tiles, tiles_per_split(tiles)); }

// The most splits that a row of at most `tiles` tiles may have.
LYCHEE_PLAN int64_t max_splits(int64_t tiles) {
  if (tiles <= 32) return divide_up(tiles, 2);
  if (tiles <= 128) return 16;
  return tiles < 512 ? divide_up(tiles, 8) : 64;
}

// What decides between the kernels. `aligned`: rows and tables start at multiples of 16 bytes.
struct AttentionShape {
  Dtype dtype, bank_dtype;  // the same where there is no bank
  int64_t head_dim;
  int64_t rows;  // query tokens x heads of one kv head
  bool aligned;
};

LYCHEE_PLAN AttentionKernel choose_kernel(const AttentionShape& shape) {
  const bool quantised = shape.bank_dtype == Dtype::kInt8 || shape.bank_dtype == Dtype::kFloat8E4M3;
  const bool tuned = shape.dtype != Dtype::kFloat32 && shape.aligned &&
                     (shape.head_dim == 64 || shape.head_dim == 128) &&
                     (quantised || shape.bank_dtype == shape.dtype);
  if (!tuned) return AttentionKernel::kSimple;
  return shape.rows <= kDecodeRows ? AttentionKernel::kDecode : AttentionKernel::kPrefill;
}

// Blocks of threads per batch entry and kv head, and where their partial results go. Splits are
// used only where one block holds every row: else there is work enough, and room would run out.
struct AttentionGrid {
  int64_t row_blocks;
  int64_t block_rows;                   // rows of a full block that exist
  int64_t page_splits, segment_splits;  // the most; both 0: one block reads every key
  int64_t splits() const { return page_splits + segment_splits; }
  int64_t blocks() const { return row_blocks * (splits() > 1 ? splits() : 1); }
};

constexpr AttentionGrid plan_grid(AttentionKernel kernel, int64_t rows, int64_t page_tiles,
                                  int64_t segment_tiles) {
  const int64_t most = kernel == AttentionKernel::kPrefill ? kPrefillRows : kDecodeRows;
  AttentionGrid grid{divide_up(rows, most), rows < most ? rows : most, 0, 0};
  if (kernel == AttentionKernel::kPrefill || grid.row_blocks > 1) return grid;
  grid.page_splits = max_splits(page_tiles);
  grid.segment_splits = num_splits(segment_tiles);
  return grid;
}

// Floats of one split's partial result: outputs of its rows, then the log2 of their sums.
LYCHEE_PLAN int64_t partial_floats(int64_t block_rows, int64_t head_dim) {
  return block_rows * head_dim + kDecodeRows;
}

}  // namespace lychee::cuda
