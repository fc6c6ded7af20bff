// SPDX-License-Identifier: Apache-2.0
// gather_chunks, gather_chunks_ and gather_chunks_bwd on CUDA: parameters, launches, registration.
// The page table lies on the device, so its values are not checked here: tokens of a page outside
// of the bank, and keys at a position outside of the tables, become NaN.
#include <tuple>

#include "cuda/gather_chunks.cuh"
#include "cuda/gather_chunks_bwd.cuh"
#include "cuda/launch.h"
#include "gather_chunks_checks.h"

namespace lychee::cuda {
namespace {

// Of everything a kernel reads or writes in runs.
bool is_aligned(const lychee::GatherChunksParams& p) {
  Alignment alignment(fast_width(p.dtype), p.head_dim / 2);
  alignment
      .rows(p.kv, element_bytes(p.bank_dtype),
            {p.page_stride, p.layer_stride, p.head_stride, p.part_stride, p.token_stride})
      .rows(p.table.cos, sizeof(float), {p.head_dim / 2})
      .rows(p.table.sin, sizeof(float), {p.head_dim / 2});
  for (const TokenRows& rows : {p.k, p.v}) {
    alignment.rows(rows.data, element_bytes(p.dtype),
                   {rows.layer_stride, rows.batch_stride, rows.head_stride, rows.token_stride});
  }
  return alignment.holds();
}

bool is_aligned(const lychee::GatherChunksBwdParams& p) {
  return Alignment(fast_width(p.dtype), p.head_dim / 2)
      .rows(p.dk, element_bytes(p.dtype), {p.head_dim})
      .rows(p.dv, element_bytes(p.dtype), {p.head_dim})
      .rows(p.table.cos, sizeof(float), {p.head_dim / 2})
      .rows(p.table.sin, sizeof(float), {p.head_dim / 2})
      .holds();
}

template <class Rows>
GatherPlan make_plan(const Rows& rows, int64_t pages, int64_t heads, const Tensor& on,
                     const char* op) {
  const int width = is_aligned(rows) ? fast_width(rows.dtype) : 4;
  return plan_gather(pages, rows.page_tokens, heads, rows.head_dim / 2, width,
                     multiprocessors(on, op));
}

dim3 grid_of(const GatherPlan& plan) { return dim3{static_cast<unsigned>(plan.blocks), 1, 1}; }

Tensor gather(lychee::GatherChunksParams rows, const Tensor& k, const Tensor& v, const char* op) {
  for (const auto& [to, t] : {std::pair(&rows.k, k), std::pair(&rows.v, v)}) {
    *to = {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  }
  const PageTable& table = rows.table;
  Tensor valid =
      new_output_like(k, {table.batch, table.max_pages * rows.page_tokens}, ScalarType::Bool);
  const GatherPlan plan =
      make_plan(rows, table.batch * table.max_pages, rows.layers * rows.num_kv_heads, k, op);
  const GatherChunksParams params{rows, static_cast<bool*>(valid.mutable_data_ptr()), plan};
  dispatch_io_dtype(rows.dtype, [&]<class T>(T) {
    dispatch_bank_dtype(rows.bank_dtype, [&]<class Stored>(Stored) {
      (is_aligned(rows)
           ? launch<gather_chunks_kernel<T, Stored, true>, GatherChunksParams>
           : launch<gather_chunks_kernel<T, Stored, false>, GatherChunksParams>)(op, k,
                                                                                 grid_of(plan),
                                                                                 dim3{
                                                                                     kGatherThreads,
                                                                                     1, 1},
                                                                                 0, params);
    });
  });
  return valid;
}

std::tuple<Tensor, Tensor, Tensor> gather_chunks_cuda(
    const Tensor& kv, const OptionalTensor& kv_scale, const Tensor& page_table,
    const Tensor& page_len, const OptionalTensor& page_base, const Tensor& num_pages,
    const OptionalTensor& cos, const OptionalTensor& sin, int64_t first_layer, int64_t last_layer,
    int64_t rope_mode, ScalarType out_dtype) {
  const char* op = "gather_chunks";
  check_cuda(kv, op, "kv");
  const DeviceGuard guard(kv.get_device_index());
  lychee::GatherChunksParams p =
      gather_params(kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, first_layer,
                    last_layer, rope_mode, same_device_as(kv), op);
  p.dtype = io_dtype(out_dtype, op, "out_dtype");
  const std::vector<int64_t> sizes{p.layers, p.table.batch, p.num_kv_heads,
                                   p.table.max_pages * p.page_tokens, p.head_dim};
  Tensor k = new_output_like(kv, sizes, out_dtype), v = new_output_like(kv, sizes, out_dtype);
  Tensor valid = gather(p, k, v, op);
  return {k, v, valid};
}

Tensor gather_chunks_write_cuda(const Tensor& k, const Tensor& v, const Tensor& kv,
                                const OptionalTensor& kv_scale, const Tensor& page_table,
                                const Tensor& page_len, const OptionalTensor& page_base,
                                const Tensor& num_pages, const OptionalTensor& cos,
                                const OptionalTensor& sin, int64_t first_layer, int64_t last_layer,
                                int64_t rope_mode) {
  const char* op = "gather_chunks_";
  check_cuda(kv, op, "kv");
  const DeviceGuard guard(kv.get_device_index());
  lychee::GatherChunksParams p =
      gather_params(kv, kv_scale, page_table, page_len, page_base, num_pages, cos, sin, first_layer,
                    last_layer, rope_mode, same_device_as(kv), op);
  p.dtype = io_dtype(k, op, "k");
  check_room(p, k, v, same_device_as(kv), op);
  return gather(p, k, v, op);
}

Tensor gather_chunks_bwd_cuda(const Tensor& dk, const Tensor& dv, const Tensor& page_table,
                              const Tensor& page_len, const OptionalTensor& page_base,
                              const Tensor& num_pages, const OptionalTensor& cos,
                              const OptionalTensor& sin, int64_t bank_pages, int64_t bank_layers,
                              int64_t first_layer, int64_t page_tokens, int64_t rope_mode,
                              ScalarType bank_dtype) {
  const char* op = "gather_chunks_bwd";
  check_cuda(dk, op, "dk");
  const DeviceGuard guard(dk.get_device_index());
  lychee::GatherChunksBwdParams p = gather_bwd_params(
      dk, dv, page_table, page_len, page_base, num_pages, cos, sin, bank_pages, bank_layers,
      first_layer, page_tokens, rope_mode, bank_dtype, same_device_as(dk), op);
  Tensor dkv = new_output_like(
      dk, {bank_pages, bank_layers, p.num_kv_heads, 2, page_tokens, p.head_dim}, bank_dtype);
  p.dkv = dkv.mutable_data_ptr();
  GatherPlan plan = make_plan(p, bank_pages, bank_layers * p.num_kv_heads, dk, op);
  if (bank_layers * p.num_kv_heads == 0) plan.blocks = 0;
  const GatherChunksBwdParams params{p, plan};
  dispatch_io_dtype(p.dtype, [&]<class T>(T) {
    dispatch_io_dtype(p.bank_dtype, [&]<class Stored>(Stored) {
      (is_aligned(p) ? launch<gather_chunks_bwd_kernel<T, Stored, true>, GatherChunksBwdParams>
                     : launch<gather_chunks_bwd_kernel<T, Stored, false>,
                              GatherChunksBwdParams>)(op, dk, grid_of(plan),
                                                      dim3{kGatherThreads, 1, 1},
                                                      sizeof(ReaderList), params);
    });
  });
  return dkv;
}

LYCHEE_CUDA_KERNELS(m) {
  m.impl("gather_chunks", TORCH_BOX(&gather_chunks_cuda));
  m.impl("gather_chunks_", TORCH_BOX(&gather_chunks_write_cuda));
  m.impl("gather_chunks_bwd", TORCH_BOX(&gather_chunks_bwd_cuda));
}

}  // namespace
}  // namespace lychee::cuda
