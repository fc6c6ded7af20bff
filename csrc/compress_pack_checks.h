// SPDX-License-Identifier: Apache-2.0
// Checks and parameters of compress_pack, its variants and its backward, for every device. No value
// that may lie on a device is read.
#pragma once

#include <utility>

#include "check.h"
#include "compress_pack_params.h"

namespace lychee {

using OptionalTensor = std::optional<Tensor>;

inline void check_rows(const Tensor& t, int64_t rows, int64_t heads, int64_t dim, ScalarType dtype,
                       const CheckDevice& check_device, const char* op, const char* argument) {
  check_device(t, op, argument);
  check_shape(t, {rows, heads, dim}, op, argument);
  check_dtype(t, dtype, op, argument);
  check_last_dim_contiguous(t, op, argument);
}

// Tables and positions. Whether each given position lies inside the tables is not looked at.
inline void set_positions(RowOrder* order, const Tensor& cos, const Tensor& sin,
                          const OptionalTensor& positions, int64_t pos0,
                          const CheckDevice& check_device, const char* op) {
  const int64_t rows = order->window + order->memory;
  check_shape(cos, {-1, order->half}, op, "cos");
  check_shape(sin, {cos.size(0), order->half}, op, "sin");
  for (const auto& [table, name] : {std::pair(cos, "cos"), std::pair(sin, "sin")}) {
    check_device(table, op, name);
    check_dtype(table, ScalarType::Float, op, name);
    check_contiguous(table, op, name);
  }
  order->cos = static_cast<const float*>(cos.const_data_ptr());
  order->sin = static_cast<const float*>(sin.const_data_ptr());
  order->table_rows = cos.size(0);
  order->pos0 = pos0;
  if (!positions.has_value()) {
    check_range(pos0, 0, cos.size(0) - rows, op, "pos0");
    return;
  }
  check_device(*positions, op, "positions");
  check_shape(*positions, {order->batch, rows}, op, "positions");
  check_dtype(*positions, ScalarType::Long, op, "positions");
  check_contiguous(*positions, op, "positions");
  order->positions = static_cast<const int64_t*>(positions->const_data_ptr());
}

// Keys and values of `rows` rows; p->dtype, num_kv_heads and head_dim are those of k.
inline void set_keys_and_values(CompressPackParams* p, const Tensor& k, const Tensor& v,
                                int64_t rows, const CheckDevice& check_device, const char* op) {
  p->dtype = io_dtype(k, op, "k");
  p->num_kv_heads = k.size(1), p->head_dim = k.size(2);
  check_head_dim(p->head_dim, op, "k");
  for (const auto& [t, name] : {std::pair(k, "k"), std::pair(v, "v")}) {
    check_rows(t, rows, p->num_kv_heads, p->head_dim, k.scalar_type(), check_device, op, name);
  }
  p->k = k.const_data_ptr();
  p->v = v.const_data_ptr();
  p->k_row_stride = k.stride(0), p->k_head_stride = k.stride(1);
  p->v_row_stride = v.stride(0), p->v_head_stride = v.stride(1);
}

inline CompressPackParams pack_params(const Tensor& q, const Tensor& k, const Tensor& v,
                                      int64_t batch, int64_t ratio, const CheckDevice& check_device,
                                      const char* op) {
  check_range(batch, 1, INT32_MAX, op, "batch");
  check_range(ratio, 1, INT32_MAX, op, "ratio");
  check_device(k, op, "k");
  check_shape(k, {-1, -1, -1}, op, "k");
  const int64_t rows = k.size(0) / batch, memory = rows / (ratio + 1);
  check(k.size(0) % batch == 0 && rows % (ratio + 1) == 0, op, "k",
        "batch * (window + window / ratio) rows", std::to_string(k.size(0)));

  CompressPackParams p{};
  set_keys_and_values(&p, k, v, k.size(0), check_device, op);
  p.order.batch = batch, p.order.ratio = ratio;
  p.order.memory = memory, p.order.window = rows - memory, p.order.half = p.head_dim / 2;
  check_rows(q, -1, -1, p.head_dim, k.scalar_type(), check_device, op, "q");
  p.num_heads = q.size(1);
  p.memory_queries_only = q.size(0) != k.size(0);
  check(!p.memory_queries_only || q.size(0) == batch * memory, op, "q",
        std::to_string(k.size(0)) + " rows (all) or " + std::to_string(batch * memory) +
            " rows (memory only)",
        std::to_string(q.size(0)));
  p.q = q.const_data_ptr();
  p.q_row_stride = q.stride(0), p.q_head_stride = q.stride(1);
  return p;
}

// k and v hold memory rows only.
inline CompressPackParams write_params(const Tensor& k, const Tensor& v, int64_t batch,
                                       const CheckDevice& check_device, const char* op) {
  check_range(batch, 1, INT32_MAX, op, "batch");
  check_device(k, op, "k");
  check_shape(k, {-1, -1, -1}, op, "k");
  CompressPackParams p{};
  p.order.batch = batch, p.order.memory = k.size(0) / batch;
  set_keys_and_values(&p, k, v, batch * p.order.memory, check_device, op);
  return p;
}

// The table of places, its values unchecked.
inline SlotTable slot_table(const CompressPackParams& p, const Tensor& kv, const Tensor& page_table,
                            const Tensor& slot0, const OptionalTensor& mem_valid,
                            const CheckDevice& check_device, const char* op) {
  check_shape(page_table, {p.order.batch, -1}, op, "page_table");
  check_shape(slot0, {p.order.batch}, op, "slot0");
  for (const auto& [t, name] : {std::pair(page_table, "page_table"), std::pair(slot0, "slot0")}) {
    check_device(t, op, name);
    check_dtype(t, ScalarType::Int, op, name);
    check_contiguous(t, op, name);
  }
  SlotTable slots{};
  if (mem_valid.has_value()) {
    check_device(*mem_valid, op, "mem_valid");
    check_shape(*mem_valid, {p.order.batch, p.order.memory}, op, "mem_valid");
    check_dtype(*mem_valid, ScalarType::Bool, op, "mem_valid");
    check_contiguous(*mem_valid, op, "mem_valid");
    slots.valid = static_cast<const bool*>(mem_valid->const_data_ptr());
  }
  check(kv.size(4) > 0, op, "kv", "at least one token per page", shape_string(kv));
  slots.page = static_cast<const int32_t*>(page_table.const_data_ptr());
  slots.first = static_cast<const int32_t*>(slot0.const_data_ptr());
  slots.max_pages = page_table.size(1), slots.bank_pages = kv.size(0);
  return slots;
}

inline BankWriter make_bank(const CompressPackParams& p, const Tensor& kv,
                            const OptionalTensor& kv_scale, int64_t layer,
                            const CheckDevice& check_device, const char* op) {
  check_device(kv, op, "kv");
  check_shape(kv, {-1, -1, p.num_kv_heads, 2, -1, p.head_dim}, op, "kv");
  check_last_dim_contiguous(kv, op, "kv");
  check_range(layer, 0, kv.size(1) - 1, op, "layer");
  BankWriter bank{};
  bank.dtype = bank_dtype(kv, op, "kv");
  bank.page_tokens = kv.size(4);
  bank.page_stride = kv.stride(0), bank.head_stride = kv.stride(2);
  bank.part_stride = kv.stride(3), bank.token_stride = kv.stride(4);
  bank.data = static_cast<char*>(kv.mutable_data_ptr()) +
              layer * kv.stride(1) * static_cast<int64_t>(kv.element_size());
  check(is_quantised(bank.dtype) == kv_scale.has_value(), op, "kv_scale",
        is_quantised(bank.dtype) ? "a tensor with this bank dtype" : "None with this bank dtype",
        kv_scale.has_value() ? "a tensor" : "None");
  if (kv_scale.has_value()) {
    check_device(*kv_scale, op, "kv_scale");
    check_shape(*kv_scale, {kv.size(0), kv.size(1), p.num_kv_heads, 2, kv.size(4)}, op, "kv_scale");
    check_dtype(*kv_scale, ScalarType::Float, op, "kv_scale");
    check_last_dim_contiguous(*kv_scale, op, "kv_scale");
    bank.scale = static_cast<float*>(kv_scale->mutable_data_ptr()) + layer * kv_scale->stride(1);
    bank.scale_page_stride = kv_scale->stride(0), bank.scale_head_stride = kv_scale->stride(2);
    bank.scale_part_stride = kv_scale->stride(3);
  }
  return bank;
}

// Rows of a gradient: [batch, heads, rows, head_dim], any strides with a contiguous last dimension.
inline void check_gradient(const Tensor& t, const Tensor& like, int64_t batch, int64_t rows,
                           const CheckDevice& check_device, const char* op, const char* argument) {
  check_device(t, op, argument);
  check_shape(t, {batch, like.size(1), rows, like.size(3)}, op, argument);
  check_dtype(t, like.scalar_type(), op, argument);
  check_last_dim_contiguous(t, op, argument);
}

inline CompressPackBwdParams compress_pack_bwd_params(
    const OptionalTensor& grad, const OptionalTensor& mem_grad, const OptionalTensor& cos,
    const OptionalTensor& sin, int64_t batch, int64_t ratio, const OptionalTensor& positions,
    int64_t pos0, bool memory_only, const CheckDevice& check_device, const char* op) {
  check_range(batch, 1, INT32_MAX, op, "batch");
  check_range(ratio, 1, INT32_MAX, op, "ratio");
  check(grad.has_value() || mem_grad.has_value(), op, "grad", "a tensor, or one as mem_grad",
        "None");
  check(cos.has_value() == sin.has_value(), op, "sin", "a tensor where cos is one", "None");
  const Tensor& like = grad.has_value() ? *grad : *mem_grad;
  check_shape(like, {batch, -1, -1, -1}, op, grad.has_value() ? "grad" : "mem_grad");
  check_head_dim(like.size(3), op, grad.has_value() ? "grad" : "mem_grad");
  const bool whole = grad.has_value() && !memory_only;
  const int64_t memory = whole ? like.size(2) / (ratio + 1) : like.size(2);
  const int64_t rows = memory * (ratio + 1);

  CompressPackBwdParams p{};
  p.dtype = io_dtype(like, op, grad.has_value() ? "grad" : "mem_grad");
  p.num_heads = like.size(1);
  p.head_dim = like.size(3);
  p.memory_only = memory_only;
  p.order.batch = batch, p.order.ratio = ratio;
  p.order.memory = memory, p.order.window = rows - memory, p.order.half = p.head_dim / 2;
  if (cos.has_value()) set_positions(&p.order, *cos, *sin, positions, pos0, check_device, op);
  if (grad.has_value()) {
    check_gradient(*grad, like, batch, memory_only ? memory : rows, check_device, op, "grad");
    p.grad = grad->const_data_ptr();
    p.grad_batch_stride = grad->stride(0), p.grad_head_stride = grad->stride(1);
    p.grad_row_stride = grad->stride(2);
  }
  if (mem_grad.has_value()) {
    check_gradient(*mem_grad, like, batch, memory, check_device, op, "mem_grad");
    p.mem_grad = mem_grad->const_data_ptr();
    p.mem_batch_stride = mem_grad->stride(0), p.mem_head_stride = mem_grad->stride(1);
    p.mem_row_stride = mem_grad->stride(2);
  }
  return p;
}

}  // namespace lychee
