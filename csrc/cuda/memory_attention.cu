// SPDX-License-Identifier: Apache-2.0
// memory_attention on CUDA: parameters, choice of kernel, launch, registration. Nothing here
// depends on values that lie on the device, so calls can be captured into a graph.
#include <tuple>

#include "cuda/launch.h"
#include "cuda/memory_attention_decode.cuh"
#include "cuda/memory_attention_prefill.cuh"
#include "cuda/memory_attention_simple.cuh"
#include "memory_attention_checks.h"

namespace lychee::cuda {
namespace {

constexpr const char* kOp = "memory_attention";

// Whether every row starts at a multiple of `bytes` bytes.
bool starts_aligned(const Tensor& t, int64_t bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % bytes == 0;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) {
    if (t.size(i) > 1) aligned = aligned && t.stride(i) * t.element_size() % bytes == 0;
  }
  return aligned;
}

// Whether the tensor-core kernels can read everything.
bool is_aligned(const MemoryAttentionInputs& in) {
  if (!starts_aligned(in.q, 4) || !starts_aligned(in.k, 16) || !starts_aligned(in.v, 16)) {
    return false;
  }
  if (!in.kv.has_value()) return true;
  if (in.kv_scale.has_value()) {
    // scales are copied four at a time
    if (!starts_aligned(*in.kv_scale, 16) || in.kv->size(4) % 4 != 0) return false;
  }
  if (in.rotated() && !(starts_aligned(*in.cos, 16) && starts_aligned(*in.sin, 16))) return false;
  return starts_aligned(*in.kv, 16);
}

void set_segment(MemoryAttentionParams* p, const MemoryAttentionInputs& in) {
  const Tensor &q = in.q, &k = in.k, &v = in.v;
  check_range(k.size(2), 0, INT32_MAX - kTileKeys, kOp, "k");
  check_range(q.size(2) * (q.size(1) / k.size(1)), 0, INT32_MAX - kPrefillRows, kOp, "q");
  p->dtype = p->bank_dtype = io_dtype(q, kOp, "q");
  p->num_queries = q.size(2), p->num_keys = k.size(2);
  p->num_heads = static_cast<int32_t>(q.size(1));
  p->num_kv_heads = static_cast<int32_t>(k.size(1));
  p->head_dim = static_cast<int32_t>(q.size(3));
  p->group = p->num_heads / p->num_kv_heads;
  p->q = q.const_data_ptr(), p->k = k.const_data_ptr(), p->v = v.const_data_ptr();
  p->q_batch_stride = q.stride(0), p->q_head_stride = q.stride(1), p->q_token_stride = q.stride(2);
  p->k_batch_stride = k.stride(0), p->k_head_stride = k.stride(1), p->k_token_stride = k.stride(2);
  p->v_batch_stride = v.stride(0), p->v_head_stride = v.stride(1), p->v_token_stride = v.stride(2);
  p->query_stride = in.query_stride;
  p->scale_log2 = static_cast<float>(in.softmax_scale * 1.44269504088896340736);
  if (!in.valid.has_value()) return;
  p->valid = static_cast<const bool*>(in.valid->const_data_ptr());
  p->valid_stride = in.valid->stride(0);
}

const int32_t* ints(const OptionalTensor& t) {
  return static_cast<const int32_t*>(t->const_data_ptr());
}

void set_bank(MemoryAttentionParams* p, const MemoryAttentionInputs& in) {
  const Tensor& kv = *in.kv;
  p->bank_dtype = bank_dtype(kv, kOp, "kv");
  p->kv = static_cast<const char*>(kv.const_data_ptr()) +
          in.layer * kv.stride(1) * static_cast<int64_t>(kv.element_size());
  p->page_stride = kv.stride(0), p->page_head_stride = kv.stride(2);
  p->page_part_stride = kv.stride(3), p->page_token_stride = kv.stride(4);
  check_range(kv.size(0), 0, INT32_MAX, kOp, "kv");
  const int64_t tiles = divide_up(kv.size(4), kTileKeys);
  check_range(in.page_table->size(1) * tiles, 0, INT32_MAX / kTileKeys, kOp, "page_table");
  p->bank_pages = static_cast<int32_t>(kv.size(0));
  p->page_tokens = static_cast<int32_t>(kv.size(4));
  p->tiles_per_page = static_cast<int32_t>(tiles);
  p->max_pages = static_cast<int32_t>(in.page_table->size(1));
  p->page_table = ints(in.page_table), p->page_len = ints(in.page_len);
  p->num_pages = ints(in.num_pages);
  if (in.rotated()) {
    p->page_base = ints(in.page_base);
    p->cos = static_cast<const float*>(in.cos->const_data_ptr());
    p->sin = static_cast<const float*>(in.sin->const_data_ptr());
    check_range(in.cos->size(0), 0, INT32_MAX, kOp, "cos");
    p->positions = static_cast<int32_t>(in.cos->size(0));
    // no table: no key can be rotated, so that no page may hold one
    if (p->positions == 0) p->max_pages = 0;
  }
  if (!in.kv_scale.has_value()) return;
  const Tensor& scale = *in.kv_scale;
  p->kv_scale = static_cast<const float*>(scale.const_data_ptr()) + in.layer * scale.stride(1);
  p->scale_page_stride = scale.stride(0), p->scale_head_stride = scale.stride(2);
  p->scale_part_stride = scale.stride(3);
}

template <class Query, class Element, int D, bool kRotate>
void launch_decode(const MemoryAttentionParams& p, const Tensor& q, dim3 grid) {
  const int64_t bytes =
      decode_shared_bytes<Query, Element, D, kRotate>(p.page_splits > 0, p.segment_splits > 0);
  launch<memory_attention_decode<Query, Element, D, kRotate>>(kOp, q, grid, dim3{kAttentionThreads},
                                                              bytes, p);
}

template <class Query, class Element>
void launch_decode(const MemoryAttentionParams& p, const Tensor& q, dim3 grid) {
  const bool rotate = p.cos != nullptr;
  if (p.head_dim == 64) {
    if (rotate) return launch_decode<Query, Element, 64, true>(p, q, grid);
    return launch_decode<Query, Element, 64, false>(p, q, grid);
  }
  if (rotate) return launch_decode<Query, Element, 128, true>(p, q, grid);
  launch_decode<Query, Element, 128, false>(p, q, grid);
}

template <class Query>
void launch_tuned(const MemoryAttentionParams& p, const Tensor& q, dim3 grid,
                  AttentionKernel kernel) {
  if (kernel == AttentionKernel::kPrefill) {
    const dim3 threads{kAttentionThreads};
    if (p.head_dim == 64) {
      return launch<memory_attention_prefill<Query, 64>>(kOp, q, grid, threads,
                                                         PrefillLayout<64>::kBytes, p);
    }
    return launch<memory_attention_prefill<Query, 128>>(kOp, q, grid, threads,
                                                        PrefillLayout<128>::kBytes, p);
  }
  if (p.bank_dtype == Dtype::kInt8) return launch_decode<Query, int8_t>(p, q, grid);
  if (p.bank_dtype == Dtype::kFloat8E4M3) return launch_decode<Query, Float8E4M3>(p, q, grid);
  launch_decode<Query, Query>(p, q, grid);
}

void launch_kernel(const MemoryAttentionParams& p, const Tensor& q, dim3 grid,
                   AttentionKernel kernel) {
  if (kernel == AttentionKernel::kSimple) {
    return launch<memory_attention_simple>(kOp, q, grid, dim3{kAttentionThreads},
                                           simple_shared_bytes(p.head_dim), p);
  }
  if (p.dtype == Dtype::kBFloat16) return launch_tuned<BFloat16>(p, q, grid, kernel);
  launch_tuned<Float16>(p, q, grid, kernel);
}

// Chooses the kernel and its grid, makes room for partial results, launches.
void run(MemoryAttentionParams* p, const MemoryAttentionInputs& in) {
  const int64_t batch = in.q.size(0), rows = p->num_queries * p->group;
  check_range(batch, 0, 65535, kOp, "q");
  check_range(p->num_kv_heads, 0, 65535, kOp, "k");
  const AttentionKernel kernel =
      choose_kernel({p->dtype, p->bank_dtype, p->head_dim, rows, is_aligned(in)});
  const AttentionGrid plan =
      plan_grid(kernel, rows, static_cast<int64_t>(p->max_pages) * p->tiles_per_page,
                divide_up(p->num_keys, kTileKeys));
  p->block_rows = static_cast<int32_t>(plan.block_rows);
  p->page_splits = static_cast<int32_t>(plan.page_splits);
  p->segment_splits = static_cast<int32_t>(plan.segment_splits);
  Tensor partial, tickets;
  if (plan.splits() > 1) {
    const int64_t floats = partial_floats(plan.block_rows, p->head_dim);
    partial =
        new_output_like(in.q, {batch, p->num_kv_heads, plan.splits(), floats}, ScalarType::Float);
    tickets = new_output_like(in.q, {batch, p->num_kv_heads}, ScalarType::Int);
    fill_bytes(tickets, 0);
    p->partial = static_cast<float*>(partial.mutable_data_ptr());
    p->tickets = static_cast<unsigned*>(tickets.mutable_data_ptr());
  }
  const dim3 grid{static_cast<unsigned>(plan.blocks()), static_cast<unsigned>(p->num_kv_heads),
                  static_cast<unsigned>(batch)};
  launch_kernel(*p, in.q, grid, kernel);
}

std::tuple<Tensor, Tensor> memory_attention_cuda(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& kv,
    const OptionalTensor& kv_scale, int64_t layer, const OptionalTensor& page_table,
    const OptionalTensor& page_len, const OptionalTensor& page_base,
    const OptionalTensor& num_pages, const OptionalTensor& valid, const OptionalTensor& cos,
    const OptionalTensor& sin, int64_t rope_mode, int64_t query_stride, double softmax_scale) {
  const MemoryAttentionInputs in{
      q,         k,         v,     kv,  kv_scale, layer,     page_table,   page_len,
      page_base, num_pages, valid, cos, sin,      rope_mode, query_stride, softmax_scale};
  const auto check_device = [&q](const Tensor& t, const char* op, const char* argument) {
    check_same_device(t, q, op, argument);
  };
  MemoryAttentionCheck(in, check_device, kOp).run();
  const DeviceGuard guard(q.get_device_index());
  MemoryAttentionParams p{};
  set_segment(&p, in);
  if (kv.has_value()) set_bank(&p, in);
  Tensor out = new_output_like(q, {q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type(),
                               {0, 2, 1, 3});
  Tensor lse = new_output_like(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  run(&p, in);
  return {out, lse};
}

}  // namespace
}  // namespace lychee::cuda

LYCHEE_CUDA_KERNELS(m) {
  m.impl("memory_attention", TORCH_BOX(&lychee::cuda::memory_attention_cuda));
}
