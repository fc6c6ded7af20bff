// SPDX-License-Identifier: Apache-2.0
// The operands of memory_attention in scratch, written once against vec_*.h: scaled queries of a
// block, and tiles of keys (dequantised, rotated, transposed) and values (dequantised).
#pragma once

#include "cpu/memory_attention.h"
#include LYCHEE_VEC_HEADER
#include "cpu/vec_tail.h"

namespace lychee {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
// A row's reference maximum moves only when a score exceeds it by this many powers of two: the
// weights stay below 2^8, and rows are almost never rescaled after their first tiles.
constexpr float kMaximumSlack = 8.0f;

struct Block {
  int64_t batch, kv_head, split;
  int64_t group;        // query heads per kv head
  int64_t first_token;  // of the block
  int64_t rows;         // tokens * group; row r is token first_token + r / group
  int64_t dim;          // padded head dimension: the row stride of scratch
  float *q, *out;       // [rows, dim]; q carries softmax_scale * log2(e)
  float* keys;          // [head_dim, kTileKeys]
  float* values;        // [kTileKeys, dim]
  float* scores;        // [kRowBlock, kTileKeys]
  float* keep;          // [kTileKeys], 0 where a key is not valid
  float* maximum;       // [rows]
  float* sum;           // [rows, kPadLanes], partial sums by lane
};

// What the row loop needs of the tile at hand.
struct TileView {
  const float* values;
  int64_t value_stride;
  const float* keep;  // null: every key is valid
  int64_t count;
  int64_t first_visible;  // keys visible to token 0; token t sees t * query_stride more
  int64_t query_stride;
  int64_t visible(int64_t token) const {
    const int64_t keys = first_visible + token * query_stride;
    return keys < 0 ? 0 : keys > count ? count : keys;
  }
  // The first token that sees the key; call it only where some token does.
  int64_t first_token(int64_t key) const {
    const int64_t missing = key + 1 - first_visible;
    return missing <= 0 ? 0 : (missing + query_stride - 1) / query_stride;
  }
};

// What turns the stored rows of a tile into keys and values.
struct TileSource {
  const float *scale = nullptr, *value_scale = nullptr;  // of a quantised bank
  const float *cos = nullptr, *sin = nullptr;            // at the tile's first position
  const float* keep = nullptr;                           // as in TileView
};

inline Block make_block(const MemoryAttentionParams& p, int64_t item, float* scratch) {
  Block block;
  block.split = item % p.num_splits;
  item /= p.num_splits;
  block.first_token = item % p.num_blocks * p.block_tokens;
  item /= p.num_blocks;
  block.kv_head = item % p.num_kv_heads;
  block.batch = item / p.num_kv_heads;
  block.group = p.num_heads / p.num_kv_heads;
  const int64_t left = p.num_queries - block.first_token;
  block.rows = (left < p.block_tokens ? left : p.block_tokens) * block.group;
  block.dim = padded_dim(p.head_dim);
  block.q = scratch;
  block.out = block.q + p.block_rows * block.dim;
  block.keys = block.out + p.block_rows * block.dim;
  block.values = block.keys + kTileKeys * block.dim;
  block.scores = block.values + kTileKeys * block.dim;
  block.keep = block.scores + 8 * kTileKeys;
  block.sum = block.keep + kTileKeys;
  block.maximum = block.sum + p.block_rows * kPadLanes;
  return block;
}

template <class T>
inline void load_queries(const MemoryAttentionParams& p, const Block& block) {
  const Vec scale = broadcast(p.softmax_scale * kLog2E);
  const T* q = static_cast<const T*>(p.q) + block.batch * p.q_batch_stride;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t head = block.kv_head * block.group + r % block.group;
    const int64_t token = block.first_token + r / block.group;
    const T* row = q + head * p.q_head_stride + token * p.q_token_stride;
    for (int64_t d = 0; d < p.head_dim; d += kLanes) {
      store(block.q + r * block.dim + d, mul(load_first(row + d, p.head_dim - d), scale));
    }
    block.maximum[r] = -INFINITY;
  }
  memset(block.sum, 0, block.rows * kPadLanes * sizeof(float));
  memset(block.out, 0, block.rows * block.dim * sizeof(float));
}

