// SPDX-License-Identifier: Apache-2.0
// The linear loops, written once against vec_*.h: an item's rows are normalised or copied into
// scratch and meet one packed panel of weights after the other.
#pragma once

#include "cpu/linear.h"
#include "cpu/panel_product.inl"

namespace lychee {
namespace {

inline void pack_kernel(const LinearParams& p, int64_t index) {
  const int64_t first = index * kPanel;
  pack_panel(p.weight + first * p.weight_stride, p.weight_stride, p.outputs - first, p.inputs,
             p.packed + first * p.inputs);
}

// Rows of one item in scratch; those that fill up the last register block are zero.
inline void load_item(const LinearParams& p, int64_t first, int64_t rows, float* a) {
  const int64_t stride = spread_stride(p.inputs);
  for (int64_t r = 0; r < padded_rows(rows); ++r, a += stride) {
    if (r >= rows) {
      memset(a, 0, p.inputs * sizeof(float));
      continue;
    }
    const int64_t row = first + r;
    const float* in =
        p.x + row / p.group_rows * p.x_group_stride + row % p.group_rows * p.x_row_stride;
    if (p.norm_weight == nullptr) {
      memcpy(a, in, p.inputs * sizeof(float));
    } else {
      norm_row(in, p.norm_weight, p.eps, p.inputs, a);
    }
  }
}

// One row of a tile of products, with the bias, to its place.
inline void store_tile_row(const LinearParams& p, const float* tile, int64_t column, float* out) {
  const int64_t columns = p.outputs - column < kPanel ? p.outputs - column : kPanel;
  for (int64_t j = 0; j < columns; j += kLanes) {
    Vec x = load(tile + j);
    if (p.bias != nullptr) x = add(x, load_first(p.bias + column + j, columns - j));
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
      store_tile_row(p, tile + r * kPanel, column, p.out + (first + r) * p.out_stride);
    }
  }
}

}  // namespace
}  // namespace lychee
