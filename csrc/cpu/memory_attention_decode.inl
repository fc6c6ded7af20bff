// SPDX-License-Identifier: Apache-2.0
// memory_attention for one query token and at most eight heads per kv head, written once against
// vec_*.h. So few rows do not pay for a transposed copy of the keys: scores are dot products with
// the rows as stored, dequantised and rotated in registers. Scores and weights lie key by key,
// eight rows each.
#pragma once

#include "cpu/memory_attention_tiles.inl"

namespace lychee {
namespace {

constexpr int kDecodeRows = 8;
// Keys that share one vector of scores, and vectors of scores that one key fills.
constexpr int kSharedKeys = kLanes > kDecodeRows ? kLanes / kDecodeRows : 1;
constexpr int kRowVectors = kLanes > kDecodeRows ? 1 : kDecodeRows / kLanes;

// Whether decode_rows applies.
inline bool is_decode(const MemoryAttentionParams& p) {
  return p.num_queries == 1 && p.num_heads / p.num_kv_heads <= kDecodeRows &&
         p.head_dim / 2 % kLanes == 0;
}

struct Decode {
  int64_t head_dim, dim;       // dim: padded, the row stride of scratch
  float *q, *rotated;          // packed queries; `rotated` back by the tile's position
  float* out;                  // [kDecodeRows, dim]
  float* scores;               // [kTileKeys, kDecodeRows]
  float* values;               // [kTileKeys, dim], for tiles with masked rows
  float* keep;                 // [kTileKeys]
  float *base_cos, *base_sin;  // [head_dim / 2]: inverse of the rotation at position 0
  Vec maximum[kRowVectors], sum[kRowVectors];
};

// Where a packed query holds the vectors at d, and next to it at head_dim / 2 + d, of row m.
inline int64_t packed(int64_t d, int64_t m) { return (d * kDecodeRows + m * kLanes) * 2; }

inline Decode make_decode(const MemoryAttentionParams& p, float* scratch) {
  Decode work;
  work.head_dim = p.head_dim;
  work.dim = padded_dim(p.head_dim);
  work.q = scratch;
  work.rotated = work.q + kDecodeRows * work.dim;
  work.out = work.rotated + kDecodeRows * work.dim;
  work.values = work.out + kDecodeRows * work.dim;
  work.scores = work.values + kTileKeys * work.dim;
  work.keep = work.scores + kTileKeys * kDecodeRows;
  work.base_cos = work.keep + kTileKeys;
  work.base_sin = work.base_cos + work.dim;
  for (int i = 0; i < kRowVectors; ++i) {
    work.maximum[i] = broadcast(-INFINITY);
    work.sum[i] = zero();
  }
  memset(work.q, 0, kDecodeRows * work.dim * sizeof(float));
  memset(work.out, 0, kDecodeRows * work.dim * sizeof(float));
  const int64_t half = p.head_dim / 2;
  for (int64_t d = 0; p.cos != nullptr && d < half; ++d) {
    const float square = p.cos[d] * p.cos[d] + p.sin[d] * p.sin[d];
    work.base_cos[d] = p.cos[d] / square;
    work.base_sin[d] = p.sin[d] / square;
  }
  return work;
}

// Rows of the rotation tables that keys meet; they stay in the first-level cache.
constexpr int64_t kTableKeys = kTileKeys / 2;

// A key at offset j of a tile at position p is rotated by p + j. Rotating it by j, and the queries
// back by p, gives the same scores from the first rows of the tables alone. `cos_row` and
// `sin_row` are the tables' rows at p; `from` may be the queries rotated back before.
inline void rotate_queries(const Decode& work, const float* from, const float* cos_row,
                           const float* sin_row, int64_t rows) {
  for (int64_t d = 0; d < work.head_dim / 2; d += kLanes) {
    const Vec c = load(cos_row + d), s = load(sin_row + d);
    const Vec c0 = load(work.base_cos + d), s0 = load(work.base_sin + d);
    const Vec cos = fma(c, c0, mul(s, s0)), sin = fms(s, c0, mul(c, s0));
    for (int64_t i = packed(d, 0); i < packed(d, rows); i += 2 * kLanes) {
      const Vec x1 = load(from + i), x2 = load(from + i + kLanes);
      store(work.rotated + i, fma(x1, cos, mul(x2, sin)));
      store(work.rotated + i + kLanes, fms(x2, cos, mul(x1, sin)));
    }
  }
}

// A tile's rows, and those of the next tile: its keys are fetched while scores are computed, its
// values while values are summed, which hides the latency of memory and spreads the traffic.
template <class T>
struct RowTile {
  const T *k, *v;
  int64_t k_stride, v_stride, count;
  const float *scale, *value_scale;
  const T *next_k, *next_v;  // null: no further tile
};

inline void prefetch_bytes(const void* begin, int64_t bytes) {
  const char* p = static_cast<const char*>(begin);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// What a tile needs beside its rows.
inline void prefetch_source(const TileSource& source, int64_t head_dim, int64_t count) {
  const int64_t numbers = sizeof(float);
  if (source.scale != nullptr) {
    prefetch_bytes(source.scale, count * numbers);
    prefetch_bytes(source.value_scale, count * numbers);
  }
  if (source.cos != nullptr) {
    prefetch_bytes(source.cos, head_dim / 2 * numbers);
    prefetch_bytes(source.sin, head_dim / 2 * numbers);
  }
}

// scores[j][m] = scale[j] * (rotated(k[j]) . q[m]) for the keys begin .. end - 1, kSharedKeys at a
// time; key j is rotated by row j - begin of the tables.
template <int M, bool kRotate, class T>
void decode_scores(const RowTile<T>& tile, int64_t begin, int64_t end, const float* q,
                   const float* cos, const float* sin, const Decode& work) {
  const int64_t half = work.head_dim / 2, row_bytes = work.head_dim * sizeof(T);
  for (int64_t first = begin; first < end; first += kSharedKeys) {
    Vec acc[kRowVectors][kLanes];
    int64_t key[kSharedKeys];
    const T* k[kSharedKeys];
#pragma GCC unroll 2
    for (int i = 0; i < kRowVectors; ++i) {
#pragma GCC unroll 16
      for (int l = 0; l < kLanes; ++l) acc[i][l] = zero();
    }
#pragma GCC unroll 2
    for (int i = 0; i < kSharedKeys; ++i) {
      // A vector whose last key does not exist repeats the one before.
      key[i] = first + i < end ? first + i : end - 1;
      k[i] = tile.k + key[i] * tile.k_stride;
      if (tile.next_k != nullptr) {
        prefetch_bytes(tile.next_k + key[i] * tile.k_stride, row_bytes);
      }
    }
    const float* query = q;
    for (int64_t d = 0; d < half; d += kLanes, query += packed(kLanes, 0)) {
      Vec a[kSharedKeys], b[kSharedKeys];
#pragma GCC unroll 2
      for (int i = 0; i < kSharedKeys; ++i) {
        const Vec x1 = load(k[i] + d), x2 = load(k[i] + half + d);
        a[i] = x1, b[i] = x2;
        if constexpr (kRotate) {
          const int64_t row = (key[i] - begin) * half + d;
          const Vec c = load(cos + row), s = load(sin + row);
          a[i] = fms(x1, c, mul(x2, s));
          b[i] = fma(x2, c, mul(x1, s));
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const Vec x1 = load(query + packed(0, m)), x2 = load(query + packed(0, m) + kLanes);
#pragma GCC unroll 2
        for (int i = 0; i < kSharedKeys; ++i) {
          Vec& sum = acc[m / kLanes][i * kDecodeRows + m % kLanes];
          sum = fma(b[i], x2, fma(a[i], x1, sum));
        }
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < kRowVectors; ++i) {
      Vec scores = sum_each(acc[i]);
      if (tile.scale != nullptr) {
        scores = mul(scores, eights(tile.scale[key[0]], tile.scale[key[kSharedKeys - 1]]));
      }
      store(work.scores + first * kDecodeRows + i * kLanes, scores);
    }
  }
}

// Turns scores into weights 2^(score - maximum), times the scale of the values, in place.
template <int M>
inline void decode_softmax(Decode* work, int64_t count, const float* keep,
                           const float* value_scale) {
  const int64_t last = count - 1;
  Vec largest[kRowVectors];
  for (int i = 0; i < kRowVectors; ++i) largest[i] = broadcast(-INFINITY);
  for (int64_t j = 0; j < count; j += kSharedKeys) {
    for (int i = 0; i < kRowVectors; ++i) {
      float* scores = work->scores + j * kDecodeRows + i * kLanes;
      Vec x = load(scores);
      if (kSharedKeys > 1 && j == last) x = keep_first(x, kDecodeRows);
      if (keep != nullptr) x = keep_where(x, eights(keep[j], keep[j < last ? j + 1 : j]));
      store(scores, x);
      largest[i] = max(largest[i], x);
    }
  }
  for (int i = 0; i < kRowVectors; ++i) {
    largest[i] = max(largest[i], swap_eights(largest[i]));
    if (!any_greater(largest[i], add(work->maximum[i], broadcast(kMaximumSlack)))) continue;
    const Vec raised = max(work->maximum[i], largest[i]);
    // A row that has seen no key yet has a maximum of -inf, and maybe keeps it.
    const Vec factor = exp2(sub(work->maximum[i], max(raised, broadcast(-3e38f))));
    work->sum[i] = mul(work->sum[i], factor);
    work->maximum[i] = raised;
    float factors[kLanes];
    store(factors, factor);
    for (int m = i * kLanes; m < M && m < (i + 1) * kLanes; ++m) {
      float* out = work->out + m * work->dim;
      const Vec x = broadcast(factors[m - i * kLanes]);
      for (int64_t d = 0; d < work->head_dim; d += kLanes) store(out + d, mul(load(out + d), x));
    }
  }
  for (int64_t j = 0; j < count; j += kSharedKeys) {
    for (int i = 0; i < kRowVectors; ++i) {
      float* scores = work->scores + j * kDecodeRows + i * kLanes;
      const Vec shift = max(work->maximum[i], broadcast(-3e38f));
      Vec weight = exp2(sub(load(scores), shift));
      work->sum[i] = add(work->sum[i], weight);
      if (value_scale != nullptr) {
        weight = mul(weight, eights(value_scale[j], value_scale[j < last ? j + 1 : j]));
      }
      store(scores, weight);
    }
  }
}

// out[m][d] += sum_j weights[j][m] v[j][d], for M rows and C vectors of dimensions. `next` is where
// the next tile's values lie.
template <int M, int C, class T>
inline void decode_value_panel(const float* weights, const T* v, const T* next, int64_t stride,
                               int64_t count, float* out, int64_t dim) {
  Vec acc[M][C];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[m][c] = load(out + m * dim + c * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
    Vec value[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) value[c] = load(v + j * stride + c * kLanes);
    prefetch_bytes(next + j * stride, C * kLanes * sizeof(T));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = broadcast(weights[j * kDecodeRows + m]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[m][c] = fma(x, value[c], acc[m][c]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(out + m * dim + c * kLanes, acc[m][c]);
  }
}

// Fewer rows leave registers for wider panels, and need them to hide the latency of an fma.
template <int M,
          int C = (M > 4   ? 1
                   : M > 2 ? 2
                           : 4) *
                  (kLanes == 16 ? 2 : 1),
          class T>
inline void decode_values(const float* weights, const T* v, const T* next, int64_t stride,
                          int64_t count, float* out, int64_t dim, int64_t vectors) {
  if constexpr (C > 0) {
    int64_t c = 0;
    for (; c + C <= vectors; c += C) {
      decode_value_panel<M, C>(weights, v + c * kLanes, next + c * kLanes, stride, count,
                               out + c * kLanes, dim);
    }
    if (c < vectors) {
      decode_values<M, C / 2>(weights, v + c * kLanes, next + c * kLanes, stride, count,
                              out + c * kLanes, dim, vectors - c);
    }
  }
}

template <int M, class T>
inline void decode_tile(Decode* work, const RowTile<T>& tile, const TileSource& source,
                        const MemoryAttentionParams& p) {
  if (source.cos == nullptr) {
    decode_scores<M, false>(tile, 0, tile.count, work->q, nullptr, nullptr, *work);
  } else {
    rotate_queries(*work, work->q, source.cos, source.sin, M);
    for (int64_t j = 0; j < tile.count; j += kTableKeys) {
      const int64_t row = kTableKeys * (work->head_dim / 2);
      if (j > 0) rotate_queries(*work, work->rotated, p.cos + row, p.sin + row, M);
      const int64_t end = j + kTableKeys < tile.count ? j + kTableKeys : tile.count;
      decode_scores<M, true>(tile, j, end, work->rotated, p.cos, p.sin, *work);
    }
  }
  decode_softmax<M>(work, tile.count, source.keep, tile.value_scale);
  const int64_t vectors = work->head_dim / kLanes;
  if (source.keep == nullptr) {
    decode_values<M>(work->scores, tile.v, tile.next_v == nullptr ? tile.v : tile.next_v,
                     tile.v_stride, tile.count, work->out, work->dim, vectors);
  } else {
    load_rows<false>(tile.v, tile.v_stride, nullptr, source.keep, nullptr, nullptr, work->head_dim,
                     tile.count, work->values, work->dim);
    decode_values<M>(work->scores, work->values, work->values, work->dim, tile.count, work->out,
                     work->dim, vectors);
  }
}

template <int M>
void decode_page_tile(const MemoryAttentionParams& p, Decode* work, int64_t kv_head,
                      const KeyTile& tile, const KeyTile* next) {
  const TileSource source = page_source(p, kv_head, tile);
  if (next != nullptr) prefetch_source(page_source(p, kv_head, *next), p.head_dim, next->count);
  dispatch_bank_dtype(p.bank_dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* k = page_keys<T>(p, kv_head, tile);
    const T* next_k = next == nullptr ? nullptr : page_keys<T>(p, kv_head, *next);
    const RowTile<T> rows = {k,
                             k + p.page_part_stride,
                             p.page_token_stride,
                             p.page_token_stride,
                             tile.count,
                             source.scale,
                             source.value_scale,
                             next_k,
                             next_k == nullptr ? nullptr : next_k + p.page_part_stride};
    decode_tile<M>(work, rows, source, p);
  });
}

template <int M, class T>
void decode_segment_tile(const MemoryAttentionParams& p, Decode* work, int64_t batch,
                         int64_t kv_head, const KeyTile& tile) {
  TileSource source;
  source.keep = load_keep(p, batch, tile, work->keep);
  const RowTile<T> rows = {segment_keys<T>(p, batch, kv_head, tile),
                           segment_values<T>(p, batch, kv_head, tile),
                           p.k_token_stride,
                           p.v_token_stride,
                           tile.count,
                           nullptr,
                           nullptr,
                           nullptr,
                           nullptr};
  decode_tile<M>(work, rows, source, p);
}

// The tiles begin .. end - 1 for the M rows (some may be padding) of one kv head.
template <int M, class T>
void decode_tiles(const MemoryAttentionParams& p, Decode* work, int64_t batch, int64_t kv_head,
                  int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const KeyTile& tile = p.tiles[i];
    if (tile.page < 0) {
      decode_segment_tile<M, T>(p, work, batch, kv_head, tile);
    } else {
      const bool more = i + 1 < end && p.tiles[i + 1].page >= 0;
      decode_page_tile<M>(p, work, kv_head, tile, more ? p.tiles + i + 1 : nullptr);
    }
  }
}

}  // namespace
}  // namespace lychee
