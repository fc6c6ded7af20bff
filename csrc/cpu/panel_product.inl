// SPDX-License-Identifier: Apache-2.0
// Products of rows with a weight matrix that was packed into panels of kPanel columns, and the
// row-wise work around them; written once against vec_*.h.
#pragma once

#include "cpu/panel.h"
#include LYCHEE_VEC_HEADER
#include "cpu/vec_tail.h"

namespace lychee {
namespace {

// Register blocking: two vectors of columns, and as many rows as the registers hold. Few columns
// keep the stream of weights from the second-level cache at 9 bytes a cycle.
constexpr int kPanelVectors = 2;
constexpr int kPanelRows = kLanes == 16 ? 14 : kRowBlock;
static_assert(kPanel % (kPanelVectors * kLanes) == 0 && kItemRows % kPanelRows == 0);
// Inner products are summed in stretches of this length, each from zero: a stretch of a panel is
// 64 KiB, and long sums lose less.
constexpr int64_t kStretch = 512;
// Weights are fetched this many steps ahead.
constexpr int64_t kAhead = 16;

// c[m][j] (+)= sum_k a[m][k] * b[k][j] for kPanelRows rows and kPanelVectors vectors of columns.
template <bool kAdd>
inline void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t depth,
                           float* c) {
  Vec acc[kPanelRows][kPanelVectors];
#pragma GCC unroll 16
  for (int m = 0; m < kPanelRows; ++m) {
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) acc[m][j] = zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec column[kPanelVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) {
      column[j] = load(b + k * kPanel + j * kLanes);
      __builtin_prefetch(b + (k + kAhead) * kPanel + j * kLanes);
    }
#pragma GCC unroll 16
    for (int m = 0; m < kPanelRows; ++m) {
      const Vec x = broadcast(a[m * a_stride + k]);
#pragma GCC unroll 2
      for (int j = 0; j < kPanelVectors; ++j) acc[m][j] = fma(x, column[j], acc[m][j]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kPanelRows; ++m) {
#pragma GCC unroll 2
    for (int j = 0; j < kPanelVectors; ++j) {
      float* out = c + m * kPanel + j * kLanes;
      store(out, kAdd ? add(load(out), acc[m][j]) : acc[m][j]);
    }
  }
}

// c [rows, kPanel] = a [rows, depth] * panel [depth, kPanel]; rows is a multiple of kPanelRows.
inline void multiply_panel(const float* a, int64_t a_stride, int64_t rows, const float* panel,
                           int64_t depth, float* c) {
  if (depth == 0) memset(c, 0, rows * kPanel * sizeof(float));
  for (int64_t k = 0; k < depth; k += kStretch) {
    const int64_t stretch = depth - k < kStretch ? depth - k : kStretch;
    const auto multiply = k == 0 ? multiply_block<false> : multiply_block<true>;
    for (int64_t j = 0; j < kPanel; j += kPanelVectors * kLanes) {
      for (int64_t r = 0; r < rows; r += kPanelRows) {
        multiply(a + r * a_stride + k, a_stride, panel + k * kPanel + j, stretch,
                 c + r * kPanel + j);
      }
    }
  }
}

// panel[k][j] = w[j][k] for `columns` rows of w; columns beyond them are zero.
inline void pack_panel(const float* w, int64_t stride, int64_t columns, int64_t depth,
                       float* panel) {
  for (int64_t j = 0; j < kPanel; j += kLanes) {
    for (int64_t k = 0; k < depth; k += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = j + i < columns ? load_first(w + (j + i) * stride + k, depth - k) : zero();
      }
      transpose(block);
      for (int i = 0; i < kLanes && k + i < depth; ++i) {
        store(panel + (k + i) * kPanel + j, block[i]);
      }
    }
  }
}

inline int64_t padded_rows(int64_t rows) {
  return (rows + kPanelRows - 1) / kPanelRows * kPanelRows;
}

// out = in / rms(in) * weight over `size` elements.
inline void norm_row(const float* in, const float* weight, float eps, int64_t size, float* out) {
  Vec squares = zero();
  for (int64_t d = 0; d < size; d += kLanes) {
    const Vec x = load_first(in + d, size - d);
    squares = fma(x, x, squares);
  }
  const float mean = reduce_add(squares) / static_cast<float>(size);
  const Vec scale = broadcast(1.0f / sqrtf(mean + eps));
  for (int64_t d = 0; d < size; d += kLanes) {
    const Vec x = mul(load_first(in + d, size - d), scale);
    store_first(out + d, mul(x, load_first(weight + d, size - d)), size - d);
  }
}

}  // namespace
}  // namespace lychee
