// SPDX-License-Identifier: Apache-2.0
// Parameters and entry points of the linear kernels. Torch-free; strides are in elements.
#pragma once

#include "cpu/panel.h"
#include "dispatch.h"

namespace lychee {

struct LinearParams {
  Dtype dtype;  // of all tensors
  int64_t rows, inputs, outputs;
  const void* x;  // [groups, group_rows, inputs], rows numbered through
  int64_t group_rows, x_group_stride, x_row_stride;
  const void* norm_weight;  // null: x as it is
  float eps;
  const void* weight;  // [outputs, inputs]
  int64_t weight_stride;
  const void* bias;  // [outputs], or null
  bool add;          // to what `out` holds
  void* out;         // [rows, outputs]
  int64_t out_stride;
  float* packed;  // float32: [panels of outputs][inputs][kPanel]
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

// bfloat16 and float16, made for the few rows of a decoding step, which has to read every weight
// once: weights are taken as they lie, in blocks of outputs, and summed up in float32.
constexpr int64_t kHalfOutputs = 16;
static inline int64_t half_blocks_of(int64_t outputs) {
  return (outputs + kHalfOutputs - 1) / kHalfOutputs;
}
// Rows of one item as floats, spread_stride(inputs) apart and zero behind `inputs`.
using LinearHalfRowsFn = void (*)(const LinearParams&, int64_t item, float* rows);
void linear_half_rows_generic(const LinearParams&, int64_t item, float* rows);
void linear_half_rows_avx2(const LinearParams&, int64_t item, float* rows);
void linear_half_rows_avx512(const LinearParams&, int64_t item, float* rows);

// Computes one block of outputs of an item's rows.
using LinearHalfFn = void (*)(const LinearParams&, int64_t item, const float* rows, int64_t block);
void linear_half_generic(const LinearParams&, int64_t item, const float* rows, int64_t block);
void linear_half_avx2(const LinearParams&, int64_t item, const float* rows, int64_t block);
void linear_half_avx512(const LinearParams&, int64_t item, const float* rows, int64_t block);

}  // namespace lychee