// Transposes kLanes keys x kLanes dimensions, of which `dims` exist, into keys[dim][key].
inline void store_transposed(Vec (&rows)[kLanes], float* keys, int64_t dims) {
  transpose(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i < dims) store(keys + i * kTileKeys, rows[i]);
  }
}

// One block of pack_keys: kLanes keys, of which `rows` exist, and kLanes dimensions, of which
// `dims` exist; with kRotate also their partners half a head away.
template <bool kRotate, bool kWhole, class T>
inline void pack_key_block(const T* k, int64_t stride, const float* scale, const float* cos,
                           const float* sin, int64_t half, int64_t rows, int64_t dims,
                           float* keys) {
  const auto read = [&](const auto* p) { return kWhole ? load(p) : load_first(p, dims); };
  Vec a[kLanes], b[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    a[i] = b[i] = zero();
    if (!kWhole && i >= rows) continue;
    const Vec factor = broadcast(scale == nullptr ? 1.0f : scale[i]);
    const Vec x1 = mul(read(k + i * stride), factor);
    a[i] = x1;
    if constexpr (kRotate) {
      const Vec x2 = mul(read(k + i * stride + half), factor);
      const Vec c = read(cos + i * half), s = read(sin + i * half);
      a[i] = fms(x1, c, mul(x2, s));
      b[i] = fma(x2, c, mul(x1, s));
    }
  }
  store_transposed(a, keys, dims);
  if constexpr (kRotate) store_transposed(b, keys + half * kTileKeys, dims);
}

// keys[d][j] = scale[j] * rotated(k[j])[d]; columns beyond `count` up to a whole vector are zero.
template <bool kRotate, class T>
void pack_keys(const T* k, int64_t stride, const float* scale, const float* cos, const float* sin,
               int64_t head_dim, int64_t count, float* keys) {
  const int64_t half = head_dim / 2, span = kRotate ? half : head_dim;
  for (int64_t j = 0; j < count; j += kLanes) {
    for (int64_t d = 0; d < span; d += kLanes) {
      const bool whole = count - j >= kLanes && span - d >= kLanes;
      const auto pack =
          whole ? pack_key_block<kRotate, true, T> : pack_key_block<kRotate, false, T>;
      pack(k + j * stride + d, stride, scale == nullptr ? nullptr : scale + j,
           kRotate ? cos + j * half + d : nullptr, kRotate ? sin + j * half + d : nullptr, half,
           count - j, span - d, keys + d * kTileKeys + j);
    }
  }
}

// rows[j] = scale[j] * rotated(x[j]) in float, padded to `dim` with zeros; zero where `keep` is 0,
// since a masked row may hold anything.
template <bool kRotate, class T>
void load_rows(const T* x, int64_t stride, const float* scale, const float* keep, const float* cos,
               const float* sin, int64_t head_dim, int64_t count, float* rows, int64_t dim) {
  const int64_t half = head_dim / 2;
  for (int64_t j = 0; j < count; ++j, x += stride, rows += dim) {
    if (kRotate || (keep != nullptr && keep[j] == 0.0f)) memset(rows, 0, dim * sizeof(float));
    if (keep != nullptr && keep[j] == 0.0f) continue;
    const Vec factor = broadcast(scale == nullptr ? 1.0f : scale[j]);
    if constexpr (kRotate) {
      for (int64_t d = 0; d < half; d += kLanes) {
        const Vec x1 = mul(load_first(x + d, half - d), factor);
        const Vec x2 = mul(load_first(x + half + d, half - d), factor);
        const Vec c = load_first(cos + j * half + d, half - d);
        const Vec s = load_first(sin + j * half + d, half - d);
        store_first(rows + d, fms(x1, c, mul(x2, s)), half - d);
        store_first(rows + half + d, fma(x2, c, mul(x1, s)), half - d);
      }
    } else {
      for (int64_t d = 0; d < dim; d += kLanes) {
        store(rows + d, d < head_dim ? mul(load_first(x + d, head_dim - d), factor) : zero());
      }
    }
  }
}

// Values as rows in float; dense float rows of whole vectors are used where they are.
template <class T>
const float* load_values(const T* v, int64_t stride, const float* scale, const float* keep,
                         int64_t head_dim, int64_t count, const Block& block) {
  if constexpr (std::is_same_v<T, float>) {
    const bool dense = stride == head_dim && head_dim == block.dim;
    if (dense && scale == nullptr && keep == nullptr) return v;
  }
  load_rows<false>(v, stride, scale, keep, nullptr, nullptr, head_dim, count, block.values,
                   block.dim);
  return block.values;
}

