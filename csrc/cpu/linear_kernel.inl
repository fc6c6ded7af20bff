// SPDX-License-Identifier: Apache-2.0
// The linear loops, written once against vec_*.h: an item's rows are normalised or copied into
// scratch and meet one packed panel of weights after the other; half weights are not packed.
#pragma once

#include "cpu/linear.h"
#include "cpu/panel_product.inl"

namespace lychee {
namespace {

inline void pack_kernel(const LinearParams& p, int64_t index) {
  const int64_t first = index * kPanel;
  const float* weight = static_cast<const float*>(p.weight);
  pack_panel(weight + first * p.weight_stride, p.weight_stride, p.outputs - first, p.inputs,
             p.packed + first * p.inputs);
}

template <class T>
inline const T* row_of(const LinearParams& p, int64_t row) {
  const int64_t group = row / p.group_rows;
  return static_cast<const T*>(p.x) + group * p.x_group_stride +
         row % p.group_rows * p.x_row_stride;
}

// Rows of one item in scratch; those that fill up the last register block are zero.
inline void load_item(const LinearParams& p, int64_t first, int64_t rows, float* a) {
  const int64_t stride = spread_stride(p.inputs);
  for (int64_t r = 0; r < padded_rows(rows); ++r, a += stride) {
    if (r >= rows) {
      memset(a, 0, p.inputs * sizeof(float));
      continue;
    }
    const float* in = row_of<float>(p, first + r);
    if (p.norm_weight == nullptr) {
      memcpy(a, in, p.inputs * sizeof(float));
    } else {
      norm_row(in, static_cast<const float*>(p.norm_weight), p.eps, p.inputs, a);
    }
  }
}

// One row of a tile of at most `width` products, with the bias, to its place.
template <class T>
inline void store_tile_row(const LinearParams& p, const float* tile, int64_t width, int64_t column,
                           int64_t row) {
  const int64_t columns = p.outputs - column < width ? p.outputs - column : width;
  const T* bias = static_cast<const T*>(p.bias);
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec x = load(tile + j);
    if (bias != nullptr) x = add(x, load_first(bias + column + j, columns - j));
    if (p.add) x = add(x, load_first(out + column + j, columns - j));
    store_first(out + column + j, x, columns - j);
  }
}

inline void linear_kernel(const LinearParams& p, int64_t item, float* scratch) {
  const int64_t first = item * kItemRows, left = p.rows - first;
  const int64_t rows = left < kItemRows ? left : kItemRows;
  const int64_t stride = spread_stride(p.inputs);
  float* tile = scratch + kItemRows * stride;
  load_item(p, first, rows, scratch);
  for (int64_t column = 0; column < p.outputs; column += kPanel) {
    multiply_panel(scratch, stride, padded_rows(rows), p.packed + column * p.inputs, p.inputs,
                   tile);
    for (int64_t r = 0; r < rows; ++r) {
      store_tile_row<float>(p, tile + r * kPanel, kPanel, column, first + r);
    }
  }
}

// Weight rows that are read side by side, and rows that they are multiplied with in registers.
constexpr int kHalfWeights = 4;
constexpr int kHalfRows = 4;

template <class T>
inline void half_rows_kernel(const LinearParams& p, int64_t item, float* rows) {
  const int64_t first = item * kItemRows, left = p.rows - first;
  const int64_t stride = spread_stride(p.inputs);
  for (int64_t r = 0; r < left && r < kItemRows; ++r, rows += stride) {
    const T* in = row_of<T>(p, first + r);
    for (int64_t d = 0; d < stride; d += kLanes) {
      store(rows + d, d < p.inputs ? load_first(in + d, p.inputs - d) : zero());
    }
    if (p.norm_weight == nullptr) continue;
    const T* weight = static_cast<const T*>(p.norm_weight);
    Vec squares = zero();
    for (int64_t d = 0; d < stride; d += kLanes)
      squares = fma(load(rows + d), load(rows + d), squares);
    const float mean = reduce_add(squares) / static_cast<float>(p.inputs);
    const Vec scale = broadcast(1.0f / sqrtf(mean + p.eps));
    for (int64_t d = 0; d < p.inputs; d += kLanes) {
      store(rows + d, mul(mul(load(rows + d), scale), load_first(weight + d, p.inputs - d)));
    }
  }
}

// tile[r][j] = a[r] * w[j] for kRows rows and kHalfWeights rows of weights, of which the last
// may be all the same one.
template <int kRows, class T>
inline void multiply_half(const float* a, int64_t stride, const T* const* w, int64_t inputs,
                          int64_t ahead, float* tile) {
  Vec acc[kRows][kHalfWeights];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kHalfWeights; ++j) acc[r][j] = zero();
  }
  int64_t k = 0;
  for (; k + kLanes <= inputs; k += kLanes) {
    Vec b[kHalfWeights];
    for (int j = 0; j < kHalfWeights; ++j) {
      b[j] = load(w[j] + k);
      __builtin_prefetch(w[j] + k + ahead);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec x = load(a + r * stride + k);
      for (int j = 0; j < kHalfWeights; ++j) acc[r][j] = fma(x, b[j], acc[r][j]);
    }
  }
  for (int j = 0; k < inputs && j < kHalfWeights; ++j) {
    const Vec b = load_first(w[j] + k, inputs - k);
    for (int r = 0; r < kRows; ++r) acc[r][j] = fma(load(a + r * stride + k), b, acc[r][j]);
  }
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < kHalfWeights; ++j) tile[r * kHalfOutputs + j] = reduce_add(acc[r][j]);
  }
}

template <class T>
inline void half_kernel(const LinearParams& p, int64_t item, const float* rows, int64_t block) {
  const auto multiply = [](int64_t count) {
    return count >= 4   ? multiply_half<4, T>
           : count == 3 ? multiply_half<3, T>
           : count == 2 ? multiply_half<2, T>
                        : multiply_half<1, T>;
  };
  const int64_t first = item * kItemRows, left = p.rows - first;
  const int64_t count = left < kItemRows ? left : kItemRows;
  const int64_t stride = spread_stride(p.inputs), column = block * kHalfOutputs;
  const T* weight = static_cast<const T*>(p.weight);
  // The next rows of weights are fetched while these are multiplied.
  const int64_t ahead = kHalfWeights * p.weight_stride;
  for (int64_t r = 0; r < count; r += kHalfRows) {
    const int64_t some = count - r < kHalfRows ? count - r : kHalfRows;
    float tile[kHalfRows * kHalfOutputs];
    memset(tile, 0, sizeof tile);
    for (int64_t j = 0; j < kHalfOutputs && column + j < p.outputs; j += kHalfWeights) {
      const T* w[kHalfWeights];
      for (int64_t i = 0; i < kHalfWeights; ++i) {
        const int64_t output = column + j + i < p.outputs ? column + j + i : p.outputs - 1;
        w[i] = weight + output * p.weight_stride;
      }
      multiply(some)(rows + r * stride, stride, w, p.inputs, ahead, tile + j);
    }
    for (int64_t i = 0; i < some; ++i) {
      store_tile_row<T>(p, tile + i * kHalfOutputs, kHalfOutputs, column, first + r + i);
    }
  }
}

}  // namespace
}  // namespace lychee
