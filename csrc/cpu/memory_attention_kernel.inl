// SPDX-License-Identifier: Apache-2.0
// The memory_attention loop, written once against vec_*.h. A block of query rows (tokens x heads of
// one kv head) meets the keys in tiles of 64: the tile is dequantised, rotated and transposed into
// scratch, then groups of kRowBlock rows take scores, an online base-2 softmax, and weighted
// values.
#pragma once

#include "cpu/memory_attention_tiles.inl"

namespace lychee {
namespace {

constexpr float kLn2 = 0.693147181f;
// A row's reference maximum moves only when a score exceeds it by this many powers of two: the
// weights stay below 2^8, and rows are almost never rescaled after their first tiles.
constexpr float kMaximumSlack = 8.0f;

// Calls fn with a compile-time number of vectors, covering `vectors` of them from left to right.
template <class Fn>
inline void for_panels(int64_t vectors, const Fn& fn) {
  int64_t c = 0;
  for (; c + kColBlock <= vectors; c += kColBlock) {
    fn(c * kLanes, std::integral_constant<int, kColBlock>());
  }
  if (kColBlock > 2 && c + 2 <= vectors) {
    fn(c * kLanes, std::integral_constant<int, 2>());
    c += 2;
  }
  if (c < vectors) fn(c * kLanes, std::integral_constant<int, 1>());
}

// scores[m][j] = sum_d q[m][d] keys[d][j], for M rows and C vectors of keys.
template <int M, int C>
inline void score_panel(const float* q, int64_t q_stride, const float* keys, int64_t head_dim,
                        float* scores) {
  Vec acc[M][C];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[m][c] = zero();
  }
  for (int64_t d = 0; d < head_dim; ++d) {
    Vec key[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) key[c] = load(keys + d * kTileKeys + c * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = broadcast(q[m * q_stride + d]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[m][c] = fma(x, key[c], acc[m][c]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(scores + m * kTileKeys + c * kLanes, acc[m][c]);
  }
}

// out[m][d] += sum_j weights[m][j] values[j][d], for M rows and C vectors of dimensions.
template <int M, int C>
inline void value_panel(const float* weights, const float* values, int64_t value_stride,
                        int64_t count, float* out, int64_t out_stride) {
  Vec acc[M][C];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[m][c] = load(out + m * out_stride + c * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
    Vec value[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) value[c] = load(values + j * value_stride + c * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = broadcast(weights[m * kTileKeys + j]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[m][c] = fma(x, value[c], acc[m][c]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(out + m * out_stride + c * kLanes, acc[m][c]);
  }
}

// Turns the scores of one row into weights 2^(score - maximum), in place.
template <bool kMasked>
inline void softmax_row(float* scores, int64_t vectors, int64_t visible, const float* keep,
                        float* maximum, float* sum, float* out, int64_t dim) {
  constexpr int kVectors = kTileKeys / kLanes;
  const int count = kMasked ? static_cast<int>(vectors) : kVectors;
  Vec x[kVectors];
  Vec largest = broadcast(-INFINITY);
  for (int c = 0; c < count; ++c) {
    x[c] = load(scores + c * kLanes);
    if (kMasked) x[c] = keep_first(x[c], visible - c * kLanes);
    if (kMasked && keep != nullptr) x[c] = keep_where(x[c], load(keep + c * kLanes));
    largest = max(largest, x[c]);
  }
  float m = *maximum;
  if (any_greater(largest, broadcast(m + kMaximumSlack))) {
    const float raised = reduce_max(largest);
    if (m != -INFINITY) {
      const Vec factor = exp2(broadcast(m - raised));
      store(sum, mul(load(sum), factor));
      for (int64_t d = 0; d < dim; d += kLanes) store(out + d, mul(load(out + d), factor));
    }
    *maximum = m = raised;
  }
  // A row that has seen no key yet keeps weights of 2^-inf = 0 instead of NaN.
  const Vec shift = broadcast(m == -INFINITY ? 0.0f : m);
  Vec total = load(sum);
  for (int c = 0; c < count; ++c) {
    const Vec weight = exp2(sub(x[c], shift));
    total = add(total, weight);
    store(scores + c * kLanes, weight);
  }
  store(sum, total);
}

template <int M>
inline void attend_rows(const Block& block, const TileView& tile, int64_t head_dim, int64_t row) {
  const int64_t first_token = block.first_token + row / block.group;
  const int64_t last_token = block.first_token + (row + M - 1) / block.group;
  const int64_t visible = tile.visible(last_token);
  if (visible == 0) return;
  const int64_t vectors = (visible + kLanes - 1) / kLanes;
  for_panels(vectors, [&](int64_t column, auto width) {
    score_panel<M, width()>(block.q + row * block.dim, block.dim, block.keys + column, head_dim,
                            block.scores + column);
  });
  const bool full = tile.keep == nullptr && tile.visible(first_token) == kTileKeys;
  for (int m = 0; m < M; ++m) {
    float* scores = block.scores + m * kTileKeys;
    float* sum = block.sum + (row + m) * kPadLanes;
    float* out = block.out + (row + m) * block.dim;
    if (full) {
      softmax_row<false>(scores, vectors, visible, nullptr, block.maximum + row + m, sum, out,
                         block.dim);
    } else {
      const int64_t token = block.first_token + (row + m) / block.group;
      softmax_row<true>(scores, vectors, tile.visible(token), tile.keep, block.maximum + row + m,
                        sum, out, block.dim);
    }
  }
  for_panels(block.dim / kLanes, [&](int64_t column, auto width) {
    value_panel<M, width()>(block.scores, tile.values + column, tile.value_stride, visible,
                            block.out + row * block.dim + column, block.dim);
  });
}

// attend_rows for the last rows of a block, fewer than kRowBlock.
template <int M>
inline void attend_last_rows(const Block& block, const TileView& tile, int64_t head_dim,
                             int64_t row) {
  if constexpr (M > 0) {
    if (block.rows - row == M) return attend_rows<M>(block, tile, head_dim, row);
    attend_last_rows<M - 1>(block, tile, head_dim, row);
  }
}

inline void attend_tile(const Block& block, const TileView& tile, int64_t head_dim) {
  int64_t row = 0;
  for (; row + kRowBlock <= block.rows; row += kRowBlock) {
    attend_rows<kRowBlock>(block, tile, head_dim, row);
  }
  if (row < block.rows) attend_last_rows<kRowBlock - 1>(block, tile, head_dim, row);
}

// Normalises one row and stores it with its log-sum-exp; `total` is 0 for an empty key set.
template <class T>
inline void store_row(const MemoryAttentionParams& p, int64_t batch, int64_t head, int64_t token,
                      const float* row, float maximum, float total) {
  T* out =
      static_cast<T*>(p.out) + ((batch * p.num_queries + token) * p.num_heads + head) * p.head_dim;
  const Vec inverse = broadcast(total > 0.0f || total != total ? 1.0f / total : 0.0f);
  for (int64_t d = 0; d < p.head_dim; d += kLanes) {
    store_first(out + d, mul(load(row + d), inverse), p.head_dim - d);
  }
  const int64_t index = (batch * p.num_heads + head) * p.num_queries + token;
  p.lse[index] = total == 0.0f ? -INFINITY : (maximum + log2f(total)) * kLn2;
}

template <class T>
void memory_attention_item(const MemoryAttentionParams& p, int64_t item, float* scratch) {
  const Block block = make_block(p, item, scratch);
  load_queries<T>(p, block);
  int64_t begin = p.tile_begin[block.batch], end = p.tile_begin[block.batch + 1];
  if (p.num_splits > 1) {
    begin += block.split * kTilesPerSplit;
    end = end < begin + kTilesPerSplit ? end : begin + kTilesPerSplit;
  }
  const int64_t last_token = block.first_token + block.rows / block.group - 1;
  const int64_t segment_end = p.num_keys - (p.num_queries - 1 - last_token) * p.query_stride;
  for (int64_t i = begin; i < end; ++i) {
    const KeyTile& tile = p.tiles[i];
    if (tile.page < 0 && tile.first >= segment_end) break;
    const TileView view =
        tile.page < 0 ? load_segment_tile<T>(p, block, tile) : load_page_tile(p, block, tile);
    attend_tile(block, view, p.head_dim);
  }
  float* partial = p.partial + item * p.block_rows * p.partial_stride;
  for (int64_t r = 0; r < block.rows; ++r) {
    const float* row = block.out + r * block.dim;
    const float total = reduce_add(load(block.sum + r * kPadLanes));
    if (p.partial != nullptr) {
      float* slot = partial + r * p.partial_stride;
      memcpy(slot, row, block.dim * sizeof(float));
      slot[block.dim] = block.maximum[r];
      slot[block.dim + 1] = total;
    } else {
      store_row<T>(p, block.batch, block.kv_head * block.group + r % block.group,
                   block.first_token + r / block.group, row, block.maximum[r], total);
    }
  }
}

template <class T>
void merge_block(const MemoryAttentionParams& p, int64_t index) {
  const int64_t group = p.num_heads / p.num_kv_heads, dim = padded_dim(p.head_dim);
  const int64_t first_token = index % p.num_blocks * p.block_tokens;
  const int64_t kv_head = index / p.num_blocks % p.num_kv_heads;
  const int64_t batch = index / p.num_blocks / p.num_kv_heads;
  const int64_t left = p.num_queries - first_token;
  const int64_t rows = (left < p.block_tokens ? left : p.block_tokens) * group;
  const int64_t split_stride = p.block_rows * p.partial_stride;
  for (int64_t r = 0; r < rows; ++r) {
    // Splits are summed in order into the first one's slot.
    float* row = p.partial + index * p.num_splits * split_stride + r * p.partial_stride;
    float maximum = -INFINITY, total = 0.0f;
    for (int64_t s = 0; s < p.num_splits; ++s) {
      const float m = row[s * split_stride + dim];
      maximum = m > maximum ? m : maximum;
    }
    for (int64_t s = 0; s < p.num_splits; ++s) {
      const float* other = row + s * split_stride;
      const float factor = other[dim] == -INFINITY ? 0.0f : exp2f(other[dim] - maximum);
      total += factor * other[dim + 1];
      for (int64_t d = 0; d < dim; d += kLanes) {
        const Vec x = mul(load(other + d), broadcast(factor));
        store(row + d, s == 0 ? x : add(load(row + d), x));
      }
    }
    store_row<T>(p, batch, kv_head * group + r % group, first_token + r / group, row, maximum,
                 total);
  }
}

inline void memory_attention_kernel(const MemoryAttentionParams& p, int64_t item, float* scratch) {
  dispatch_io_dtype(p.dtype,
                    [&](auto tag) { memory_attention_item<decltype(tag)>(p, item, scratch); });
}

inline void merge_splits_kernel(const MemoryAttentionParams& p, int64_t block) {
  dispatch_io_dtype(p.dtype, [&](auto tag) { merge_block<decltype(tag)>(p, block); });
}

}  // namespace
}  // namespace lychee
