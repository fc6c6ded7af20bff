// SPDX-License-Identifier: Apache-2.0
// Checks and parameters of gather_chunks, its variant and its backward, for every device. No value
// that may lie on a device is read.
#pragma once

#include <utility>

#include "check.h"
#include "gather_chunks_params.h"

namespace lychee {

using OptionalTensor = std::optional<Tensor>;

inline const int32_t* table_ints(const Tensor& t, std::initializer_list<int64_t> sizes,
                                 const CheckDevice& check_device, const char* op,
                                 const char* argument) {
  check_device(t, op, argument);
  check_shape(t, sizes, op, argument);
  check_dtype(t, ScalarType::Int, op, argument);
  check_contiguous(t, op, argument);
  return static_cast<const int32_t*>(t.const_data_ptr());
}

inline const float* rope_table(const Tensor& t, int64_t positions, int64_t half,
                               const CheckDevice& check_device, const char* op,
                               const char* argument) {
  check_device(t, op, argument);
  check_shape(t, {positions, half}, op, argument);
  check_dtype(t, ScalarType::Float, op, argument);
  check_contiguous(t, op, argument);
  return static_cast<const float*>(t.const_data_ptr());
}

inline PageTable make_table(const Tensor& page_table, const Tensor& page_len,
                            const OptionalTensor& page_base, const Tensor& num_pages,
                            const OptionalTensor& cos, const OptionalTensor& sin, int64_t rope_mode,
                            int64_t bank_pages, int64_t head_dim, const CheckDevice& check_device,
                            const char* op) {
  PageTable t{};
  t.page = table_ints(page_table, {-1, -1}, check_device, op, "page_table");
  t.bank_pages = bank_pages;
  t.batch = page_table.size(0), t.max_pages = page_table.size(1);
  t.len = table_ints(page_len, {t.batch, t.max_pages}, check_device, op, "page_len");
  t.num_pages = table_ints(num_pages, {t.batch}, check_device, op, "num_pages");
  check_range(rope_mode, 0, 1, op, "rope_mode");
  if (rope_mode == 1) {
    check(cos.has_value() && sin.has_value() && page_base.has_value(), op, "cos",
          "cos, sin and page_base when rope_mode is affine", "None");
    t.base = table_ints(*page_base, {t.batch, t.max_pages}, check_device, op, "page_base");
    t.cos = rope_table(*cos, -1, head_dim / 2, check_device, op, "cos");
    t.sin = rope_table(*sin, cos->size(0), head_dim / 2, check_device, op, "sin");
    t.table_rows = cos->size(0);
  }
  return t;
}

inline void set_bank(GatherChunksParams* p, const Tensor& kv, const OptionalTensor& kv_scale,
                     int64_t first_layer, int64_t last_layer, const CheckDevice& check_device,
                     const char* op) {
  check_device(kv, op, "kv");
  check_shape(kv, {-1, -1, -1, 2, -1, -1}, op, "kv");
  check(kv.size(1) > 0, op, "kv", "at least one layer", "0");
  check_head_dim(kv.size(5), op, "kv");
  check_last_dim_contiguous(kv, op, "kv");
  check_range(first_layer, 0, last_layer, op, "layer_range");
  check_range(last_layer, first_layer, kv.size(1), op, "layer_range");
  p->layers = last_layer - first_layer;
  p->num_kv_heads = kv.size(2), p->page_tokens = kv.size(4), p->head_dim = kv.size(5);
  p->bank_dtype = bank_dtype(kv, op, "kv");
  p->kv = static_cast<const char*>(kv.const_data_ptr()) +
          first_layer * kv.stride(1) * static_cast<int64_t>(kv.element_size());
  p->page_stride = kv.stride(0), p->layer_stride = kv.stride(1), p->head_stride = kv.stride(2);
  p->part_stride = kv.stride(3), p->token_stride = kv.stride(4);
  const bool quantised = is_quantised(p->bank_dtype);
  check(quantised == kv_scale.has_value(), op, "kv_scale",
        quantised ? "a tensor with this bank dtype" : "None with this bank dtype",
        kv_scale.has_value() ? "a tensor" : "None");
  if (!quantised) return;
  check_device(*kv_scale, op, "kv_scale");
  check_shape(*kv_scale, {kv.size(0), kv.size(1), p->num_kv_heads, 2, p->page_tokens}, op,
              "kv_scale");
  check_dtype(*kv_scale, ScalarType::Float, op, "kv_scale");
  check_last_dim_contiguous(*kv_scale, op, "kv_scale");
  p->kv_scale =
      static_cast<const float*>(kv_scale->const_data_ptr()) + first_layer * kv_scale->stride(1);
  p->scale_page_stride = kv_scale->stride(0), p->scale_layer_stride = kv_scale->stride(1);
  p->scale_head_stride = kv_scale->stride(2), p->scale_part_stride = kv_scale->stride(3);
}

inline GatherChunksParams gather_params(const Tensor& kv, const OptionalTensor& kv_scale,
                                        const Tensor& page_table, const Tensor& page_len,
                                        const OptionalTensor& page_base, const Tensor& num_pages,
                                        const OptionalTensor& cos, const OptionalTensor& sin,
                                        int64_t first_layer, int64_t last_layer, int64_t rope_mode,
                                        const CheckDevice& check_device, const char* op) {
  GatherChunksParams p{};
  set_bank(&p, kv, kv_scale, first_layer, last_layer, check_device, op);
  p.table = make_table(page_table, page_len, page_base, num_pages, cos, sin, rope_mode, kv.size(0),
                       p.head_dim, check_device, op);
  return p;
}

// k and v, as they are given, have room for what is gathered.
inline void check_room(const GatherChunksParams& p, const Tensor& k, const Tensor& v,
                       const CheckDevice& check_device, const char* op) {
  const int64_t tokens = p.table.max_pages * p.page_tokens;
  for (const auto& [t, name] : {std::pair(k, "k"), std::pair(v, "v")}) {
    check_device(t, op, name);
    check_shape(t, {p.layers, p.table.batch, p.num_kv_heads, -1, p.head_dim}, op, name);
    check(t.size(3) >= tokens, op, name, "room for " + std::to_string(tokens) + " tokens",
          std::to_string(t.size(3)));
    check_dtype(t, k.scalar_type(), op, name);
    check_last_dim_contiguous(t, op, name);
  }
}

inline GatherChunksBwdParams gather_bwd_params(
    const Tensor& dk, const Tensor& dv, const Tensor& page_table, const Tensor& page_len,
    const OptionalTensor& page_base, const Tensor& num_pages, const OptionalTensor& cos,
    const OptionalTensor& sin, int64_t bank_pages, int64_t bank_layers, int64_t first_layer,
    int64_t page_tokens, int64_t rope_mode, ScalarType bank_dtype, const CheckDevice& check_device,
    const char* op) {
  GatherChunksBwdParams p{};
  check_shape(dk, {-1, -1, -1, -1, -1}, op, "dk");
  check_shape(dv, {dk.size(0), dk.size(1), dk.size(2), dk.size(3), dk.size(4)}, op, "dv");
  check_dtype(dv, dk.scalar_type(), op, "dv");
  for (const auto& [t, name] : {std::pair(dk, "dk"), std::pair(dv, "dv")}) {
    check_device(t, op, name);
    check_contiguous(t, op, name);
  }
  check_range(bank_pages, 0, INT32_MAX, op, "bank_pages");
  check_range(page_tokens, 0, INT32_MAX, op, "page_tokens");
  p.layers = dk.size(0), p.num_kv_heads = dk.size(2), p.head_dim = dk.size(4);
  p.page_tokens = page_tokens, p.bank_layers = bank_layers, p.first_layer = first_layer;
  check_head_dim(p.head_dim, op, "dk");
  check_range(first_layer, 0, bank_layers - p.layers, op, "first_layer");
  p.dtype = io_dtype(dk, op, "dk");
  p.bank_dtype = io_dtype(bank_dtype, op, "bank_dtype");
  p.table = make_table(page_table, page_len, page_base, num_pages, cos, sin, rope_mode, bank_pages,
                       p.head_dim, check_device, op);
  const int64_t tokens = p.table.max_pages * page_tokens;
  check_shape(dk, {-1, p.table.batch, -1, tokens, -1}, op, "dk");
  p.dk = dk.const_data_ptr();
  p.dv = dv.const_data_ptr();
  return p;
}

}  // namespace lychee
