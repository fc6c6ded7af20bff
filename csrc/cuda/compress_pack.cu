// SPDX-License-Identifier: Apache-2.0
// compress_pack, its backward, compress_pack_ and write_memory_ on CUDA: parameters, launches,
// registration. Positions and slots lie on the device, so their values are not checked here: a
// position outside of the tables gives NaN, a slot outside of the bank is not written.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "compress_pack_checks.h"
#include "cuda/compress_pack.cuh"
#include "cuda/compress_pack_bwd.cuh"
#include "cuda/launch.h"

namespace lychee::cuda {
namespace {

// Of everything a kernel reads or writes in runs; outputs are fresh and aligned.
bool is_aligned(const lychee::CompressPackParams& p) {
  const int64_t bytes = element_bytes(p.dtype), half = p.head_dim / 2;
  const BankWriter& bank = p.bank;
  return Alignment(fast_width(p.dtype), half)
      .rows(p.q, bytes, {p.q_row_stride, p.q_head_stride})
      .rows(p.k, bytes, {p.k_row_stride, p.k_head_stride})
      .rows(p.v, bytes, {p.v_row_stride, p.v_head_stride})
      .rows(p.order.cos, sizeof(float), {half})
      .rows(p.order.sin, sizeof(float), {half})
      .rows(bank.data, element_bytes(bank.dtype),
            {bank.page_stride, bank.head_stride, bank.part_stride, bank.token_stride})
      .holds();
}

bool is_aligned(const lychee::CompressPackBwdParams& p) {
  const int64_t bytes = element_bytes(p.dtype), half = p.head_dim / 2;
  return Alignment(fast_width(p.dtype), half)
      .rows(p.grad, bytes, {p.grad_batch_stride, p.grad_head_stride, p.grad_row_stride})
      .rows(p.mem_grad, bytes, {p.mem_batch_stride, p.mem_head_stride, p.mem_row_stride})
      .rows(p.order.cos, sizeof(float), {half})
      .rows(p.order.sin, sizeof(float), {half})
      .holds();
}

// The parameters of a launch for rows of `heads` heads, and its grid.
template <class Rows>
PackPlan make_plan(const Rows& rows, int64_t count, int64_t heads, const Tensor& on,
                   const char* op) {
  const int width = is_aligned(rows) ? fast_width(rows.dtype) : 4;
  return plan_pack(count, heads, rows.head_dim / 2, width, multiprocessors(on, op));
}

dim3 grid_of(const PackPlan& plan) {
  return dim3{static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.splits), 1};
}

void launch_pack(const lychee::CompressPackParams& rows, const SlotTable& slots, const Tensor& on,
                 const char* op) {
  const int64_t count = rows.order.batch * (rows.order.window + rows.order.memory);
  const PackPlan plan = make_plan(rows, count, rows.num_heads + 2 * rows.num_kv_heads, on, op);
  const CompressPackParams params{rows, slots, plan};
  const auto run = [&]<class T>(T) {
    (is_aligned(rows)
         ? launch<compress_pack_kernel<T, true>, CompressPackParams>
         : launch<compress_pack_kernel<T, false>, CompressPackParams>)(op, on, grid_of(plan),
                                                                       dim3{kPackThreads, 1, 1}, 0,
                                                                       params);
  };
  dispatch_io_dtype(rows.dtype, run);
}

// Allocates q_rot, k_rot and v_out and points the parameters at them.
std::tuple<Tensor, Tensor, Tensor> make_outputs(lychee::CompressPackParams* p, const Tensor& k) {
  const RowOrder& order = p->order;
  const int64_t rows = order.window + order.memory;
  const int64_t query_rows = p->memory_queries_only ? order.memory : rows;
  Tensor q_rot =
      new_output_like(k, {order.batch, p->num_heads, query_rows, p->head_dim}, k.scalar_type());
  Tensor k_rot =
      new_output_like(k, {order.batch, p->num_kv_heads, rows, p->head_dim}, k.scalar_type());
  Tensor v_out =
      new_output_like(k, {order.batch, p->num_kv_heads, rows, p->head_dim}, k.scalar_type());
  p->q_rot = q_rot.mutable_data_ptr();
  p->k_rot = k_rot.mutable_data_ptr();
  p->v_out = v_out.mutable_data_ptr();
  return {q_rot, k_rot, v_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compress_pack_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
    int64_t batch, int64_t ratio, const OptionalTensor& positions, int64_t pos0) {
  const char* op = "compress_pack";
  check_cuda(k, op, "k");
  const DeviceGuard guard(k.get_device_index());
  const CheckDevice on_device = same_device_as(k);
  lychee::CompressPackParams p = pack_params(q, k, v, batch, ratio, on_device, op);
  set_positions(&p.order, cos, sin, positions, pos0, on_device, op);
  auto [q_rot, k_rot, v_out] = make_outputs(&p, k);
  const std::vector<int64_t> sizes = {batch, p.num_kv_heads, p.order.memory, p.head_dim};
  Tensor mem_k = new_output_like(k, sizes, k.scalar_type());
  Tensor mem_v = new_output_like(k, sizes, k.scalar_type());
  p.mem_k = mem_k.mutable_data_ptr();
  p.mem_v = mem_v.mutable_data_ptr();
  launch_pack(p, SlotTable{}, k, op);
  return {q_rot, k_rot, v_out, mem_k, mem_v};
}

std::tuple<Tensor, Tensor, Tensor> compress_pack_write_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
    const Tensor& kv, const OptionalTensor& kv_scale, const Tensor& page_table, const Tensor& slot0,
    int64_t batch, int64_t ratio, int64_t layer, const OptionalTensor& mem_valid,
    const OptionalTensor& positions, int64_t pos0) {
  const char* op = "compress_pack_";
  check_cuda(k, op, "k");
  const DeviceGuard guard(k.get_device_index());
  const CheckDevice on_device = same_device_as(k);
  lychee::CompressPackParams p = pack_params(q, k, v, batch, ratio, on_device, op);
  set_positions(&p.order, cos, sin, positions, pos0, on_device, op);
  check_shape(kv, {-1, -1, p.num_kv_heads, 2, -1, p.head_dim}, op, "kv");
  const SlotTable slots = slot_table(p, kv, page_table, slot0, mem_valid, on_device, op);
  p.bank = make_bank(p, kv, kv_scale, layer, on_device, op);
  auto outputs = make_outputs(&p, k);
  launch_pack(p, slots, k, op);
  return outputs;
}

void write_memory_cuda(const Tensor& k, const Tensor& v, const Tensor& kv,
                       const OptionalTensor& kv_scale, const Tensor& page_table,
                       const Tensor& slot0, int64_t batch, int64_t layer,
                       const OptionalTensor& mem_valid) {
  const char* op = "write_memory_";
  check_cuda(k, op, "k");
  const DeviceGuard guard(k.get_device_index());
  const CheckDevice on_device = same_device_as(k);
  lychee::CompressPackParams p = write_params(k, v, batch, on_device, op);
  check_shape(kv, {-1, -1, p.num_kv_heads, 2, -1, p.head_dim}, op, "kv");
  const SlotTable slots = slot_table(p, kv, page_table, slot0, mem_valid, on_device, op);
  p.bank = make_bank(p, kv, kv_scale, layer, on_device, op);
  const PackPlan plan = make_plan(p, batch * p.order.memory, 2 * p.num_kv_heads, k, op);
  const CompressPackParams params{p, slots, plan};
  const auto run = [&]<class T>(T) {
    (is_aligned(p)
         ? launch<write_memory_kernel<T, true>, CompressPackParams>
         : launch<write_memory_kernel<T, false>, CompressPackParams>)(op, k, grid_of(plan),
                                                                      dim3{kPackThreads, 1, 1}, 0,
                                                                      params);
  };
  dispatch_io_dtype(p.dtype, run);
}

Tensor compress_pack_bwd_cuda(const OptionalTensor& grad, const OptionalTensor& mem_grad,
                              const OptionalTensor& cos, const OptionalTensor& sin, int64_t batch,
                              int64_t ratio, const OptionalTensor& positions, int64_t pos0,
                              bool memory_only) {
  const char* op = "compress_pack_bwd";
  check(grad.has_value() || mem_grad.has_value(), op, "grad", "a tensor, or one as mem_grad",
        "None");
  const Tensor& like = grad.has_value() ? *grad : *mem_grad;
  check_cuda(like, op, grad.has_value() ? "grad" : "mem_grad");
  const DeviceGuard guard(like.get_device_index());
  lychee::CompressPackBwdParams p =
      compress_pack_bwd_params(grad, mem_grad, cos, sin, batch, ratio, positions, pos0, memory_only,
                               same_device_as(like), op);
  const int64_t rows = batch * (memory_only ? p.order.memory : p.order.window + p.order.memory);
  Tensor out = new_output_like(like, {rows, p.num_heads, p.head_dim}, like.scalar_type());
  p.out = out.mutable_data_ptr();
  const PackPlan plan = make_plan(p, rows, p.num_heads, like, op);
  const CompressPackBwdParams params{p, plan};
  const auto run = [&]<class T>(T) {
    (is_aligned(p)
         ? launch<compress_pack_bwd_kernel<T, true>, CompressPackBwdParams>
         : launch<compress_pack_bwd_kernel<T, false>, CompressPackBwdParams>)(op, like,
                                                                              grid_of(plan),
                                                                              dim3{kPackThreads, 1,
                                                                                   1},
                                                                              0, params);
  };
  dispatch_io_dtype(p.dtype, run);
  return out;
}

LYCHEE_CUDA_KERNELS(m) {
  m.impl("compress_pack", TORCH_BOX(&compress_pack_cuda));
  m.impl("compress_pack_bwd", TORCH_BOX(&compress_pack_bwd_cuda));
  m.impl("compress_pack_", TORCH_BOX(&compress_pack_write_cuda));
  m.impl("write_memory_", TORCH_BOX(&write_memory_cuda));
}

}  // namespace
}  // namespace lychee::cuda
