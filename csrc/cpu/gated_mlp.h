// SPDX-License-Identifier: Apache-2.0
// Parameters and entry points of the gated_mlp kernels. Torch-free; strides are in elements.
#pragma once

#include "cpu/panel.h"

namespace lychee {

// Bytes of packed weights held at a time; wider layers run in slices of the inner dimension.
constexpr int64_t kPackedBytes = int64_t{32} << 20;

struct GatedMlpParams {
  int64_t rows, hidden, inner;
  float* x;  // [rows, hidden]
  int64_t x_stride;
  const float* norm_weight;
  float eps;
  const float *gate, *up, *down;  // [inner, hidden] twice, [hidden, inner]
  int64_t gate_stride, up_stride, down_stride;

  float* normed;  // [padded rows, spread_stride(hidden)]
  // The slice of the inner dimension at hand, and its packed panels.
  int64_t first, count;
  float *packed_gate, *packed_up;  // [panels of count][hidden][kPanel]
  float* packed_down;              // [panels of hidden][count][kPanel]
};

// Floats of scratch one thread needs: activations and two tiles of products.
static inline int64_t gated_mlp_scratch(int64_t count) {
  return kItemRows * (spread_stride(panels_of(count) * kPanel) + 2 * kPanel);
}

using GatedMlpFn = void (*)(const GatedMlpParams&, int64_t item, float* scratch);
using GatedMlpStepFn = void (*)(const GatedMlpParams&, int64_t index);

// normed = rms_norm(x) of one item's rows; rows beyond the last are zero.
void gated_mlp_norm_generic(const GatedMlpParams&, int64_t item);
void gated_mlp_norm_avx2(const GatedMlpParams&, int64_t item);
void gated_mlp_norm_avx512(const GatedMlpParams&, int64_t item);

// Packs panel `index` of gate, then of up, then of down.
void gated_mlp_pack_generic(const GatedMlpParams&, int64_t index);
void gated_mlp_pack_avx2(const GatedMlpParams&, int64_t index);
void gated_mlp_pack_avx512(const GatedMlpParams&, int64_t index);

// Adds the slice's part of the result to one item's rows; scratch is 64-byte aligned.
void gated_mlp_generic(const GatedMlpParams&, int64_t item, float* scratch);
void gated_mlp_avx2(const GatedMlpParams&, int64_t item, float* scratch);
void gated_mlp_avx512(const GatedMlpParams&, int64_t item, float* scratch);

}  // namespace lychee
