// SPDX-License-Identifier: Apache-2.0
// Backward of memory_attention, written once against vec_*.h. One kv head of one batch entry meets
// its keys tile by tile: weights are recomputed as 2^(score - lse) for a block of query rows, then
// dv += weights^T dout, ds = weights (dout v^T - delta), dk += ds^T q and dq += ds k.
#pragma once

#include "cpu/memory_attention_bwd.h"
#include "cpu/memory_attention_products.inl"
#include "cpu/memory_attention_tiles.inl"

namespace lychee {
namespace {

struct Gradients {
  int64_t batch, kv_head, group;
  int64_t rows;              // num_queries * group; row r is token r / group
  int64_t head_dim, dim;     // dim: padded, the row stride of scratch
  float *q, *dout, *dq;      // [rows, dim]; q carries softmax_scale * log2(e), dq lacks the scale
  float *lse, *delta;        // [rows]; lse in base 2, +inf for a row that saw no key
  float *key_rows, *values;  // [kTileKeys, dim]
  float *keys_t, *values_t;  // [head_dim, kTileKeys]
  float *dkeys, *dvalues;    // [kTileKeys, dim]; dkeys lacks the factor ln(2)
  float *weights, *dscores;  // [kGradientRows, kTileKeys]
  float* keep;               // [kTileKeys], 0 where a key is not valid
};

inline Gradients make_gradients(const MemoryAttentionParams& p, int64_t kv_head, float* scratch) {
  Gradients g;
  g.kv_head = kv_head;
  g.group = p.num_heads / p.num_kv_heads;
  g.rows = p.num_queries * g.group;
  g.head_dim = p.head_dim;
  g.dim = padded_dim(p.head_dim);
  const auto take = [&](int64_t count) {
    float* begin = scratch;
    scratch += count;
    return begin;
  };
  g.q = take(g.rows * g.dim), g.dout = take(g.rows * g.dim), g.dq = take(g.rows * g.dim);
  g.key_rows = take(kTileKeys * g.dim), g.values = take(kTileKeys * g.dim);
  g.keys_t = take(kTileKeys * g.dim), g.values_t = take(kTileKeys * g.dim);
  g.dkeys = take(kTileKeys * g.dim), g.dvalues = take(kTileKeys * g.dim);
  g.weights = take(kGradientRows * kTileKeys), g.dscores = take(kGradientRows * kTileKeys);
  g.keep = take(kTileKeys);
  g.lse = take(g.rows), g.delta = take(g.rows);
  return g;
}

// Queries, outputs (kept in dq for now), their gradients, and the log-sum-exp.
template <class T>
void load_query_rows(const MemoryAttentionBwdParams& p, const Gradients& g) {
  const MemoryAttentionParams& in = p.in;
  const Vec scale = broadcast(in.softmax_scale * kLog2E);
  for (int64_t r = 0; r < g.rows; ++r) {
    const int64_t head = g.kv_head * g.group + r % g.group, token = r / g.group;
    const T* q = static_cast<const T*>(in.q) + g.batch * in.q_batch_stride +
                 head * in.q_head_stride + token * in.q_token_stride;
    const T* dout = static_cast<const T*>(p.dout) + g.batch * p.dout_batch_stride +
                    head * p.dout_head_stride + token * p.dout_token_stride;
    const T* out = static_cast<const T*>(p.out) + g.batch * p.out_batch_stride +
                   head * p.out_head_stride + token * p.out_token_stride;
    for (int64_t d = 0; d < g.dim; d += kLanes) {
      const int64_t left = g.head_dim - d;
      store(g.q + r * g.dim + d, left > 0 ? mul(load_first(q + d, left), scale) : zero());
      store(g.dout + r * g.dim + d, left > 0 ? load_first(dout + d, left) : zero());
      store(g.dq + r * g.dim + d, left > 0 ? load_first(out + d, left) : zero());
    }
    const float lse = p.lse[(g.batch * in.num_heads + head) * in.num_queries + token];
    g.lse[r] = lse == -INFINITY ? INFINITY : lse * kLog2E;
  }
}

// delta = dout . out of each row, summed in the order in which score_panel sums dout . v: the score
// gradients of a row that sees one key are exactly zero.
inline void load_delta(const Gradients& g) {
  for (int64_t first = 0; first < g.rows; first += kTileKeys) {
    const int64_t count = g.rows - first < kTileKeys ? g.rows - first : kTileKeys;
    const int64_t offset = first * g.dim;
    pack_keys<false>(g.dout + offset, g.dim, nullptr, nullptr, nullptr, g.head_dim, count,
                     g.keys_t);
    pack_keys<false>(g.dq + offset, g.dim, nullptr, nullptr, nullptr, g.head_dim, count,
                     g.values_t);
    for (int64_t r = 0; r < count; r += kLanes) {
      Vec delta = zero();
      for (int64_t d = 0; d < g.head_dim; ++d) {
        delta =
            fma(load(g.keys_t + d * kTileKeys + r), load(g.values_t + d * kTileKeys + r), delta);
      }
      store_first(g.delta + first + r, delta, count - r);
    }
  }
}

template <class T>
void load_tile(const T* k, int64_t k_stride, const T* v, int64_t v_stride, const TileSource& source,
               int64_t count, const Gradients& g) {
  const auto load_keys = source.cos == nullptr ? load_rows<false, T> : load_rows<true, T>;
  load_keys(k, k_stride, source.scale, source.keep, source.cos, source.sin, g.head_dim, count,
            g.key_rows, g.dim);
  load_rows<false>(v, v_stride, source.value_scale, source.keep, nullptr, nullptr, g.head_dim,
                   count, g.values, g.dim);
  pack_keys<false>(g.key_rows, g.dim, nullptr, nullptr, nullptr, g.head_dim, count, g.keys_t);
  pack_keys<false>(g.values, g.dim, nullptr, nullptr, nullptr, g.head_dim, count, g.values_t);
  memset(g.dkeys, 0, count * g.dim * sizeof(float));
  memset(g.dvalues, 0, count * g.dim * sizeof(float));
}

// Weights and their gradients for M rows, then their share of dq.
template <int M>
inline void score_gradients(const Gradients& g, const TileView& tile, int64_t row, float* weights,
                            float* dscores) {
  const int64_t visible = tile.visible((row + M - 1) / g.group);
  for_panels((visible + kLanes - 1) / kLanes, [&](int64_t column, auto width) {
    score_panel<M, width()>(g.q + row * g.dim, g.dim, g.keys_t + column, g.head_dim,
                            weights + column);
    score_panel<M, width()>(g.dout + row * g.dim, g.dim, g.values_t + column, g.head_dim,
                            dscores + column);
  });
  for (int m = 0; m < M; ++m) {
    const int64_t seen = tile.visible((row + m) / g.group);
    const Vec lse = broadcast(g.lse[row + m]), delta = broadcast(g.delta[row + m]);
    for (int64_t j = 0; j < kTileKeys; j += kLanes) {
      Vec weight = zero(), dscore = zero();
      if (j < seen) {
        Vec x = keep_first(sub(load(weights + m * kTileKeys + j), lse), seen - j);
        if (tile.keep != nullptr) x = keep_where(x, load(tile.keep + j));
        weight = exp2(x);
        dscore = mul(weight, sub(load(dscores + m * kTileKeys + j), delta));
      }
      store(weights + m * kTileKeys + j, weight);
      store(dscores + m * kTileKeys + j, dscore);
    }
  }
  for_panels(g.dim / kLanes, [&](int64_t column, auto width) {
    value_panel<M, width()>(dscores, g.key_rows + column, g.dim, visible,
                            g.dq + row * g.dim + column, g.dim);
  });
}

// The share of rows first .. first + count - 1 in the tile's dkeys and dvalues.
inline void add_key_gradients(const Gradients& g, const TileView& tile, int64_t first,
                              int64_t count) {
  const int64_t visible = tile.visible((first + count - 1) / g.group);
  for_rows(visible, [&](int64_t j, auto m) {
    // Rows before the first one that sees key j have weight 0.
    const int64_t token = tile.first_token(j);
    const int64_t skip = token * g.group > first ? token * g.group - first : 0;
    const int64_t offset = skip * kTileKeys + j, row = first + skip;
    for_panels(g.dim / kLanes, [&](int64_t column, auto width) {
      value_panel<m(), width(), true>(g.weights + offset, g.dout + row * g.dim + column, g.dim,
                                      count - skip, g.dvalues + j * g.dim + column, g.dim);
      value_panel<m(), width(), true>(g.dscores + offset, g.q + row * g.dim + column, g.dim,
                                      count - skip, g.dkeys + j * g.dim + column, g.dim);
    });
  });
}

inline void tile_gradients(const Gradients& g, const TileView& tile) {
  for (int64_t first = 0; first < g.rows; first += kGradientRows) {
    const int64_t count = g.rows - first < kGradientRows ? g.rows - first : kGradientRows;
    if (tile.visible((first + count - 1) / g.group) == 0) continue;
    for_rows(count, [&](int64_t row, auto m) {
      score_gradients<m()>(g, tile, first + row, g.weights + row * kTileKeys,
                           g.dscores + row * kTileKeys);
    });
    add_key_gradients(g, tile, first, count);
  }
}

// A page's tile: gradients go back to the stored keys' rotation and add up in the page's slot.
inline void page_tile_gradients(const MemoryAttentionBwdParams& p, const Gradients& g,
                                int64_t index) {
  const KeyTile& tile = p.in.tiles[index];
  const TileView view{nullptr, g.dim, nullptr, tile.count, tile.count, 0};
  const TileSource source = page_source(p.in, g.kv_head, tile);
  dispatch_bank_dtype(p.in.bank_dtype, [&](auto tag) {
    const auto* k = page_keys<decltype(tag)>(p.in, g.kv_head, tile);
    load_tile(k, p.in.page_token_stride, k + p.in.page_part_stride, p.in.page_token_stride, source,
              tile.count, g);
  });
  tile_gradients(g, view);
  if (p.tile_slot == nullptr) return;
  float* dk = p.slots + ((p.tile_slot[index] * p.in.num_kv_heads + g.kv_head) * 2 * p.page_tokens +
                         tile.first) *
                            g.head_dim;
  float* dv = dk + p.page_tokens * g.head_dim;
  const int64_t half = g.head_dim / 2;
  for (int64_t j = 0; j < tile.count; ++j, dk += g.head_dim, dv += g.head_dim) {
    const float *dkey = g.dkeys + j * g.dim, *dvalue = g.dvalues + j * g.dim;
    for (int64_t d = 0; d < g.head_dim; ++d) dv[d] += dvalue[d];
    if (source.cos == nullptr) {
      for (int64_t d = 0; d < g.head_dim; ++d) dk[d] += kLn2 * dkey[d];
      continue;
    }
    const float *cos = source.cos + j * half, *sin = source.sin + j * half;
    for (int64_t d = 0; d < half; ++d) {
      dk[d] += kLn2 * (dkey[d] * cos[d] + dkey[half + d] * sin[d]);
      dk[half + d] += kLn2 * (dkey[half + d] * cos[d] - dkey[d] * sin[d]);
    }
  }
}

template <class T>
void store_rows(const float* rows, int64_t dim, float factor, int64_t head_dim, int64_t count,
                T* out) {
  for (int64_t r = 0; r < count; ++r, rows += dim, out += head_dim) {
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      store_first(out + d, mul(load(rows + d), broadcast(factor)), head_dim - d);
    }
  }
}

template <class T>
void segment_tile_gradients(const MemoryAttentionBwdParams& p, const Gradients& g,
                            const KeyTile& tile) {
  const MemoryAttentionParams& in = p.in;
  TileSource source;
  source.keep = load_keep(in, g.batch, tile, g.keep);
  load_tile(segment_keys<T>(in, g.batch, g.kv_head, tile), in.k_token_stride,
            segment_values<T>(in, g.batch, g.kv_head, tile), in.v_token_stride, source, tile.count,
            g);
  tile_gradients(g, segment_view(in, tile, nullptr, g.dim, source.keep));
  const int64_t offset =
      ((g.batch * in.num_kv_heads + g.kv_head) * in.num_keys + tile.first) * g.head_dim;
  store_rows(g.dkeys, g.dim, kLn2, g.head_dim, tile.count, static_cast<T*>(p.dk) + offset);
  store_rows(g.dvalues, g.dim, 1.0f, g.head_dim, tile.count, static_cast<T*>(p.dv) + offset);
}

template <class T>
void batch_entry_gradients(const MemoryAttentionBwdParams& p, const Gradients& g) {
  const MemoryAttentionParams& in = p.in;
  load_query_rows<T>(p, g);
  load_delta(g);
  memset(g.dq, 0, g.rows * g.dim * sizeof(float));
  for (int64_t i = in.tile_begin[g.batch]; i < in.tile_begin[g.batch + 1]; ++i) {
    if (in.tiles[i].page < 0) {
      segment_tile_gradients<T>(p, g, in.tiles[i]);
    } else {
      page_tile_gradients(p, g, i);
    }
  }
  T* dq = static_cast<T*>(p.dq);
  for (int64_t r = 0; r < g.rows; ++r) {
    const int64_t head = g.batch * in.num_heads + g.kv_head * g.group + r % g.group;
    store_rows(g.dq + r * g.dim, g.dim, in.softmax_scale, g.head_dim, 1,
               dq + (head * in.num_queries + r / g.group) * g.head_dim);
  }
}

inline void memory_attention_bwd_kernel(const MemoryAttentionBwdParams& p, int64_t item,
                                        float* scratch) {
  const int64_t chunk = item / p.in.num_kv_heads, kv_head = item % p.in.num_kv_heads;
  Gradients g = make_gradients(p.in, kv_head, scratch);
  if (p.tile_slot != nullptr) {
    const int64_t size = 2 * p.page_tokens * p.in.head_dim;
    for (int64_t slot = p.slot_begin[chunk]; slot < p.slot_begin[chunk + 1]; ++slot) {
      memset(p.slots + (slot * p.in.num_kv_heads + kv_head) * size, 0, size * sizeof(float));
    }
  }
  const int64_t begin = chunk * p.chunk_batch, end = begin + p.chunk_batch;
  for (g.batch = begin; g.batch < end && g.batch < p.in.batch; ++g.batch) {
    dispatch_io_dtype(p.in.dtype, [&](auto tag) { batch_entry_gradients<decltype(tag)>(p, g); });
  }
}

inline void sum_slots_kernel(const MemoryAttentionBwdParams& p, int64_t index) {
  const int64_t page = index / p.in.num_kv_heads, kv_head = index % p.in.num_kv_heads;
  const int64_t size = 2 * p.page_tokens * p.in.head_dim;
  const int64_t *begin = p.page_slots + p.page_begin[page],
                *end = p.page_slots + p.page_begin[page + 1];
  dispatch_io_dtype(p.in.bank_dtype, [&](auto tag) {
    auto* dkv =
        static_cast<decltype(tag)*>(p.dkv) + p.pages[page] * p.dkv_page_stride + kv_head * size;
    for (int64_t i = 0; i < size; i += kLanes) {
      Vec sum = zero();
      for (const int64_t* slot = begin; slot < end; ++slot) {
        sum = add(sum,
                  load_first(p.slots + (*slot * p.in.num_kv_heads + kv_head) * size + i, size - i));
      }
      store_first(dkv + i, sum, size - i);
    }
  });
}

}  // namespace
}  // namespace lychee
