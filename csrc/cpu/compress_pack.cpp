// SPDX-License-Identifier: Apache-2.0
// compress_pack, its backward, compress_pack_ and write_memory_ on CPU: checks, parameters,
// registration.
#include "cpu/compress_pack.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "check.h"
#include "cpu/isa.h"
#include "stable.h"

namespace lychee {
namespace {

using OptionalTensor = std::optional<Tensor>;

// What a thread writes at least: far longer than waking it takes.
constexpr int64_t kTaskBytes = 64 << 10;
// Outputs from here on are stored past the cache, where they would displace their own inputs. At
// 2560 rows of 28 heads of 128 that takes 4.3 ms instead of 7.4 in float32 (one thread, AVX-512).
constexpr int64_t kStreamBytes = 16 << 20;

int64_t rows_per_task(int64_t row_bytes) { return kTaskBytes / (row_bytes + 1) + 1; }

Tensor new_rows(const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor output = new_output(sizes, dtype);
  prefer_huge_pages(output);
  return output;
}

bool worth_streaming(const Tensor& output) {
  const int64_t row_bytes = output.size(output.dim() - 1) * output.element_size();
  return output.numel() * static_cast<int64_t>(output.element_size()) >= kStreamBytes &&
         row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(output.const_data_ptr()) % 64 == 0;
}

void check_rows(const Tensor& t, int64_t rows, int64_t heads, int64_t dim, ScalarType dtype,
                const char* op, const char* argument) {
  check_cpu(t, op, argument);
  check_shape(t, {rows, heads, dim}, op, argument);
  check_dtype(t, dtype, op, argument);
  check_last_dim_contiguous(t, op, argument);
}

// Tables and positions: every row's position lies inside the tables.
void set_positions(RowOrder* order, const Tensor& cos, const Tensor& sin,
                   const OptionalTensor& positions, int64_t pos0, const char* op) {
  const int64_t rows = order->window + order->memory;
  check_shape(cos, {-1, order->half}, op, "cos");
  check_shape(sin, {cos.size(0), order->half}, op, "sin");
  for (const auto& [table, name] : {std::pair(cos, "cos"), std::pair(sin, "sin")}) {
    check_cpu(table, op, name);
    check_dtype(table, ScalarType::Float, op, name);
    check_contiguous(table, op, name);
  }
  order->cos = static_cast<const float*>(cos.const_data_ptr());
  order->sin = static_cast<const float*>(sin.const_data_ptr());
  order->pos0 = pos0;
  if (!positions.has_value()) {
    check_range(pos0, 0, cos.size(0) - rows, op, "pos0");
    return;
  }
  check_cpu(*positions, op, "positions");
  check_shape(*positions, {order->batch, rows}, op, "positions");
  check_dtype(*positions, ScalarType::Long, op, "positions");
  check_contiguous(*positions, op, "positions");
  order->positions = static_cast<const int64_t*>(positions->const_data_ptr());
  for (int64_t i = 0; i < order->batch * rows; ++i) {
    check_range(order->positions[i], 0, cos.size(0) - 1, op, "positions");
  }
}

CompressPackParams make_params(const Tensor& q, const Tensor& k, const Tensor& v, int64_t batch,
                               int64_t ratio, const char* op) {
  check_range(batch, 1, INT32_MAX, op, "batch");
  check_range(ratio, 1, INT32_MAX, op, "ratio");
  check_cpu(k, op, "k");
  check_shape(k, {-1, -1, -1}, op, "k");
  const int64_t rows = k.size(0) / batch, memory = rows / (ratio + 1);
  check(k.size(0) % batch == 0 && rows % (ratio + 1) == 0, op, "k",
        "batch * (window + window / ratio) rows", std::to_string(k.size(0)));

  CompressPackParams p{};
  p.dtype = io_dtype(k, op, "k");
  p.num_kv_heads = k.size(1);
  p.head_dim = k.size(2);
  p.order.batch = batch;
  p.order.ratio = ratio;
  p.order.memory = memory;
  p.order.window = rows - memory;
  p.order.half = p.head_dim / 2;
  check_head_dim(p.head_dim, op, "k");
  check_rows(k, k.size(0), p.num_kv_heads, p.head_dim, k.scalar_type(), op, "k");
  check_rows(v, k.size(0), p.num_kv_heads, p.head_dim, k.scalar_type(), op, "v");
  check_rows(q, -1, -1, p.head_dim, k.scalar_type(), op, "q");
  p.num_heads = q.size(1);
  p.memory_queries_only = q.size(0) != k.size(0);
  check(!p.memory_queries_only || q.size(0) == batch * memory, op, "q",
        std::to_string(k.size(0)) + " rows (all) or " + std::to_string(batch * memory) +
            " rows (memory only)",
        std::to_string(q.size(0)));
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.q_row_stride = q.stride(0), p.q_head_stride = q.stride(1);
  p.k_row_stride = k.stride(0), p.k_head_stride = k.stride(1);
  p.v_row_stride = v.stride(0), p.v_head_stride = v.stride(1);
  return p;
}

// Where the valid memory rows of each batch entry go: densely, from slot0 on, along its pages.
std::vector<int64_t> assign_slots(const CompressPackParams& p, const Tensor& kv,
                                  const Tensor& page_table, const Tensor& slot0,
                                  const OptionalTensor& mem_valid, const char* op) {
  check_shape(page_table, {p.order.batch, -1}, op, "page_table");
  check_shape(slot0, {p.order.batch}, op, "slot0");
  for (const auto& [t, name] : {std::pair(page_table, "page_table"), std::pair(slot0, "slot0")}) {
    check_cpu(t, op, name);
    check_dtype(t, ScalarType::Int, op, name);
    check_contiguous(t, op, name);
  }
  const bool* valid = nullptr;
  if (mem_valid.has_value()) {
    check_cpu(*mem_valid, op, "mem_valid");
    check_shape(*mem_valid, {p.order.batch, p.order.memory}, op, "mem_valid");
    check_dtype(*mem_valid, ScalarType::Bool, op, "mem_valid");
    check_contiguous(*mem_valid, op, "mem_valid");
    valid = static_cast<const bool*>(mem_valid->const_data_ptr());
  }
  check(kv.size(4) > 0, op, "kv", "at least one token per page", shape_string(kv));
  const int32_t* pages = static_cast<const int32_t*>(page_table.const_data_ptr());
  const int32_t* first = static_cast<const int32_t*>(slot0.const_data_ptr());
  const int64_t max_pages = page_table.size(1), page_tokens = kv.size(4);
  std::vector<int64_t> slots(p.order.batch * p.order.memory, -1);
  for (int64_t b = 0; b < p.order.batch; ++b) {
    check_range(first[b], 0, INT32_MAX, op, "slot0");
    int64_t slot = first[b];
    for (int64_t j = 0; j < p.order.memory; ++j) {
      if (valid != nullptr && !valid[b * p.order.memory + j]) continue;
      check(slot / page_tokens < max_pages, op, "page_table",
            "at least " + std::to_string(slot / page_tokens + 1) + " pages per row",
            std::to_string(max_pages));
      const int64_t page = pages[b * max_pages + slot / page_tokens];
      check_range(page, 0, kv.size(0) - 1, op, "page_table");
      slots[b * p.order.memory + j] = page * page_tokens + slot % page_tokens;
      ++slot;
    }
  }
  return slots;
}

BankWriter make_bank(const CompressPackParams& p, const Tensor& kv, const OptionalTensor& kv_scale,
                     int64_t layer, const std::vector<int64_t>& slots, const char* op) {
  check_cpu(kv, op, "kv");
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
  bank.slots = slots.data();
  check(is_quantised(bank.dtype) == kv_scale.has_value(), op, "kv_scale",
        is_quantised(bank.dtype) ? "a tensor with this bank dtype" : "None with this bank dtype",
        kv_scale.has_value() ? "a tensor" : "None");
  if (kv_scale.has_value()) {
    check_cpu(*kv_scale, op, "kv_scale");
    check_shape(*kv_scale, {kv.size(0), kv.size(1), p.num_kv_heads, 2, kv.size(4)}, op, "kv_scale");
    check_dtype(*kv_scale, ScalarType::Float, op, "kv_scale");
    check_last_dim_contiguous(*kv_scale, op, "kv_scale");
    bank.scale = static_cast<float*>(kv_scale->mutable_data_ptr()) + layer * kv_scale->stride(1);
    bank.scale_page_stride = kv_scale->stride(0), bank.scale_head_stride = kv_scale->stride(2);
    bank.scale_part_stride = kv_scale->stride(3);
  }
  return bank;
}

// Allocates q_rot, k_rot and v_out and points the parameters at them.
std::tuple<Tensor, Tensor, Tensor> make_outputs(CompressPackParams* p, ScalarType dtype) {
  const RowOrder& order = p->order;
  const int64_t rows = order.window + order.memory;
  const int64_t query_rows = p->memory_queries_only ? order.memory : rows;
  Tensor q_rot = new_rows({order.batch, p->num_heads, query_rows, p->head_dim}, dtype);
  Tensor k_rot = new_rows({order.batch, p->num_kv_heads, rows, p->head_dim}, dtype);
  Tensor v_out = new_rows({order.batch, p->num_kv_heads, rows, p->head_dim}, dtype);
  p->q_rot = q_rot.mutable_data_ptr();
  p->k_rot = k_rot.mutable_data_ptr();
  p->v_out = v_out.mutable_data_ptr();
  p->stream_q = worth_streaming(q_rot);
  p->stream_kv = worth_streaming(k_rot) && worth_streaming(v_out);
  return {q_rot, k_rot, v_out};
}

void run_rows(const CompressPackParams& p, int64_t element_size) {
  const auto kernel = LYCHEE_ISA_TABLE(CompressPackFn, compress_pack).pick();
  const int64_t row_bytes = (p.num_heads + 2 * p.num_kv_heads) * p.head_dim * element_size;
  torch::stable::parallel_for(0, p.order.batch * (p.order.window + p.order.memory),
                              rows_per_task(row_bytes),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compress_pack_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
    int64_t batch, int64_t ratio, const OptionalTensor& positions, int64_t pos0) {
  const char* op = "compress_pack";
  CompressPackParams p = make_params(q, k, v, batch, ratio, op);
  set_positions(&p.order, cos, sin, positions, pos0, op);
  auto [q_rot, k_rot, v_out] = make_outputs(&p, k.scalar_type());
  const std::vector<int64_t> sizes = {batch, p.num_kv_heads, p.order.memory, p.head_dim};
  Tensor mem_k = new_rows(sizes, k.scalar_type());
  Tensor mem_v = new_rows(sizes, k.scalar_type());
  p.mem_k = mem_k.mutable_data_ptr();
  p.mem_v = mem_v.mutable_data_ptr();
  run_rows(p, k.element_size());
  return {q_rot, k_rot, v_out, mem_k, mem_v};
}

std::tuple<Tensor, Tensor, Tensor> compress_pack_write_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
    const Tensor& kv, const OptionalTensor& kv_scale, const Tensor& page_table, const Tensor& slot0,
    int64_t batch, int64_t ratio, int64_t layer, const OptionalTensor& mem_valid,
    const OptionalTensor& positions, int64_t pos0) {
  const char* op = "compress_pack_";
  CompressPackParams p = make_params(q, k, v, batch, ratio, op);
  set_positions(&p.order, cos, sin, positions, pos0, op);
  check_shape(kv, {-1, -1, p.num_kv_heads, 2, -1, p.head_dim}, op, "kv");
  const std::vector<int64_t> slots = assign_slots(p, kv, page_table, slot0, mem_valid, op);
  p.bank = make_bank(p, kv, kv_scale, layer, slots, op);
  auto outputs = make_outputs(&p, k.scalar_type());
  run_rows(p, k.element_size());
  return outputs;
}

void write_memory_cpu(const Tensor& k, const Tensor& v, const Tensor& kv,
                      const OptionalTensor& kv_scale, const Tensor& page_table, const Tensor& slot0,
                      int64_t batch, int64_t layer, const OptionalTensor& mem_valid) {
  const char* op = "write_memory_";
  check_range(batch, 1, INT32_MAX, op, "batch");
  check_cpu(k, op, "k");
  check_shape(k, {-1, -1, -1}, op, "k");
  CompressPackParams p{};
  p.order.batch = batch;
  p.order.memory = k.size(0) / batch;
  p.num_kv_heads = k.size(1);
  p.head_dim = k.size(2);
  p.dtype = io_dtype(k, op, "k");
  check_head_dim(p.head_dim, op, "k");
  check_rows(k, batch * p.order.memory, p.num_kv_heads, p.head_dim, k.scalar_type(), op, "k");
  check_rows(v, batch * p.order.memory, p.num_kv_heads, p.head_dim, k.scalar_type(), op, "v");
  check_shape(kv, {-1, -1, p.num_kv_heads, 2, -1, p.head_dim}, op, "kv");
  const std::vector<int64_t> slots = assign_slots(p, kv, page_table, slot0, mem_valid, op);
  p.bank = make_bank(p, kv, kv_scale, layer, slots, op);
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.k_row_stride = k.stride(0), p.k_head_stride = k.stride(1);
  p.v_row_stride = v.stride(0), p.v_head_stride = v.stride(1);
  const auto kernel = LYCHEE_ISA_TABLE(WriteMemoryFn, write_memory).pick();
  const int64_t row_bytes = 2 * p.num_kv_heads * p.head_dim * k.element_size();
  torch::stable::parallel_for(0, batch * p.order.memory, rows_per_task(row_bytes),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

// Rows of a gradient: [batch, heads, rows, head_dim], any strides with a contiguous last dimension.
void check_gradient(const Tensor& t, const Tensor& like, int64_t batch, int64_t rows,
                    const char* op, const char* argument) {
  check_cpu(t, op, argument);
  check_shape(t, {batch, like.size(1), rows, like.size(3)}, op, argument);
  check_dtype(t, like.scalar_type(), op, argument);
  check_last_dim_contiguous(t, op, argument);
}

Tensor compress_pack_bwd_cpu(const OptionalTensor& grad, const OptionalTensor& mem_grad,
                             const OptionalTensor& cos, const OptionalTensor& sin, int64_t batch,
                             int64_t ratio, const OptionalTensor& positions, int64_t pos0,
                             bool memory_only) {
  const char* op = "compress_pack_bwd";
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
  if (cos.has_value()) set_positions(&p.order, *cos, *sin, positions, pos0, op);
  if (grad.has_value()) {
    check_gradient(*grad, like, batch, memory_only ? memory : rows, op, "grad");
    p.grad = grad->const_data_ptr();
    p.grad_batch_stride = grad->stride(0), p.grad_head_stride = grad->stride(1);
    p.grad_row_stride = grad->stride(2);
  }
  if (mem_grad.has_value()) {
    check_gradient(*mem_grad, like, batch, memory, op, "mem_grad");
    p.mem_grad = mem_grad->const_data_ptr();
    p.mem_batch_stride = mem_grad->stride(0), p.mem_head_stride = mem_grad->stride(1);
    p.mem_row_stride = mem_grad->stride(2);
  }
  Tensor out = new_rows({batch * (memory_only ? memory : rows), p.num_heads, p.head_dim},
                        like.scalar_type());
  p.out = out.mutable_data_ptr();
  p.stream = worth_streaming(out);
  const auto kernel = LYCHEE_ISA_TABLE(CompressPackBwdFn, compress_pack_bwd).pick();
  const int64_t row_bytes = p.num_heads * p.head_dim * static_cast<int64_t>(out.element_size());
  torch::stable::parallel_for(0, batch * rows, rows_per_task(row_bytes),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  return out;
}

}  // namespace
}  // namespace lychee

STABLE_TORCH_LIBRARY_IMPL(lychee, CPU, m) {
  m.impl("compress_pack", TORCH_BOX(&lychee::compress_pack_cpu));
  m.impl("compress_pack_bwd", TORCH_BOX(&lychee::compress_pack_bwd_cpu));
  m.impl("compress_pack_", TORCH_BOX(&lychee::compress_pack_write_cpu));
  m.impl("write_memory_", TORCH_BOX(&lychee::write_memory_cpu));
}
