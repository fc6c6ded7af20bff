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

int64_t element_bytes(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : is_quantised(dtype) ? 1 : 2;
}

int fast_width(Dtype dtype) { return 16 / element_bytes(dtype); }

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

// Calls run(T{}, true or false, plan) for the type and the width that the rows allow.
template <class Rows, class Run>
void launch_rows(const Rows& rows, int64_t count, int64_t heads, Device device, const char* op,
                 const Run& run) {
  const DeviceGuard guard(device, op);
  const bool fast = is_aligned(rows);
  const PackPlan plan = plan_pack(count, heads, rows.head_dim / 2,
                                  fast ? fast_width(rows.dtype) : 4, multiprocessors(device, op));
  if (plan.blocks * plan.splits == 0) return;
  const dim3 grid(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.splits));
  const cudaStream_t stream = current_stream(device, op);
  dispatch_io_dtype(rows.dtype, [&](auto tag) {
    if (fast) {
      run(tag, std::true_type{}, plan, grid, stream);
    } else {
      run(tag, std::false_type{}, plan, grid, stream);
    }
  });
  check_launch(op);
}

void launch_pack(const lychee::CompressPackParams& rows, const SlotTable& slots, Device device,
                 const char* op) {
  const int64_t count = rows.order.batch * (rows.order.window + rows.order.memory);
  launch_rows(rows, count, rows.num_heads + 2 * rows.num_kv_heads, device, op,
              [&](auto tag, auto fast, const PackPlan& plan, dim3 grid, cudaStream_t stream) {
                compress_pack_kernel<decltype(tag), fast.value>
                    <<<grid, kPackThreads, 0, stream>>>({rows, slots, plan});
              });
}

// Allocates q_rot, k_rot and v_out and points the parameters at them.
std::tuple<Tensor, Tensor, Tensor> make_outputs(lychee::CompressPackParams* p, ScalarType dtype,
                                                Device device, const char* op) {
  const RowOrder& order = p->order;
  const int64_t rows = order.window + order.memory;
  const int64_t query_rows = p->memory_queries_only ? order.memory : rows;
  Tensor q_rot =
      new_output(device, op, {order.batch, p->num_heads, query_rows, p->head_dim}, dtype);
  Tensor k_rot = new_output(device, op, {order.batch, p->num_kv_heads, rows, p->head_dim}, dtype);
  Tensor v_out = new_output(device, op, {order.batch, p->num_kv_heads, rows, p->head_dim}, dtype);
  p->q_rot = q_rot.mutable_data_ptr();
  p->k_rot = k_rot.mutable_data_ptr();
  p->v_out = v_out.mutable_data_ptr();
  return {q_rot, k_rot, v_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> compress_pack_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
    int64_t batch, int64_t ratio, const OptionalTensor& positions, int64_t pos0) {
  const char* op = "compress_pack";
  const Device device = cuda_device_of(k, op, "k");
  lychee::CompressPackParams p = pack_params(q, k, v, batch, ratio, device, op);
  set_positions(&p.order, cos, sin, positions, pos0, device, op);
  auto [q_rot, k_rot, v_out] = make_outputs(&p, k.scalar_type(), device, op);
  const std::vector<int64_t> sizes = {batch, p.num_kv_heads, p.order.memory, p.head_dim};
  Tensor mem_k = new_output(device, op, sizes, k.scalar_type());
  Tensor mem_v = new_output(device, op, sizes, k.scalar_type());
  p.mem_k = mem_k.mutable_data_ptr();
  p.mem_v = mem_v.mutable_data_ptr();
  launch_pack(p, SlotTable{}, device, op);
  return {q_rot, k_rot, v_out, mem_k, mem_v};
}

std::tuple<Tensor, Tensor, Tensor> compress_pack_write_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos, const Tensor& sin,
    const Tensor& kv, const OptionalTensor& kv_scale, const Tensor& page_table, const Tensor& slot0,
    int64_t batch, int64_t ratio, int64_t layer, const OptionalTensor& mem_valid,
    const OptionalTensor& positions, int64_t pos0) {
  const char* op = "compress_pack_";
  const Device device = cuda_device_of(k, op, "k");
  lychee::CompressPackParams p = pack_params(q, k, v, batch, ratio, device, op);
  set_positions(&p.order, cos, sin, positions, pos0, device, op);
  check_shape(kv, {-1, -1, p.num_kv_heads, 2, -1, p.head_dim}, op, "kv");
  const SlotTable slots = slot_table(p, kv, page_table, slot0, mem_valid, device, op);
  p.bank = make_bank(p, kv, kv_scale, layer, device, op);
  auto outputs = make_outputs(&p, k.scalar_type(), device, op);
  launch_pack(p, slots, device, op);
  return outputs;
}

