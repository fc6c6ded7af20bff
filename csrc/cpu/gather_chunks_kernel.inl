// SPDX-License-Identifier: Apache-2.0
// The gather_chunks loops, written once against vec_*.h: pages to contiguous keys and values,
// and the gradients of those back to pages.
#pragma once

#include "cpu/gather_chunks.h"
#include LYCHEE_VEC_HEADER
#include "cpu/vec_tail.h"

namespace lychee {
namespace {

constexpr int64_t kMaxHeadDim = 256;
// Rows that a large gather collects before it writes them past the caches, and how far ahead of
// them it asks for the bank. Processor time on one thread of a Xeon with AVX-512, int8 to bfloat16
// out of cache: 28% less than with plain stores at eight rows, and 12% less again at two.
constexpr int64_t kStreamRows = 2;
constexpr int64_t kAheadBytes = 2048;

template <class A, class B>
constexpr bool kSameType = false;
template <class A>
constexpr bool kSameType<A, A> = true;

template <class Stored>
constexpr bool kQuantised = kSameType<Stored, int8_t> || kSameType<Stored, Float8E4M3>;

template <class Stored>
inline Vec load_scaled(const Stored* in, Vec scale) {
  if constexpr (kQuantised<Stored>) return mul(load(in), scale);
  return load(in);
}

template <class Stored>
inline Vec load_first_scaled(const Stored* in, Vec scale, int64_t count) {
  if constexpr (kQuantised<Stored>) return mul(load_first(in, count), scale);
  return load_first(in, count);
}

// A row as it is, dequantised, and rounded once.
template <class Stored, class T>
inline void convert_row(const Stored* in, float factor, T* out, int64_t size) {
  if constexpr (kSameType<Stored, T>) {
    memcpy(out, in, size * sizeof(T));
    return;
  }
  const Vec scale = broadcast(factor);
  int64_t d = 0;
  for (; d + 2 * kLanes <= size; d += 2 * kLanes) {
    store_pair(out + d, load_scaled(in + d, scale), load_scaled(in + d + kLanes, scale));
  }
  for (; d < size; d += kLanes) {
    store_first(out + d, load_first_scaled(in + d, scale, size - d), size - d);
  }
}

// A row dequantised, rotated, and rounded once.
template <class Stored, class T>
inline void rotate_row(const Stored* in, float factor, const float* cos, const float* sin, T* out,
                       int64_t half) {
  const Vec scale = broadcast(factor);
  int64_t d = 0;
  for (; d + 2 * kLanes <= half; d += 2 * kLanes) {
    const Vec a1 = load_scaled(in + d, scale), b1 = load_scaled(in + d + kLanes, scale);
    const Vec a2 = load_scaled(in + half + d, scale);
    const Vec b2 = load_scaled(in + half + d + kLanes, scale);
    const Vec ca = load(cos + d), cb = load(cos + d + kLanes);
    const Vec sa = load(sin + d), sb = load(sin + d + kLanes);
    store_pair(out + d, fms(a1, ca, mul(a2, sa)), fms(b1, cb, mul(b2, sb)));
    store_pair(out + half + d, fma(a2, ca, mul(a1, sa)), fma(b2, cb, mul(b1, sb)));
  }
  for (; d < half; d += kLanes) {
    const int64_t count = half - d;
    const Vec x1 = load_first_scaled(in + d, scale, count);
    const Vec x2 = load_first_scaled(in + half + d, scale, count);
    const Vec c = load_first(cos + d, count), s = load_first(sin + d, count);
    store_first(out + d, fms(x1, c, mul(x2, s)), count);
    store_first(out + half + d, fma(x2, c, mul(x1, s)), count);
  }
}

// The keys or values of one page for one layer and head, as the bank holds them.
template <class Stored>
struct PageRows {
  const Stored* data;
  const float* scale;  // null where the bank has none
  int64_t token_stride, count;
};

template <class Stored, class T>
inline void gather_row(const PageRows<Stored>& in, int64_t j, const float* cos, const float* sin,
                       T* out, int64_t dim) {
  const Stored* row = in.data + j * in.token_stride;
  const float factor = kQuantised<Stored> ? in.scale[j] : 1.0f;
  if (cos == nullptr) {
    convert_row(row, factor, out, dim);
  } else {
    rotate_row(row, factor, cos + j * (dim / 2), sin + j * (dim / 2), out, dim / 2);
  }
}

// Past the caches, in blocks of rows that a small buffer holds; rows of `out` are dense.
template <class Stored, class T>
inline void stream_tokens(const PageRows<Stored>& in, const float* cos, const float* sin, T* out,
                          int64_t dim) {
  alignas(64) T buffer[kStreamRows * kMaxHeadDim];
  const int64_t row_bytes = dim * sizeof(Stored);
  for (int64_t first = 0; first < in.count; first += kStreamRows) {
    const int64_t rows = in.count - first < kStreamRows ? in.count - first : kStreamRows;
    for (int64_t j = 0; j < rows; ++j) {
      const Stored* row = in.data + (first + j) * in.token_stride;
      for (int64_t at = 0; at < row_bytes; at += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(row) + kAheadBytes + at);
      }
      gather_row(in, first + j, cos, sin, buffer + j * dim, dim);
    }
    stream_bytes(out + first * dim, buffer, rows * dim * sizeof(T));
  }
}

// Writes `count` rows and then zeros up to `tokens`; rotates where cos is given.
template <class Stored, class T>
inline void gather_tokens(const PageRows<Stored>& in, const float* cos, const float* sin, T* out,
                          int64_t out_stride, int64_t tokens, int64_t dim, bool streamed) {
  const bool dense = out_stride == dim;
  const int64_t row_bytes = dim * sizeof(T);
  const bool aligned = (reinterpret_cast<uintptr_t>(out) | row_bytes) % 64 == 0;
  if (streamed && dense && aligned) {
    stream_tokens(in, cos, sin, out, dim);
  } else if (kSameType<Stored, T> && cos == nullptr && dense && in.token_stride == dim &&
             in.count > 0) {
    memcpy(out, in.data, in.count * row_bytes);
  } else {
    for (int64_t j = 0; j < in.count; ++j) {
      gather_row(in, j, cos, sin, out + j * out_stride, dim);
    }
  }
  const int64_t run = dense ? tokens - in.count : 1;
  for (int64_t j = in.count; j < tokens; j += run) {
    memset(out + j * out_stride, 0, run * row_bytes);
  }
}

template <class T>
inline T* rows_at(const TokenRows& rows, int64_t layer, int64_t b, int64_t head, int64_t token) {
  return static_cast<T*>(rows.data) + layer * rows.layer_stride + b * rows.batch_stride +
         head * rows.head_stride + token * rows.token_stride;
}

template <class Stored, class T>
void gather_pages(const GatherChunksParams& p, int64_t begin, int64_t end) {
  const PageTable& t = p.table;
  const int64_t dim = p.head_dim, heads = p.num_kv_heads, per_entry = p.layers * heads;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t entry = item / per_entry, layer = item % per_entry / heads, head = item % heads;
    const int64_t b = entry / t.max_pages, i = entry % t.max_pages, first = i * p.page_tokens;
    PageRows<Stored> k{nullptr, nullptr, p.token_stride, 0}, v = k;
    const float *cos = nullptr, *sin = nullptr;
    if (i < t.num_pages[b] && t.len[entry] > 0) {
      const int64_t page = t.page[entry];
      k.count = v.count = t.len[entry];
      k.data = static_cast<const Stored*>(p.kv) + page * p.page_stride + layer * p.layer_stride +
               head * p.head_stride;
      v.data = k.data + p.part_stride;
      if (kQuantised<Stored>) {
        k.scale = p.kv_scale + page * p.scale_page_stride + layer * p.scale_layer_stride +
                  head * p.scale_head_stride;
        v.scale = k.scale + p.scale_part_stride;
      }
      if (t.cos != nullptr) {
        cos = t.cos + t.base[entry] * (dim / 2);
        sin = t.sin + t.base[entry] * (dim / 2);
      }
    }
    gather_tokens(k, cos, sin, rows_at<T>(p.k, layer, b, head, first), p.k.token_stride,
                  p.page_tokens, dim, p.streamed);
    gather_tokens(v, nullptr, nullptr, rows_at<T>(p.v, layer, b, head, first), p.v.token_stride,
                  p.page_tokens, dim, p.streamed);
  }
  fence();
}

