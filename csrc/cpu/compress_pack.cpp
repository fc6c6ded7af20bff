// SPDX-License-Identifier: Apache-2.0
// compress_pack, its backward, compress_pack_ and write_memory_ on CPU: checks, parameters,
// registration.
#include "cpu/compress_pack.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "compress_pack_checks.h"
#include "cpu/isa.h"
#include "stable.h"

namespace lychee {
namespace {

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

void check_positions(const RowOrder& order, const char* op) {
  if (order.positions == nullptr) return;
  for (int64_t i = 0; i < order.batch * (order.window + order.memory); ++i) {
    check_range(order.positions[i], 0, order.table_rows - 1, op, "positions");
  }
}

// page * page_tokens + offset of each memory row, or -1 where it is not written.
std::vector<int64_t> assign_slots(const RowOrder& order, const SlotTable& table,
                                  int64_t page_tokens, const char* op) {
  std::vector<int64_t> slots(order.batch * order.memory, -1);
  for (int64_t b = 0; b < order.batch; ++b) {
    check_range(table.first[b], 0, INT32_MAX, op, "slot0");
    int64_t slot = table.first[b];
    for (int64_t j = 0; j < order.memory; ++j) {
      if (table.valid != nullptr && !table.valid[b * order.memory + j]) continue;
      check(slot / page_tokens < table.max_pages, op, "page_table",
            "at least " + std::to_string(slot / page_tokens + 1) + " pages per row",
            std::to_string(table.max_pages));
      const int64_t page = table.page[b * table.max_pages + slot / page_tokens];
      check_range(page, 0, table.bank_pages - 1, op, "page_table");
      slots[b * order.memory + j] = page * page_tokens + slot % page_tokens;
      ++slot;
    }
  }
  return slots;
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
  CompressPackParams p = pack_params(q, k, v, batch, ratio, check_cpu, op);
  set_positions(&p.order, cos, sin, positions, pos0, check_cpu, op);
  check_positions(p.order, op);
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
  CompressPackParams p = pack_params(q, k, v, batch, ratio, check_cpu, op);
  set_positions(&p.order, cos, sin, positions, pos0, check_cpu, op);
  check_positions(p.order, op);
  check_shape(kv, {-1, -1, p.num_kv_heads, 2, -1, p.head_dim}, op, "kv");
  const SlotTable table = slot_table(p, kv, page_table, slot0, mem_valid, check_cpu, op);
  const std::vector<int64_t> slots = assign_slots(p.order, table, kv.size(4), op);
  p.bank = make_bank(p, kv, kv_scale, layer, check_cpu, op);
  p.bank.slots = slots.data();
  auto outputs = make_outputs(&p, k.scalar_type());
  run_rows(p, k.element_size());
  return outputs;
}

void write_memory_cpu(const Tensor& k, const Tensor& v, const Tensor& kv,
                      const OptionalTensor& kv_scale, const Tensor& page_table, const Tensor& slot0,
                      int64_t batch, int64_t layer, const OptionalTensor& mem_valid) {
  const char* op = "write_memory_";
  CompressPackParams p = write_params(k, v, batch, check_cpu, op);
  check_shape(kv, {-1, -1, p.num_kv_heads, 2, -1, p.head_dim}, op, "kv");
  const SlotTable table = slot_table(p, kv, page_table, slot0, mem_valid, check_cpu, op);
  const std::vector<int64_t> slots = assign_slots(p.order, table, kv.size(4), op);
  p.bank = make_bank(p, kv, kv_scale, layer, check_cpu, op);
  p.bank.slots = slots.data();
  const auto kernel = LYCHEE_ISA_TABLE(WriteMemoryFn, write_memory).pick();
  const int64_t row_bytes = 2 * p.num_kv_heads * p.head_dim * k.element_size();
  torch::stable::parallel_for(0, batch * p.order.memory, rows_per_task(row_bytes),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

Tensor compress_pack_bwd_cpu(const OptionalTensor& grad, const OptionalTensor& mem_grad,
                             const OptionalTensor& cos, const OptionalTensor& sin, int64_t batch,
                             int64_t ratio, const OptionalTensor& positions, int64_t pos0,
                             bool memory_only) {
  const char* op = "compress_pack_bwd";
  CompressPackBwdParams p = compress_pack_bwd_params(grad, mem_grad, cos, sin, batch, ratio,
                                                     positions, pos0, memory_only, check_cpu, op);
  check_positions(p.order, op);
  const int64_t rows = p.order.window + p.order.memory;
  Tensor out = new_rows({batch * (memory_only ? p.order.memory : rows), p.num_heads, p.head_dim},
                        (grad.has_value() ? *grad : *mem_grad).scalar_type());
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
