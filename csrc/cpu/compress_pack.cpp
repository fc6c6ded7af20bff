// SPDX-License-Identifier: Apache-2.0
// compress_pack, compress_pack_ and write_memory_ on CPU: checks, parameters, registration.
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

// Rows a thread takes at least: about 100 KiB of reads and writes at common head counts.
constexpr int64_t kRowsPerTask = 16;

void check_rows(const Tensor& t, int64_t rows, int64_t heads, int64_t dim, ScalarType dtype,
                const char* op, const char* argument) {
  check_cpu(t, op, argument);
  check_shape(t, {rows, heads, dim}, op, argument);
  check_dtype(t, dtype, op, argument);
  check_last_dim_contiguous(t, op, argument);
}

// Tables and positions: every row's position lies inside the tables.
void set_positions(CompressPackParams* p, const Tensor& cos, const Tensor& sin,
                   const OptionalTensor& positions, int64_t pos0, const char* op) {
  const int64_t rows = p->window + p->memory;
  check_shape(cos, {-1, p->head_dim / 2}, op, "cos");
  check_shape(sin, {cos.size(0), p->head_dim / 2}, op, "sin");
  for (const auto& [table, name] : {std::pair(cos, "cos"), std::pair(sin, "sin")}) {
    check_cpu(table, op, name);
    check_dtype(table, ScalarType::Float, op, name);
    check_contiguous(table, op, name);
  }
  p->cos = static_cast<const float*>(cos.const_data_ptr());
  p->sin = static_cast<const float*>(sin.const_data_ptr());
  p->pos0 = pos0;
  if (!positions.has_value()) {
    check_range(pos0, 0, cos.size(0) - rows, op, "pos0");
    return;
  }
  check_cpu(*positions, op, "positions");
  check_shape(*positions, {p->batch, rows}, op, "positions");
  check_dtype(*positions, ScalarType::Long, op, "positions");
  check_contiguous(*positions, op, "positions");
  p->positions = static_cast<const int64_t*>(positions->const_data_ptr());
  for (int64_t i = 0; i < p->batch * rows; ++i) {
    check_range(p->positions[i], 0, cos.size(0) - 1, op, "positions");
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
  p.batch = batch;
  p.ratio = ratio;
  p.memory = memory;
  p.window = rows - memory;
  p.dtype = io_dtype(k, op, "k");
  p.num_kv_heads = k.size(1);
  p.head_dim = k.size(2);
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
  check_shape(page_table, {p.batch, -1}, op, "page_table");
  check_shape(slot0, {p.batch}, op, "slot0");
  for (const auto& [t, name] : {std::pair(page_table, "page_table"), std::pair(slot0, "slot0")}) {
    check_cpu(t, op, name);
    check_dtype(t, ScalarType::Int, op, name);
    check_contiguous(t, op, name);
  }
  const bool* valid = nullptr;
  if (mem_valid.has_value()) {
    check_cpu(*mem_valid, op, "mem_valid");
    check_shape(*mem_valid, {p.batch, p.memory}, op, "mem_valid");
    check_dtype(*mem_valid, ScalarType::Bool, op, "mem_valid");
    check_contiguous(*mem_valid, op, "mem_valid");
    valid = static_cast<const bool*>(mem_valid->const_data_ptr());
  }
  const int32_t* pages = static_cast<const int32_t*>(page_table.const_data_ptr());
  const int32_t* first = static_cast<const int32_t*>(slot0.const_data_ptr());
  const int64_t max_pages = page_table.size(1), page_tokens = kv.size(4);
  std::vector<int64_t> slots(p.batch * p.memory, -1);
  for (int64_t b = 0; b < p.batch; ++b) {
    check_range(first[b], 0, INT32_MAX, op, "slot0");
    int64_t slot = first[b];
    for (int64_t j = 0; j < p.memory; ++j) {
      if (valid != nullptr && !valid[b * p.memory + j]) continue;
      check(slot / page_tokens < max_pages, op, "page_table",
            "at least " + std::to_string(slot / page_tokens + 1) + " pages per row",
            std::to_string(max_pages));
      const int64_t page = pages[b * max_pages + slot / page_tokens];
      check_range(page, 0, kv.size(0) - 1, op, "page_table");
      slots[b * p.memory + j] = page * page_tokens + slot % page_tokens;
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
  const int64_t rows = p->window + p->memory;
  Tensor q_rot = new_output(
      {p->batch, p->num_heads, p->memory_queries_only ? p->memory : rows, p->head_dim}, dtype);
  Tensor k_rot = new_output({p->batch, p->num_kv_heads, rows, p->head_dim}, dtype);
  Tensor v_out = new_output({p->batch, p->num_kv_heads, rows, p->head_dim}, dtype);
  p->q_rot = q_rot.mutable_data_ptr();
  p->k_rot = k_rot.mutable_data_ptr();
  p->v_out = v_out.mutable_data_ptr();
  return {q_rot, k_rot, v_out};
}

void run_rows(const CompressPackParams& p) {
  const auto kernel = LYCHEE_ISA_TABLE(CompressPackFn, compress_pack).pick();
  torch::stable::parallel_for(0, p.batch * (p.window + p.memory), kRowsPerTask,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compress_pack_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
    int64_t batch, int64_t ratio, const OptionalTensor& positions, int64_t pos0) {
  const char* op = "compress_pack";
  CompressPackParams p = make_params(q, k, v, batch, ratio, op);
  set_positions(&p, cos, sin, positions, pos0, op);
  auto [q_rot, k_rot, v_out] = make_outputs(&p, k.scalar_type());
  Tensor mem_k = new_output({batch, p.num_kv_heads, p.memory, p.head_dim}, k.scalar_type());
  Tensor mem_v = new_output({batch, p.num_kv_heads, p.memory, p.head_dim}, k.scalar_type());
  p.mem_k = mem_k.mutable_data_ptr();
  p.mem_v = mem_v.mutable_data_ptr();
  run_rows(p);
  return {q_rot, k_rot, v_out, mem_k, mem_v};
}

std::tuple<Tensor, Tensor, Tensor> compress_pack_write_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
    const Tensor& kv, const OptionalTensor& kv_scale, const Tensor& page_table, const Tensor& slot0,
    int64_t batch, int64_t ratio, int64_t layer, const OptionalTensor& mem_valid,
    const OptionalTensor& positions, int64_t pos0) {
  const char* op = "compress_pack_";
  CompressPackParams p = make_params(q, k, v, batch, ratio, op);
  set_positions(&p, cos, sin, positions, pos0, op);
  check_shape(kv, {-1, -1, p.num_kv_heads, 2, -1, p.head_dim}, op, "kv");
  const std::vector<int64_t> slots = assign_slots(p, kv, page_table, slot0, mem_valid, op);
  p.bank = make_bank(p, kv, kv_scale, layer, slots, op);
  auto outputs = make_outputs(&p, k.scalar_type());
  run_rows(p);
  return outputs;
}

void write_memory_cpu(const Tensor& k, const Tensor& v, const Tensor& kv,
                      const OptionalTensor& kv_scale, const Tensor& page_table, const Tensor& slot0,
                      int64_t batch, int64_t layer, const OptionalTensor& mem_valid) {
  const char* op = "write_memory_";
  check_range(batch, 1, INT32_MAX, op, "batch");
  check_shape(k, {-1, -1, -1}, op, "k");
  CompressPackParams p{};
  p.batch = batch;
  p.memory = k.size(0) / batch;
  p.num_kv_heads = k.size(1);
  p.head_dim = k.size(2);
  p.dtype = io_dtype(k, op, "k");
  check_head_dim(p.head_dim, op, "k");
  check_rows(k, batch * p.memory, p.num_kv_heads, p.head_dim, k.scalar_type(), op, "k");
  check_rows(v, batch * p.memory, p.num_kv_heads, p.head_dim, k.scalar_type(), op, "v");
  check_shape(kv, {-1, -1, p.num_kv_heads, 2, -1, p.head_dim}, op, "kv");
  const std::vector<int64_t> slots = assign_slots(p, kv, page_table, slot0, mem_valid, op);
  p.bank = make_bank(p, kv, kv_scale, layer, slots, op);
  p.k = k.const_data_ptr();
  p.v = v.const_data_ptr();
  p.k_row_stride = k.stride(0), p.k_head_stride = k.stride(1);
  p.v_row_stride = v.stride(0), p.v_head_stride = v.stride(1);
  const auto kernel = LYCHEE_ISA_TABLE(WriteMemoryFn, write_memory).pick();
  torch::stable::parallel_for(0, batch * p.memory, kRowsPerTask,
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace
}  // namespace lychee

STABLE_TORCH_LIBRARY_IMPL(lychee, CPU, m) {
  m.impl("compress_pack", TORCH_BOX(&lychee::compress_pack_cpu));
  m.impl("compress_pack_", TORCH_BOX(&lychee::compress_pack_write_cpu));
  m.impl("write_memory_", TORCH_BOX(&lychee::write_memory_cpu));
}
