// SPDX-License-Identifier: Apache-2.0
// Parameters and entry points of the linear kernels. Torch-free; strides are in elements.
#pragma once

#include "cpu/panel.h"

namespace lychee {

struct LinearParams {
  int64_t rows, inputs, outputs;
  const float* x;  // [groups, group_rows, inputs], rows numbered through
  int64_t group_rows, x_group_stride, x_row_stride;
  const float* norm_weight;  // null: x as it is
  float eps;
  const float* weight;  // [outputs, inputs]
  int64_t weight_stride;
  const float* bias;  // [outputs], or null
  bool add;           // to what `out` holds
  float* out;         // [rows, outputs]
  int64_t out_stride;
  float* packed;  // [panels of outputs][inputs][kPanel]
};

// Floats of scratch one thread needs: an item's rows and a tile of products.
static inline int64_t linear_scratch(int64_t inputs) {
  return kItemRows * (spread_stride(inputs) + kPanel);
}

// Packs panel `index` of the weight.
using LinearPackFn = void (*)(const LinearParams&, int64_t index);
void linear_pack_generic(const LinearParams&, int64_t index);
void linear_pack_avx2(const LinearParams&, int64_t index);
void linear_pack_avx512(const LinearParams&, int64_t index);

// Computes one item's rows; scratch is 64-byte aligned.
using LinearFn = void (*)(const LinearParams&, int64_t item, float* scratch);
void linear_generic(const LinearParams&, int64_t item, float* scratch);
void linear_avx2(const LinearParams&, int64_t item, float* scratch);
void linear_avx512(const LinearParams&, int64_t item, float* scratch);

}  // namespace lychee
