// SPDX-License-Identifier: Apache-2.0
// The compress_pack loop, written once against vec_*.h: one pass over the rows of a window that
// rotates, interleaves, and hands the memory rows (before rotation) to tensors or to a bank.
#pragma once

#include "cpu/compress_pack.h"
#include LYCHEE_VEC_HEADER
#include "cpu/vec_tail.h"

namespace lychee {
namespace {

template <class T>
struct QuantLevel {
  static constexpr float kValue = 0.0f;
};
template <>
struct QuantLevel<int8_t> {
  static constexpr float kValue = 127.0f;
};
template <>
struct QuantLevel<Float8E4M3> {
  static constexpr float kValue = 448.0f;
};

// A row whose largest magnitude is below this is stored as zeros with scale 0.
constexpr float kSmallestAmax = 1e-30f;

// Rows that are handled together, one head after another: each head then lies in one run.
constexpr int64_t kTileRows = 16;

// bfloat16 goes through registers as even and odd elements, which takes no shuffles.
template <class T>
inline constexpr bool kIsBFloat16 = false;
template <>
inline constexpr bool kIsBFloat16<BFloat16> = true;
// kHalf is half the head dimension where it is known beforehand, else 0.
template <class T, int kHalf>
inline constexpr bool kSplitPairs = kIsBFloat16<T> && kHalf != 0 && kHalf % (2 * kLanes) == 0;

// Whether rows of this type can be stored past the cache.
template <class T, int kHalf>
inline constexpr bool kCanStream = kHalf != 0 && (kSplitPairs<T, kHalf> || sizeof(T) == 4);

// What a row is read and written in: one vector, or the even and the odd one of a pair.
template <class T>
inline void load_step(const T* p, int64_t count, Vec (&x)[1]) {
  x[0] = load_first(p, count);
}
inline void load_step(const BFloat16* p, int64_t, Vec (&x)[2]) { load_even_odd(p, &x[0], &x[1]); }

template <bool kStream, class T>
inline void store_step(T* p, int64_t count, const Vec (&x)[1]) {
  if constexpr (kStream && sizeof(T) == 4) {
    stream(p, x[0]);
  } else {
    store_first(p, x[0], count);
  }
}
template <bool kStream>
inline void store_step(BFloat16* p, int64_t, const Vec (&x)[2]) {
  (kStream ? stream_even_odd : store_even_odd)(p, x[0], x[1]);
}

template <class T, int kHalf, bool kStream>
inline void rotate_row(const T* in, T* out, const float* cos, const float* sin, int64_t half) {
  constexpr int kVectors = kSplitPairs<T, kHalf> ? 2 : 1;
  if constexpr (kHalf != 0) half = kHalf;
  for (int64_t d = 0; d < half; d += kVectors * kLanes) {
    Vec x1[kVectors], x2[kVectors], y1[kVectors], y2[kVectors];
    load_step(in + d, half - d, x1);
    load_step(in + half + d, half - d, x2);
    for (int i = 0; i < kVectors; ++i) {
      const int64_t at = d + i * kLanes;
      const Vec c = load_first(cos + at, half - at), s = load_first(sin + at, half - at);
      y1[i] = fms(x1[i], c, mul(x2[i], s));
      y2[i] = fma(x2[i], c, mul(x1[i], s));
    }
    store_step<kStream>(out + d, half - d, y1);
    store_step<kStream>(out + half + d, half - d, y2);
  }
}

template <class T, int kHalf, bool kStream>
inline void copy_row(const T* in, T* out, int64_t size) {
  const int64_t bytes = (kHalf != 0 ? 2 * kHalf : size) * sizeof(T);
  if constexpr (kStream) {
    stream_bytes(out, in, bytes);
  } else {
    memcpy(out, in, bytes);
  }
}

template <class T, class Stored>
inline void write_row(const T* in, Stored* out, float* scale, int64_t size) {
  constexpr float kLevel = QuantLevel<Stored>::kValue;
  if constexpr (kLevel == 0.0f) {
    for (int64_t d = 0; d < size; d += kLanes) {
      store_first(out + d, load_first(in + d, size - d), size - d);
    }
  } else {
    Vec largest = zero();
    for (int64_t d = 0; d < size; d += kLanes) {
      largest = max(largest, abs(load_first(in + d, size - d)));
    }
    const float amax = reduce_max(largest);
    const bool empty = amax < kSmallestAmax;
    *scale = empty ? 0.0f : amax / kLevel;
    const Vec inverse = broadcast(empty ? 0.0f : kLevel / amax);
    for (int64_t d = 0; d < size; d += kLanes) {
      Vec x = mul(load_first(in + d, size - d), inverse);
      x = max(min(x, broadcast(kLevel)), broadcast(-kLevel));
      store_first(out + d, x, size - d);
    }
  }
}

// Writes the key and value of one memory row, all heads, to its slot.
template <class T>
inline void write_slot(const BankWriter& bank, int64_t slot, const T* k, int64_t k_head_stride,
                       const T* v, int64_t v_head_stride, int64_t num_kv_heads, int64_t head_dim) {
  if (slot < 0) return;
  const int64_t page = slot / bank.page_tokens, token = slot % bank.page_tokens;
  dispatch_bank_dtype(bank.dtype, [&](auto tag) {
    using Stored = decltype(tag);
    for (int64_t h = 0; h < num_kv_heads; ++h) {
      Stored* out = static_cast<Stored*>(bank.data) + page * bank.page_stride +
                    h * bank.head_stride + token * bank.token_stride;
      float* scale = bank.scale == nullptr ? nullptr
                                           : bank.scale + page * bank.scale_page_stride +
                                                 h * bank.scale_head_stride + token;
      write_row(k + h * k_head_stride, out, scale, head_dim);
      write_row(v + h * v_head_stride, out + bank.part_stride,
                scale == nullptr ? nullptr : scale + bank.scale_part_stride, head_dim);
    }
  });
}

// Up to kTileRows consecutive rows of one batch entry, in interleaved order.
template <int kHalf>
struct Tile {
  int64_t batch, first, count;
  int64_t segment[kTileRows];  // row in segment order
  int64_t memory[kTileRows];   // memory index, or -1
  const float *cos[kTileRows], *sin[kTileRows];
  alignas(64) float split[kTileRows][2][kHalf != 0 ? kHalf : 1];  // tables of split pairs
};

// Even elements before odd ones in each pair of vectors. NaN becomes the one that
// store_even_odd takes.
template <int kHalf>
inline const float* split_table(const float* in, float* out) {
  for (int d = 0; d < kHalf; d += 2 * kLanes) {
    for (int i = 0; i < kLanes; ++i) {
      const float even = in[d + 2 * i], odd = in[d + 2 * i + 1];
      out[d + i] = even == even ? even : NAN;
      out[d + kLanes + i] = odd == odd ? odd : NAN;
    }
  }
  return out;
}

// The rows from `index` on, of the batch * (window + memory) interleaved ones, up to `end`.
template <class T, int kHalf>
inline void fill_tile(const RowOrder& order, int64_t index, int64_t end, Tile<kHalf>* tile) {
  const int64_t rows = order.window + order.memory, b = index / rows, first = index % rows;
  const int64_t left = end - index < rows - first ? end - index : rows - first;
  tile->batch = b, tile->first = first, tile->count = left < kTileRows ? left : kTileRows;
  for (int64_t i = 0; i < tile->count; ++i) {
    const int64_t s = first + i, j = s / (order.ratio + 1);
    const bool is_memory = s % (order.ratio + 1) == order.ratio;
    tile->memory[i] = is_memory ? j : -1;
    tile->segment[i] =
        is_memory ? order.batch * order.window + b * order.memory + j : b * order.window + s - j;
    if (order.cos == nullptr) continue;
    const int64_t position = order.positions ? order.positions[index + i] : order.pos0 + s;
    tile->cos[i] = order.cos + position * order.half;
    tile->sin[i] = order.sin + position * order.half;
    if constexpr (kSplitPairs<T, kHalf>) {
      tile->cos[i] = split_table<kHalf>(tile->cos[i], tile->split[i][0]);
      tile->sin[i] = split_table<kHalf>(tile->sin[i], tile->split[i][1]);
    }
  }
}

template <class T, int kHalf, bool kStream>
void pack_queries(const CompressPackParams& p, const Tile<kHalf>& tile) {
  const int64_t memory = p.order.memory;
  const int64_t rows = p.memory_queries_only ? memory : p.order.window + memory;
  for (int64_t h = 0; h < p.num_heads; ++h) {
    const T* q = static_cast<const T*>(p.q) + h * p.q_head_stride;
    T* out = static_cast<T*>(p.q_rot) + (tile.batch * p.num_heads + h) * rows * p.head_dim;
    for (int64_t i = 0; i < tile.count; ++i) {
      int64_t source = tile.segment[i], row = tile.first + i;
      if (p.memory_queries_only) {
        row = tile.memory[i];
        if (row < 0) continue;
        source = tile.batch * memory + row;
      }
      rotate_row<T, kHalf, kStream>(q + source * p.q_row_stride, out + row * p.head_dim,
                                    tile.cos[i], tile.sin[i], p.head_dim / 2);
    }
  }
}

template <class T, int kHalf, bool kStream>
void pack_keys_and_values(const CompressPackParams& p, const Tile<kHalf>& tile) {
  const int64_t rows = p.order.window + p.order.memory, dim = p.head_dim;
  for (int64_t h = 0; h < p.num_kv_heads; ++h) {
    const T* k = static_cast<const T*>(p.k) + h * p.k_head_stride;
    const T* v = static_cast<const T*>(p.v) + h * p.v_head_stride;
    const int64_t head = tile.batch * p.num_kv_heads + h;
    T* k_rot = static_cast<T*>(p.k_rot) + (head * rows + tile.first) * dim;
    T* v_out = static_cast<T*>(p.v_out) + (head * rows + tile.first) * dim;
    for (int64_t i = 0; i < tile.count; ++i) {
      const T* k_row = k + tile.segment[i] * p.k_row_stride;
      const T* v_row = v + tile.segment[i] * p.v_row_stride;
      rotate_row<T, kHalf, kStream>(k_row, k_rot + i * dim, tile.cos[i], tile.sin[i], dim / 2);
      copy_row<T, kHalf, kStream>(v_row, v_out + i * dim, dim);
      if (tile.memory[i] < 0 || p.mem_k == nullptr) continue;
      const int64_t out = (head * p.order.memory + tile.memory[i]) * dim;
      copy_row<T, kHalf, false>(k_row, static_cast<T*>(p.mem_k) + out, dim);
      copy_row<T, kHalf, false>(v_row, static_cast<T*>(p.mem_v) + out, dim);
    }
  }
}

template <class T, int kHalf>
void compress_pack_rows(const CompressPackParams& p, int64_t begin, int64_t end) {
  constexpr bool kStream = kCanStream<T, kHalf>;
  Tile<kHalf> tile;
  for (int64_t index = begin; index < end; index += tile.count) {
    fill_tile<T>(p.order, index, end, &tile);
    (p.stream_q ? pack_queries<T, kHalf, kStream> : pack_queries<T, kHalf, false>)(p, tile);
    (p.stream_kv ? pack_keys_and_values<T, kHalf, kStream>
                 : pack_keys_and_values<T, kHalf, false>)(p, tile);
    if (p.bank.data == nullptr) continue;
    for (int64_t i = 0; i < tile.count; ++i) {
      if (tile.memory[i] < 0) continue;
      write_slot(p.bank, p.bank.slots[tile.batch * p.order.memory + tile.memory[i]],
                 static_cast<const T*>(p.k) + tile.segment[i] * p.k_row_stride, p.k_head_stride,
                 static_cast<const T*>(p.v) + tile.segment[i] * p.v_row_stride, p.v_head_stride,
                 p.num_kv_heads, p.head_dim);
    }
  }
  if (p.stream_q || p.stream_kv) fence();
}

inline void compress_pack_kernel(const CompressPackParams& p, int64_t begin, int64_t end) {
  dispatch_io_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (p.head_dim == 128) return compress_pack_rows<T, 64>(p, begin, end);
    if (p.head_dim == 64) return compress_pack_rows<T, 32>(p, begin, end);
    compress_pack_rows<T, 0>(p, begin, end);
  });
}

inline void write_memory_kernel(const CompressPackParams& p, int64_t begin, int64_t end) {
  dispatch_io_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t row = begin; row < end; ++row) {
      write_slot(p.bank, p.bank.slots[row], static_cast<const T*>(p.k) + row * p.k_row_stride,
                 p.k_head_stride, static_cast<const T*>(p.v) + row * p.v_row_stride,
                 p.v_head_stride, p.num_kv_heads, p.head_dim);
    }
  });
}

}  // namespace
}  // namespace lychee
