// SPDX-License-Identifier: Apache-2.0
// The backward of compress_pack, written once against vec_*.h: one pass over the rows that rotates
// back, returns to segment order and adds the memory rows' second gradient.
#pragma once

#include "cpu/compress_pack_kernel.inl"

namespace lychee {
namespace {

// out = R(-position) grad + mem_grad, rounded once; a null grad or mem_grad counts as zero, and
// without cos nothing is rotated.
template <class T, int kHalf, bool kStream>
inline void unrotate_row(const T* grad, const T* mem_grad, T* out, const float* cos,
                         const float* sin, int64_t half) {
  constexpr int kVectors = kSplitPairs<T, kHalf> ? 2 : 1;
  if constexpr (kHalf != 0) half = kHalf;
  for (int64_t d = 0; d < half; d += kVectors * kLanes) {
    Vec x1[kVectors], x2[kVectors], y1[kVectors], y2[kVectors];
    for (int i = 0; i < kVectors; ++i) y1[i] = y2[i] = zero();
    if (mem_grad != nullptr) {
      load_step(mem_grad + d, half - d, y1);
      load_step(mem_grad + half + d, half - d, y2);
    }
    if (grad != nullptr) {
      load_step(grad + d, half - d, x1);
      load_step(grad + half + d, half - d, x2);
      for (int i = 0; i < kVectors; ++i) {
        if (cos != nullptr) {
          const int64_t at = d + i * kLanes;
          const Vec c = load_first(cos + at, half - at), s = load_first(sin + at, half - at);
          const Vec turned = fma(x1[i], c, mul(x2[i], s));
          x2[i] = fms(x2[i], c, mul(x1[i], s));
          x1[i] = turned;
        }
        y1[i] = add(y1[i], x1[i]);
        y2[i] = add(y2[i], x2[i]);
      }
    }
    store_step<kStream>(out + d, half - d, y1);
    store_step<kStream>(out + half + d, half - d, y2);
  }
}

template <class T, int kHalf, bool kStream>
void unpack_tile(const CompressPackBwdParams& p, const Tile<kHalf>& tile) {
  const bool rotated = p.order.cos != nullptr;
  for (int64_t h = 0; h < p.num_heads; ++h) {
    for (int64_t i = 0; i < tile.count; ++i) {
      const int64_t j = tile.memory[i];
      if (p.memory_only && j < 0) continue;
      const int64_t from = p.memory_only ? j : tile.first + i;
      const int64_t to = p.memory_only ? tile.batch * p.order.memory + j : tile.segment[i];
      const T *grad = nullptr, *mem_grad = nullptr;
      if (p.grad != nullptr) {
        grad = static_cast<const T*>(p.grad) + tile.batch * p.grad_batch_stride +
               h * p.grad_head_stride + from * p.grad_row_stride;
      }
      if (p.mem_grad != nullptr && j >= 0) {
        mem_grad = static_cast<const T*>(p.mem_grad) + tile.batch * p.mem_batch_stride +
                   h * p.mem_head_stride + j * p.mem_row_stride;
      }
      T* out = static_cast<T*>(p.out) + (to * p.num_heads + h) * p.head_dim;
      unrotate_row<T, kHalf, kStream>(grad, mem_grad, out, rotated ? tile.cos[i] : nullptr,
                                      tile.sin[i], p.head_dim / 2);
    }
  }
}

template <class T, int kHalf>
void compress_pack_bwd_rows(const CompressPackBwdParams& p, int64_t begin, int64_t end) {
  Tile<kHalf> tile;
  for (int64_t index = begin; index < end; index += tile.count) {
    fill_tile<T>(p.order, index, end, &tile);
    (p.stream ? unpack_tile<T, kHalf, kCanStream<T, kHalf>> : unpack_tile<T, kHalf, false>)(p,
                                                                                            tile);
  }
  if (p.stream) fence();
}

inline void compress_pack_bwd_kernel(const CompressPackBwdParams& p, int64_t begin, int64_t end) {
  dispatch_io_dtype(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (p.head_dim == 128) return compress_pack_bwd_rows<T, 64>(p, begin, end);
    if (p.head_dim == 64) return compress_pack_bwd_rows<T, 32>(p, begin, end);
    compress_pack_bwd_rows<T, 0>(p, begin, end);
  });
}

}  // namespace
}  // namespace lychee