inline TileSource page_source(const MemoryAttentionParams& p, int64_t kv_head,
                              const KeyTile& tile) {
  TileSource source;
  if (p.kv_scale != nullptr) {
    source.scale =
        p.kv_scale + tile.page * p.scale_page_stride + kv_head * p.scale_head_stride + tile.first;
    source.value_scale = source.scale + p.scale_part_stride;
  }
  if (p.cos != nullptr) {
    source.cos = p.cos + tile.position * (p.head_dim / 2);
    source.sin = p.sin + tile.position * (p.head_dim / 2);
  }
  return source;
}

// The tile's keys in a bank of T; its values lie page_part_stride further.
template <class T>
inline const T* page_keys(const MemoryAttentionParams& p, int64_t kv_head, const KeyTile& tile) {
  return static_cast<const T*>(p.kv) + tile.page * p.page_stride + kv_head * p.page_head_stride +
         tile.first * p.page_token_stride;
}

template <class T>
inline const T* segment_keys(const MemoryAttentionParams& p, int64_t batch, int64_t kv_head,
                             const KeyTile& tile) {
  return static_cast<const T*>(p.k) + batch * p.k_batch_stride + kv_head * p.k_head_stride +
         tile.first * p.k_token_stride;
}
template <class T>
inline const T* segment_values(const MemoryAttentionParams& p, int64_t batch, int64_t kv_head,
                               const KeyTile& tile) {
  return static_cast<const T*>(p.v) + batch * p.v_batch_stride + kv_head * p.v_head_stride +
         tile.first * p.v_token_stride;
}

// Fills `keep` from the segment's validity; null if every key of the tile is valid.
inline const float* load_keep(const MemoryAttentionParams& p, int64_t batch, const KeyTile& tile,
                              float* keep) {
  if (p.valid == nullptr) return nullptr;
  const bool* valid = p.valid + batch * p.valid_stride + tile.first;
  bool all = true;
  for (int64_t j = 0; j < kTileKeys; ++j) {
    keep[j] = j < tile.count && valid[j] ? 1.0f : 0.0f;
    all = all && (j >= tile.count || valid[j]);
  }
  return all ? nullptr : keep;
}

// Query t sees keys up to num_keys - 1 - (num_queries - 1 - t) * query_stride of the segment.
inline TileView segment_view(const MemoryAttentionParams& p, const KeyTile& tile,
                             const float* values, int64_t value_stride, const float* keep) {
  const int64_t first_visible = p.num_keys - (p.num_queries - 1) * p.query_stride - tile.first;
  return {values, value_stride, keep, tile.count, first_visible, p.query_stride};
}

inline TileView load_page_tile(const MemoryAttentionParams& p, const Block& block,
                               const KeyTile& tile) {
  const TileSource source = page_source(p, block.kv_head, tile);
  const float* values = nullptr;
  dispatch_bank_dtype(p.bank_dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* k = page_keys<T>(p, block.kv_head, tile);
    const auto pack = source.cos == nullptr ? pack_keys<false, T> : pack_keys<true, T>;
    pack(k, p.page_token_stride, source.scale, source.cos, source.sin, p.head_dim, tile.count,
         block.keys);
    values = load_values(k + p.page_part_stride, p.page_token_stride, source.value_scale, nullptr,
                         p.head_dim, tile.count, block);
  });
  return {values, block.dim, nullptr, tile.count, tile.count, 0};
}

template <class T>
inline TileView load_segment_tile(const MemoryAttentionParams& p, const Block& block,
                                  const KeyTile& tile) {
  const float* keep = load_keep(p, block.batch, tile, block.keep);
  pack_keys<false>(segment_keys<T>(p, block.batch, block.kv_head, tile), p.k_token_stride, nullptr,
                   nullptr, nullptr, p.head_dim, tile.count, block.keys);
  const float* values =
      load_values<T>(segment_values<T>(p, block.batch, block.kv_head, tile), p.v_token_stride,
                     nullptr, keep, p.head_dim, tile.count, block);
  return segment_view(p, tile, values, block.dim, keep);
}

}  // namespace
}  // namespace lychee