void write_memory_cuda(const Tensor& k, const Tensor& v, const Tensor& kv,
                       const OptionalTensor& kv_scale, const Tensor& page_table,
                       const Tensor& slot0, int64_t batch, int64_t layer,
                       const OptionalTensor& mem_valid) {
  const char* op = "write_memory_";
  const Device device = cuda_device_of(k, op, "k");
  lychee::CompressPackParams p = write_params(k, v, batch, device, op);
  check_shape(kv, {-1, -1, p.num_kv_heads, 2, -1, p.head_dim}, op, "kv");
  const SlotTable slots = slot_table(p, kv, page_table, slot0, mem_valid, device, op);
  p.bank = make_bank(p, kv, kv_scale, layer, device, op);
  launch_rows(p, batch * p.order.memory, 2 * p.num_kv_heads, device, op,
              [&](auto tag, auto fast, const PackPlan& plan, dim3 grid, cudaStream_t stream) {
                write_memory_kernel<decltype(tag), fast.value>
                    <<<grid, kPackThreads, 0, stream>>>({p, slots, plan});
              });
}

Tensor compress_pack_bwd_cuda(const OptionalTensor& grad, const OptionalTensor& mem_grad,
                              const OptionalTensor& cos, const OptionalTensor& sin, int64_t batch,
                              int64_t ratio, const OptionalTensor& positions, int64_t pos0,
                              bool memory_only) {
  const char* op = "compress_pack_bwd";
  check(grad.has_value() || mem_grad.has_value(), op, "grad", "a tensor, or one as mem_grad",
        "None");
  const Tensor& like = grad.has_value() ? *grad : *mem_grad;
  const Device device = cuda_device_of(like, op, grad.has_value() ? "grad" : "mem_grad");
  lychee::CompressPackBwdParams p = compress_pack_bwd_params(
      grad, mem_grad, cos, sin, batch, ratio, positions, pos0, memory_only, device, op);
  const int64_t rows = batch * (memory_only ? p.order.memory : p.order.window + p.order.memory);
  Tensor out = new_output(device, op, {rows, p.num_heads, p.head_dim}, like.scalar_type());
  p.out = out.mutable_data_ptr();
  launch_rows(p, rows, p.num_heads, device, op,
              [&](auto tag, auto fast, const PackPlan& plan, dim3 grid, cudaStream_t stream) {
                compress_pack_bwd_kernel<decltype(tag), fast.value>
                    <<<grid, kPackThreads, 0, stream>>>({p, plan});
              });
  return out;
}

}  // namespace
}  // namespace lychee::cuda

STABLE_TORCH_LIBRARY_IMPL(lychee, CUDA, m) {
  m.impl("compress_pack", TORCH_BOX(&lychee::cuda::compress_pack_cuda));
  m.impl("compress_pack_bwd", TORCH_BOX(&lychee::cuda::compress_pack_bwd_cuda));
  m.impl("compress_pack_", TORCH_BOX(&lychee::cuda::compress_pack_write_cuda));
  m.impl("write_memory_", TORCH_BOX(&lychee::cuda::write_memory_cuda));
}
