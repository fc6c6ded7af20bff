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

// Rounds to nearest even; |x| <= 448.
inline Float8E4M3 to_float8(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 24 & 0x80;
  bits &= 0x7fffffff;
  float magnitude;
  memcpy(&magnitude, &bits, sizeof magnitude);
  const uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
  const uint32_t subnormal = static_cast<uint32_t>(rintf(magnitude * 512.0f));
  return {static_cast<uint8_t>(sign | (magnitude < 0.015625f ? subnormal : normal))};
}

template <class T>
inline void copy_row(const T* in, T* out, int64_t size) {
  memcpy(out, in, size * sizeof(T));
}

template <class T>
inline void rotate_row(const T* in, T* out, const float* cos, const float* sin, int64_t half) {
  for (int64_t d = 0; d < half; d += kLanes) {
    const int64_t count = half - d;
    const Vec x1 = load_first(in + d, count), x2 = load_first(in + half + d, count);
    const Vec c = load_first(cos + d, count), s = load_first(sin + d, count);
    store_first(out + d, fms(x1, c, mul(x2, s)), count);
    store_first(out + half + d, fma(x2, c, mul(x1, s)), count);
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
      if constexpr (sizeof(Stored) == 1 && kLevel == 127.0f) {
        store_first(out + d, x, size - d);
      } else {
        float values[kLanes];
        store(values, x);
        const int64_t count = size - d < kLanes ? size - d : kLanes;
        for (int64_t i = 0; i < count; ++i) out[d + i] = to_float8(values[i]);
      }
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

template <class T>
void compress_pack_rows(const CompressPackParams& p, int64_t begin, int64_t end) {
  const int64_t rows = p.window + p.memory, dim = p.head_dim, half = dim / 2;
  const int64_t query_rows = p.memory_queries_only ? p.memory : rows;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t b = index / rows, s = index % rows;
    const bool is_memory = s % (p.ratio + 1) == p.ratio;
    const int64_t j = s / (p.ratio + 1);  // memory index, or the group a raw row belongs to
    const int64_t source = is_memory ? p.batch * p.window + b * p.memory + j : b * p.window + s - j;
    const int64_t position = p.positions ? p.positions[index] : p.pos0 + s;
    const float *cos = p.cos + position * half, *sin = p.sin + position * half;
    const T* k = static_cast<const T*>(p.k) + source * p.k_row_stride;
    const T* v = static_cast<const T*>(p.v) + source * p.v_row_stride;

    if (is_memory || !p.memory_queries_only) {
      const int64_t q_source = p.memory_queries_only ? b * p.memory + j : source;
      const int64_t q_row = p.memory_queries_only ? j : s;
      const T* q = static_cast<const T*>(p.q) + q_source * p.q_row_stride;
      T* out = static_cast<T*>(p.q_rot) + (b * p.num_heads * query_rows + q_row) * dim;
      for (int64_t h = 0; h < p.num_heads; ++h) {
        rotate_row(q + h * p.q_head_stride, out + h * query_rows * dim, cos, sin, half);
      }
    }
    for (int64_t h = 0; h < p.num_kv_heads; ++h) {
      const int64_t out = ((b * p.num_kv_heads + h) * rows + s) * dim;
      rotate_row(k + h * p.k_head_stride, static_cast<T*>(p.k_rot) + out, cos, sin, half);
      copy_row(v + h * p.v_head_stride, static_cast<T*>(p.v_out) + out, dim);
    }
    if (!is_memory) continue;
    if (p.mem_k != nullptr) {
      for (int64_t h = 0; h < p.num_kv_heads; ++h) {
        const int64_t out = ((b * p.num_kv_heads + h) * p.memory + j) * dim;
        copy_row(k + h * p.k_head_stride, static_cast<T*>(p.mem_k) + out, dim);
        copy_row(v + h * p.v_head_stride, static_cast<T*>(p.mem_v) + out, dim);
      }
    }
    if (p.bank.data != nullptr) {
      write_slot(p.bank, p.bank.slots[b * p.memory + j], k, p.k_head_stride, v, p.v_head_stride,
                 p.num_kv_heads, dim);
    }
  }
}

inline void compress_pack_kernel(const CompressPackParams& p, int64_t begin, int64_t end) {
  dispatch_io_dtype(p.dtype, [&](auto tag) { compress_pack_rows<decltype(tag)>(p, begin, end); });
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
