// SPDX-License-Identifier: Apache-2.0
// The matrix products of attention on row-major scratch, blocked for the registers of one
// instruction set; written once against vec_*.h. Left operands are broadcast, right ones vectors.
#pragma once

#include "cpu/memory_attention.h"
#include LYCHEE_VEC_HEADER
#include "cpu/vec_tail.h"

namespace lychee {
namespace {

// Calls fn(first, M) for each block of M rows, M = kRowBlock but for the last one.
template <int M = kRowBlock, class Fn>
inline void for_rows(int64_t rows, const Fn& fn, int64_t first = 0) {
  if constexpr (M > 0) {
    for (; first + M <= rows; first += M) fn(first, std::integral_constant<int, M>());
    if (first < rows) for_rows<M - 1>(rows, fn, first);
  }
}

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

// out[m][d] += sum_j weights[m][j] values[j][d], for M rows and C vectors of dimensions. With
// kTransposed the weights lie as weights[j][m]. Rows of weights are kTileKeys long. The sum over j
// starts from zero: one sum over thousands of rows would lose three times as much.
template <int M, int C, bool kTransposed = false>
inline void value_panel(const float* weights, const float* values, int64_t value_stride,
                        int64_t count, float* out, int64_t out_stride) {
  constexpr int64_t kRow = kTransposed ? 1 : kTileKeys, kColumn = kTransposed ? kTileKeys : 1;
  Vec acc[M][C];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[m][c] = zero();
  }
  for (int64_t j = 0; j < count; ++j) {
    Vec value[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) value[c] = load(values + j * value_stride + c * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec x = broadcast(weights[m * kRow + j * kColumn]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[m][c] = fma(x, value[c], acc[m][c]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      float* sum = out + m * out_stride + c * kLanes;
      store(sum, add(load(sum), acc[m][c]));
    }
  }
}

}  // namespace
}  // namespace lychee