// sum += row, rotated backwards where cos is given.
template <class T>
inline void add_row(const T* row, const float* cos, const float* sin, float* sum, int64_t dim) {
  if (cos == nullptr) {
    for (int64_t d = 0; d < dim; d += kLanes) {
      const int64_t count = dim - d;
      store_first(sum + d, add(load_first(sum + d, count), load_first(row + d, count)), count);
    }
    return;
  }
  const int64_t half = dim / 2;
  for (int64_t d = 0; d < half; d += kLanes) {
    const int64_t count = half - d;
    const Vec x1 = load_first(row + d, count), x2 = load_first(row + half + d, count);
    const Vec c = load_first(cos + d, count), s = load_first(sin + d, count);
    const Vec sum1 = load_first(sum + d, count), sum2 = load_first(sum + half + d, count);
    store_first(sum + d, add(sum1, fma(x1, c, mul(x2, s))), count);
    store_first(sum + half + d, add(sum2, fms(x2, c, mul(x1, s))), count);
  }
}

// One token of one page, key or value: the sum over everyone who read it, in the table's order.
template <class T, class Stored>
inline void sum_readers(const GatherChunksBwdParams& p, const T* grad, int64_t page, int64_t layer,
                        int64_t head, int64_t token, bool rotated, Stored* out) {
  const PageTable& t = p.table;
  const int64_t dim = p.head_dim, heads = p.num_kv_heads;
  float sum[kMaxHeadDim];
  memset(sum, 0, dim * sizeof(float));
  for (int64_t r = p.reader_begin[page]; r < p.reader_begin[page + 1]; ++r) {
    const int64_t entry = p.readers[r], b = entry / t.max_pages, i = entry % t.max_pages;
    if (token >= t.len[entry]) continue;
    const int64_t row = ((layer * t.batch + b) * heads + head) * t.max_pages + i;
    const int64_t angle = rotated ? (t.base[entry] + token) * (dim / 2) : 0;
    add_row(grad + (row * p.page_tokens + token) * dim, rotated ? t.cos + angle : nullptr,
            rotated ? t.sin + angle : nullptr, sum, dim);
  }
  convert_row(sum, 1.0f, out, dim);
}

