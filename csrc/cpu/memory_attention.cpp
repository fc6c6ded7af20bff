// SPDX-License-Identifier: Apache-2.0
// memory_attention on CPU: partition into work items, registration.
#include "cpu/memory_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cpu/isa.h"
#include "cpu/memory_attention_host.h"
#include "cpu/scratch.h"
#include "stable.h"

namespace lychee {
namespace {

// Blocks of queries; splits of the keys only where one block holds every query.
void partition(MemoryAttentionParams* p, const KeyTiles& tiles) {
  const int64_t group = p->num_heads / p->num_kv_heads;
  p->block_tokens = kBlockRows / group < p->num_queries ? kBlockRows / group : p->num_queries;
  p->block_rows = p->block_tokens * group;
  p->num_blocks = p->num_queries == 0 ? 0 : (p->num_queries - 1) / p->block_tokens + 1;
  p->num_splits = 1;
  if (p->num_blocks != 1) return;
  for (size_t b = 0; b + 1 < tiles.begin.size(); ++b) {
    const int64_t count = tiles.begin[b + 1] - tiles.begin[b];
    const int64_t splits = splits_of(count, p->block_rows);
    p->num_splits = splits > p->num_splits ? splits : p->num_splits;
  }
}

void run_blocks(MemoryAttentionParams* p, int64_t blocks) {
  const bool amx = cpu_isa() == Isa::kAmx && amx_takes(*p);
  const auto attend =
      amx ? memory_attention_amx : LYCHEE_ISA_TABLE(MemoryAttentionFn, memory_attention).pick();
  const auto merge = LYCHEE_ISA_TABLE(MergeSplitsFn, merge_splits).pick();
  const int64_t items = blocks * p->num_splits;
  FloatBuffer partial(nullptr, &std::free);
  if (p->num_splits > 1) {
    p->partial_stride = padded_dim(p->head_dim) + kPadLanes;
    partial = allocate_floats(items * p->block_rows * p->partial_stride, "memory_attention");
    p->partial = partial.get();
  }
  const auto scratch_floats = amx ? memory_attention_amx_scratch : memory_attention_scratch;
  for_each_item(items, scratch_floats(p->head_dim, p->block_rows), "memory_attention",
                [&](int64_t item, float* scratch) { attend(*p, item, scratch); });
  if (p->num_splits == 1) return;
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) merge(*p, block);
  });
}

std::tuple<Tensor, Tensor> memory_attention_cpu(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& kv,
    const OptionalTensor& kv_scale, int64_t layer, const OptionalTensor& page_table,
    const OptionalTensor& page_len, const OptionalTensor& page_base,
    const OptionalTensor& num_pages, const OptionalTensor& valid, const OptionalTensor& cos,
    const OptionalTensor& sin, int64_t rope_mode, int64_t query_stride, double softmax_scale) {
  KeyTiles tiles;
  MemoryAttentionParams p =
      read_inputs({q, k, v, kv, kv_scale, layer, page_table, page_len, page_base, num_pages, valid,
                   cos, sin, rope_mode, query_stride, softmax_scale},
                  &tiles);
  Tensor out =
      new_output({p.batch, p.num_heads, p.num_queries, p.head_dim}, q.scalar_type(), {0, 2, 1, 3});
  Tensor lse = new_output({p.batch, p.num_heads, p.num_queries}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  partition(&p, tiles);
  const int64_t blocks = p.batch * p.num_kv_heads * p.num_blocks;
  if (blocks > 0) run_blocks(&p, blocks);
  return {out, lse};
}

}  // namespace
}  // namespace lychee

STABLE_TORCH_LIBRARY_IMPL(lychee, CPU, m) {
  m.impl("memory_attention", TORCH_BOX(&lychee::memory_attention_cpu));
}
