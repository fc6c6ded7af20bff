// SPDX-License-Identifier: Apache-2.0
// The memory_attention loop, written once against vec_*.h. A block of query rows (tokens x heads of
// one kv head) meets the keys in tiles of 64: the tile is dequantised, rotated and transposed into
// scratch, then groups of kRowBlock rows take scores, an online base-2 softmax, and weighted
// values.
#pragma once

#include "cpu/memory_attention_decode.inl"
#include "cpu/memory_attention_products.inl"
#include "cpu/memory_attention_tiles.inl"

namespace lychee {
namespace {

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

// Turns the scores of `count` rows from `row` on into weights, each row's up to what it sees.
inline void softmax_rows(const Block& block, const TileView& tile, int64_t row, int64_t count,
                         int64_t vectors, int64_t visible) {
  const int64_t first_token = block.first_token + row / block.group;
  const bool full = tile.keep == nullptr && tile.visible(first_token) == kTileKeys;
  for (int64_t m = 0; m < count; ++m) {
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
}

template <int M>
inline void attend_rows(const Block& block, const TileView& tile, int64_t head_dim, int64_t row) {
  const int64_t last_token = block.first_token + (row + M - 1) / block.group;
  const int64_t visible = tile.visible(last_token);
  if (visible == 0) return;
  const int64_t vectors = (visible + kLanes - 1) / kLanes;
  for_panels(vectors, [&](int64_t column, auto width) {
    score_panel<M, width()>(block.q + row * block.dim, block.dim, block.keys + column, head_dim,
                            block.scores + column);
  });
  softmax_rows(block, tile, row, M, vectors, visible);
  for_panels(block.dim / kLanes, [&](int64_t column, auto width) {
    value_panel<M, width()>(block.scores, tile.values + column, tile.value_stride, visible,
                            block.out + row * block.dim + column, block.dim);
  });
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

// Ends one row of an item: stored, or left for merge_splits.
template <class T>
inline void finish_row(const MemoryAttentionParams& p, const Block& block, int64_t item, int64_t r,
                       const float* row, float maximum, float total) {
  if (p.partial == nullptr) {
    store_row<T>(p, block.batch, block.kv_head * block.group + r % block.group,
                 block.first_token + r / block.group, row, maximum, total);
    return;
  }
  float* slot = p.partial + (item * p.block_rows + r) * p.partial_stride;
  memcpy(slot, row, block.dim * sizeof(float));
  slot[block.dim] = maximum;
  slot[block.dim + 1] = total;
}

template <class T>
void decode_item(const MemoryAttentionParams& p, const Block& block, int64_t item, int64_t begin,
                 int64_t end, float* scratch) {
  Decode work = make_decode(p, scratch);
  const Vec scale = broadcast(p.softmax_scale * kLog2E);
  const T* q = static_cast<const T*>(p.q) + block.batch * p.q_batch_stride +
               block.kv_head * block.group * p.q_head_stride;
  for (int64_t r = 0; r < block.rows; ++r) {
    const T* row = q + r * p.q_head_stride;
    for (int64_t d = 0; d < p.head_dim / 2; d += kLanes) {
      store(work.q + packed(d, r), mul(load(row + d), scale));
      store(work.q + packed(d, r) + kLanes, mul(load(row + p.head_dim / 2 + d), scale));
    }
  }
  const auto tiles = block.rows == 1   ? decode_tiles<1, T>
                     : block.rows == 2 ? decode_tiles<2, T>
                     : block.rows <= 4 ? decode_tiles<4, T>
                     : block.rows <= 7 ? decode_tiles<7, T>
                                       : decode_tiles<8, T>;
  tiles(p, &work, block.batch, block.kv_head, begin, end);
  float maximum[kDecodeRows > kLanes ? kDecodeRows : kLanes];
  float total[kDecodeRows > kLanes ? kDecodeRows : kLanes];
  for (int i = 0; i < kRowVectors; ++i) {
    store(maximum + i * kLanes, work.maximum[i]);
    // Wide vectors sum two keys side by side.
    store(total + i * kLanes,
          kSharedKeys == 1 ? work.sum[i] : add(work.sum[i], swap_eights(work.sum[i])));
  }
  for (int64_t r = 0; r < block.rows; ++r) {
    finish_row<T>(p, block, item, r, work.out + r * work.dim, maximum[r], total[r]);
  }
}

// The item's tiles, of its split alone: first and behind the last.
inline void tile_range(const MemoryAttentionParams& p, const Block& block, int64_t* begin,
                       int64_t* end) {
  *begin = p.tile_begin[block.batch], *end = p.tile_begin[block.batch + 1];
  if (p.num_splits == 1) return;
  const int64_t size = tiles_per_split(*end - *begin, p.block_rows);
  *begin += block.split * size;
  if (*end > *begin + size) *end = *begin + size;
}

// Calls fn(tile) for every tile that some row of the block sees.
template <class Fn>
inline void for_tiles(const MemoryAttentionParams& p, const Block& block, int64_t begin,
                      int64_t end, const Fn& fn) {
  const int64_t last_token = block.first_token + block.rows / block.group - 1;
  const int64_t segment_end = p.num_keys - (p.num_queries - 1 - last_token) * p.query_stride;
  for (int64_t i = begin; i < end; ++i) {
    if (p.tiles[i].page < 0 && p.tiles[i].first >= segment_end) break;
    fn(p.tiles[i]);
  }
}

template <class T>
void finish_rows(const MemoryAttentionParams& p, const Block& block, int64_t item) {
  for (int64_t r = 0; r < block.rows; ++r) {
    finish_row<T>(p, block, item, r, block.out + r * block.dim, block.maximum[r],
                  reduce_add(load(block.sum + r * kPadLanes)));
  }
}

template <class T>
void memory_attention_item(const MemoryAttentionParams& p, int64_t item, float* scratch) {
  const Block block = make_block(p, item, scratch);
  int64_t begin, end;
  tile_range(p, block, &begin, &end);
  if (is_decode(p)) return decode_item<T>(p, block, item, begin, end, scratch);
  load_queries<T>(p, block);
  for_tiles(p, block, begin, end, [&](const KeyTile& tile) {
    const TileView view =
        tile.page < 0 ? load_segment_tile<T>(p, block, tile) : load_page_tile(p, block, tile);
    for_rows(block.rows,
             [&](int64_t row, auto m) { attend_rows<m()>(block, view, p.head_dim, row); });
  });
  finish_rows<T>(p, block, item);
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
