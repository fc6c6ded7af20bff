// SPDX-License-Identifier: Apache-2.0
// The gated_mlp loops, written once against vec_*.h: products of an item's rows with one packed
// panel of weights at a time, whose results never leave the cache.
#pragma once

#include "cpu/gated_mlp.h"
#include "cpu/panel_product.inl"

namespace lychee {
namespace {

constexpr float kLog2E = 1.44269504f;

inline int64_t item_rows(const GatedMlpParams& p, int64_t item) {
  const int64_t left = p.rows - item * kItemRows;
  return left < kItemRows ? left : kItemRows;
}

inline void norm_kernel(const GatedMlpParams& p, int64_t item) {
  const int64_t rows = item_rows(p, item), stride = spread_stride(p.hidden);
  for (int64_t r = 0; r < kItemRows; ++r) {
    const float* in = p.x + (item * kItemRows + r) * p.x_stride;
    float* out = p.normed + (item * kItemRows + r) * stride;
    if (r >= rows) {
      memset(out, 0, p.hidden * sizeof(float));
      continue;
    }
    norm_row(in, p.norm_weight, p.eps, p.hidden, out);
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
  return mul(div(gate, add(broadcast(1.0f), exp2(exponent))), up);
}

inline void gated_mlp_kernel(const GatedMlpParams& p, int64_t item, float* scratch) {
  const int64_t inner = panels_of(p.count), act_stride = spread_stride(inner * kPanel);
  const int64_t rows = item_rows(p, item), padded = padded_rows(rows);
  const int64_t normed_stride = spread_stride(p.hidden);
  float* act = scratch;
  float* gate = act + kItemRows * act_stride;
  float* up = gate + kItemRows * kPanel;
  const float* normed = p.normed + item * kItemRows * normed_stride;
  for (int64_t panel = 0; panel < inner; ++panel) {
    const int64_t offset = panel * p.hidden * kPanel;
    multiply_panel(normed, normed_stride, padded, p.packed_gate + offset, p.hidden, gate);
    multiply_panel(normed, normed_stride, padded, p.packed_up + offset, p.hidden, up);
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
