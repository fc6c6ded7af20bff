// SPDX-License-Identifier: Apache-2.0
// The gated_mlp loops, written once against vec_*.h: weights packed into panels of 64 columns, and
// products of an item's rows with one panel at a time, whose results never leave the cache.
#pragma once

#include "cpu/gated_mlp.h"
#include LYCHEE_VEC_HEADER
#include "cpu/vec_tail.h"

namespace lychee {
namespace {

// Inner products are summed in stretches of this length, each from zero: a stretch of a panel is
// 128 KiB, and long sums lose less.
constexpr int64_t kStretch = 512;
constexpr float kLog2E = 1.44269504f;

// c[m][j] (+)= sum_k a[m][k] * b[k][j] for kRowBlock rows and kColBlock vectors of columns.
template <bool kAdd>
inline void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t depth,
                           float* c) {
  Vec acc[kRowBlock][kColBlock];
#pragma GCC unroll 8
  for (int m = 0; m < kRowBlock; ++m) {
#pragma GCC unroll 8
    for (int j = 0; j < kColBlock; ++j) acc[m][j] = zero();
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec column[kColBlock];
#pragma GCC unroll 8
    for (int j = 0; j < kColBlock; ++j) column[j] = load(b + k * kPanel + j * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kRowBlock; ++m) {
      const Vec x = broadcast(a[m * a_stride + k]);
#pragma GCC unroll 8
      for (int j = 0; j < kColBlock; ++j) acc[m][j] = fma(x, column[j], acc[m][j]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kRowBlock; ++m) {
#pragma GCC unroll 8
    for (int j = 0; j < kColBlock; ++j) {
      float* out = c + m * kPanel + j * kLanes;
      store(out, kAdd ? add(load(out), acc[m][j]) : acc[m][j]);
    }
  }
}

// c [rows, kPanel] = a [rows, depth] * panel [depth, kPanel]; rows is a multiple of kRowBlock.
inline void multiply_panel(const float* a, int64_t a_stride, int64_t rows, const float* panel,
                           int64_t depth, float* c) {
  for (int64_t k = 0; k < depth; k += kStretch) {
    const int64_t stretch = depth - k < kStretch ? depth - k : kStretch;
    const auto multiply = k == 0 ? multiply_block<false> : multiply_block<true>;
    for (int64_t j = 0; j < kPanel; j += kColBlock * kLanes) {
      for (int64_t r = 0; r < rows; r += kRowBlock) {
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

inline int64_t item_rows(const GatedMlpParams& p, int64_t item) {
  const int64_t left = p.rows - item * kItemRows;
  return left < kItemRows ? left : kItemRows;
}

inline void norm_kernel(const GatedMlpParams& p, int64_t item) {
  const int64_t rows = item_rows(p, item);
  for (int64_t r = 0; r < kItemRows; ++r) {
    const float* in = p.x + (item * kItemRows + r) * p.x_stride;
    float* out = p.normed + (item * kItemRows + r) * p.hidden;
    if (r >= rows) {
      memset(out, 0, p.hidden * sizeof(float));
      continue;
    }
    Vec squares = zero();
    for (int64_t d = 0; d < p.hidden; d += kLanes) {
      const Vec x = load_first(in + d, p.hidden - d);
      squares = fma(x, x, squares);
    }
    const float mean = reduce_add(squares) / static_cast<float>(p.hidden);
    const Vec scale = broadcast(1.0f / sqrtf(mean + p.eps));
    for (int64_t d = 0; d < p.hidden; d += kLanes) {
      const int64_t count = p.hidden - d;
      const Vec x = mul(load_first(in + d, count), scale);
      store_first(out + d, mul(x, load_first(p.norm_weight + d, count)), count);
    }
  }
}

inline void pack_kernel(const GatedMlpParams& p, int64_t index) {
  const int64_t inner = panels_of(p.count);
  if (index < 2 * inner) {
    const bool is_gate = index < inner;
    const int64_t panel = is_gate ? index : index - inner;
    const int64_t stride = is_gate ? p.gate_stride : p.up_stride;
    const float* w = (is_gate ? p.gate : p.up) + (p.first + panel * kPanel) * stride;
    pack_panel(w, stride, p.count - panel * kPanel, p.hidden,
               (is_gate ? p.packed_gate : p.packed_up) + panel * p.hidden * kPanel);
    return;
  }
  const int64_t panel = index - 2 * inner;
  pack_panel(p.down + panel * kPanel * p.down_stride + p.first, p.down_stride,
             p.hidden - panel * kPanel, p.count, p.packed_down + panel * p.count * kPanel);
}

// silu(gate) * up; the exponent is clamped where silu is 0 in float32 anyway.
inline Vec activate(Vec gate, Vec up) {
  const Vec exponent = min(mul(gate, broadcast(-kLog2E)), broadcast(126.0f));
  return div(mul(gate, up), add(broadcast(1.0f), exp2(exponent)));
}

inline void gated_mlp_kernel(const GatedMlpParams& p, int64_t item, float* scratch) {
  const int64_t inner = panels_of(p.count), act_stride = inner * kPanel;
  const int64_t rows = item_rows(p, item);
  const int64_t padded = (rows + kRowBlock - 1) / kRowBlock * kRowBlock;
  float* act = scratch;
  float* gate = act + kItemRows * act_stride;
  float* up = gate + kItemRows * kPanel;
  const float* normed = p.normed + item * kItemRows * p.hidden;
  for (int64_t panel = 0; panel < inner; ++panel) {
    const int64_t offset = panel * p.hidden * kPanel;
    multiply_panel(normed, p.hidden, padded, p.packed_gate + offset, p.hidden, gate);
    multiply_panel(normed, p.hidden, padded, p.packed_up + offset, p.hidden, up);
    for (int64_t r = 0; r < padded; ++r) {
      for (int64_t j = 0; j < kPanel; j += kLanes) {
        const int64_t i = r * kPanel + j;
        store(act + r * act_stride + panel * kPanel + j, activate(load(gate + i), load(up + i)));
      }
    }
  }
  for (int64_t panel = 0; panel < panels_of(p.hidden); ++panel) {
    multiply_panel(act, act_stride, padded, p.packed_down + panel * p.count * kPanel, p.count,
                   gate);
    for (int64_t r = 0; r < rows; ++r) {
      float* out = p.x + (item * kItemRows + r) * p.x_stride + panel * kPanel;
      const int64_t columns = p.hidden - panel * kPanel;
      for (int64_t j = 0; j < kPanel && j < columns; j += kLanes) {
        const Vec sum = add(load_first(out + j, columns - j), load(gate + r * kPanel + j));
        store_first(out + j, sum, columns - j);
      }
    }
  }
}

}  // namespace
}  // namespace lychee