template <class T, class Stored>
void scatter_pages(const GatherChunksBwdParams& p, int64_t begin, int64_t end) {
  const int64_t dim = p.head_dim, heads = p.num_kv_heads, run = p.page_tokens * dim;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t page = item / (p.bank_layers * heads), head = item % heads;
    const int64_t layer = item / heads % p.bank_layers - p.first_layer;
    Stored* out = static_cast<Stored*>(p.dkv) + item * 2 * run;
    if (layer < 0 || layer >= p.layers || p.reader_begin[page] == p.reader_begin[page + 1]) {
      memset(out, 0, 2 * run * sizeof(Stored));
      continue;
    }
    const bool rotated = p.table.cos != nullptr;
    for (int64_t j = 0; j < p.page_tokens; ++j) {
      sum_readers(p, static_cast<const T*>(p.dk), page, layer, head, j, rotated, out + j * dim);
      sum_readers(p, static_cast<const T*>(p.dv), page, layer, head, j, false, out + run + j * dim);
    }
  }
}

inline void gather_chunks_kernel(const GatherChunksParams& p, int64_t begin, int64_t end) {
  dispatch_io_dtype(p.dtype, [&](auto out) {
    dispatch_bank_dtype(p.bank_dtype, [&](auto stored) {
      gather_pages<decltype(stored), decltype(out)>(p, begin, end);
    });
  });
}

inline void gather_chunks_bwd_kernel(const GatherChunksBwdParams& p, int64_t begin, int64_t end) {
  dispatch_io_dtype(p.dtype, [&](auto grad) {
    dispatch_io_dtype(p.bank_dtype, [&](auto stored) {
      scatter_pages<decltype(grad), decltype(stored)>(p, begin, end);
    });
  });
}

}  // namespace
}  // namespace lychee
