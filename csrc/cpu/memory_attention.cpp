// SPDX-License-Identifier: Apache-2.0
// memory_attention on CPU: checks, the list of key tiles, partition into work items, registration.
#include "cpu/memory_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "stable.h"

namespace lychee {
namespace {

using OptionalTensor = std::optional<Tensor>;
constexpr const char* kOp = "memory_attention";

struct Tiles {
  std::vector<KeyTile> list;
  std::vector<int64_t> begin;
};

void check_segment(const Tensor& t, int64_t batch, int64_t heads, int64_t keys, int64_t dim,
                   ScalarType dtype, const char* argument) {
  check_cpu(t, kOp, argument);
  check_shape(t, {batch, heads, keys, dim}, kOp, argument);
  check_dtype(t, dtype, kOp, argument);
  check_last_dim_contiguous(t, kOp, argument);
}

const int32_t* page_ints(const OptionalTensor& t, std::initializer_list<int64_t> sizes,
                         const char* argument) {
  check(t.has_value(), kOp, argument, "a tensor when kv is given", "None");
  check_cpu(*t, kOp, argument);
  check_shape(*t, sizes, kOp, argument);
  check_dtype(*t, ScalarType::Int, kOp, argument);
  check_contiguous(*t, kOp, argument);
  return static_cast<const int32_t*>(t->const_data_ptr());
}

void set_bank(MemoryAttentionParams* p, const Tensor& kv, const OptionalTensor& kv_scale,
              int64_t layer) {
  check_cpu(kv, kOp, "kv");
  check_shape(kv, {-1, -1, p->num_kv_heads, 2, -1, p->head_dim}, kOp, "kv");
  check_last_dim_contiguous(kv, kOp, "kv");
  check_range(layer, 0, kv.size(1) - 1, kOp, "layer");
  p->bank_dtype = bank_dtype(kv, kOp, "kv");
  p->kv = static_cast<const char*>(kv.const_data_ptr()) +
          layer * kv.stride(1) * static_cast<int64_t>(kv.element_size());
  p->page_stride = kv.stride(0), p->page_head_stride = kv.stride(2);
  p->page_part_stride = kv.stride(3), p->page_token_stride = kv.stride(4);
  const bool quantised = is_quantised(p->bank_dtype);
  check(quantised == kv_scale.has_value(), kOp, "kv_scale",
        quantised ? "a tensor with this bank dtype" : "None with this bank dtype",
        kv_scale.has_value() ? "a tensor" : "None");
  if (!kv_scale.has_value()) return;
  check_cpu(*kv_scale, kOp, "kv_scale");
  check_shape(*kv_scale, {kv.size(0), kv.size(1), p->num_kv_heads, 2, kv.size(4)}, kOp, "kv_scale");
  check_dtype(*kv_scale, ScalarType::Float, kOp, "kv_scale");
  check_last_dim_contiguous(*kv_scale, kOp, "kv_scale");
  p->kv_scale = static_cast<const float*>(kv_scale->const_data_ptr()) + layer * kv_scale->stride(1);
  p->scale_page_stride = kv_scale->stride(0), p->scale_head_stride = kv_scale->stride(2);
  p->scale_part_stride = kv_scale->stride(3);
}

// Sets the rotation tables and returns how many positions they hold.
int64_t set_tables(MemoryAttentionParams* p, const OptionalTensor& cos, const OptionalTensor& sin) {
  check(cos.has_value() && sin.has_value(), kOp, "cos", "cos and sin when rope_mode is affine",
        "None");
  check_shape(*cos, {-1, p->head_dim / 2}, kOp, "cos");
  check_shape(*sin, {cos->size(0), p->head_dim / 2}, kOp, "sin");
  for (const auto& [table, name] : {std::pair(*cos, "cos"), std::pair(*sin, "sin")}) {
    check_cpu(table, kOp, name);
    check_dtype(table, ScalarType::Float, kOp, name);
    check_contiguous(table, kOp, name);
  }
  p->cos = static_cast<const float*>(cos->const_data_ptr());
  p->sin = static_cast<const float*>(sin->const_data_ptr());
  return cos->size(0);
}

// Every row's pages, checked against the bank and the tables, then its contiguous segment.
Tiles list_tiles(const MemoryAttentionParams& p, int64_t batch, const OptionalTensor& kv,
                 const OptionalTensor& page_table, const OptionalTensor& page_len,
                 const OptionalTensor& page_base, const OptionalTensor& num_pages,
                 int64_t table_positions) {
  const int32_t *table = nullptr, *len = nullptr, *base = nullptr, *used = nullptr;
  int64_t max_pages = 0;
  if (kv.has_value()) {
    table = page_ints(page_table, {batch, -1}, "page_table");
    max_pages = page_table->size(1);
    len = page_ints(page_len, {batch, max_pages}, "page_len");
    used = page_ints(num_pages, {batch}, "num_pages");
    if (p.cos != nullptr) base = page_ints(page_base, {batch, max_pages}, "page_base");
  }
  Tiles tiles;
  tiles.begin.push_back(0);
  for (int64_t b = 0; b < batch; ++b) {
    if (used != nullptr) check_range(used[b], 0, max_pages, kOp, "num_pages");
    for (int64_t i = 0; used != nullptr && i < used[b]; ++i) {
      const int64_t page = table[b * max_pages + i], tokens = len[b * max_pages + i];
      check_range(page, 0, kv->size(0) - 1, kOp, "page_table");
      check_range(tokens, 0, kv->size(4), kOp, "page_len");
      const int64_t position = base == nullptr ? 0 : base[b * max_pages + i];
      if (base != nullptr) {
        check_range(position, 0, table_positions - tokens, kOp, "page_base");
      }
      for (int64_t j = 0; j < tokens; j += kTileKeys) {
        const int64_t count = tokens - j < kTileKeys ? tokens - j : kTileKeys;
        tiles.list.push_back({page, j, count, position + j});
      }
    }
    for (int64_t j = 0; j < p.num_keys; j += kTileKeys) {
      const int64_t count = p.num_keys - j < kTileKeys ? p.num_keys - j : kTileKeys;
      tiles.list.push_back({-1, j, count, 0});
    }
    tiles.begin.push_back(static_cast<int64_t>(tiles.list.size()));
  }
  return tiles;
}

// Blocks of queries; splits of the keys only where one block holds every query.
void partition(MemoryAttentionParams* p, const Tiles& tiles) {
  const int64_t group = p->num_heads / p->num_kv_heads;
  p->block_tokens = kBlockRows / group < p->num_queries ? kBlockRows / group : p->num_queries;
  p->block_rows = p->block_tokens * group;
  p->num_blocks = p->num_queries == 0 ? 0 : (p->num_queries - 1) / p->block_tokens + 1;
  p->num_splits = 1;
  if (p->num_blocks > 1) return;
  for (size_t b = 0; b + 1 < tiles.begin.size(); ++b) {
    const int64_t count = tiles.begin[b + 1] - tiles.begin[b];
    const int64_t splits = (count + kTilesPerSplit - 1) / kTilesPerSplit;
    p->num_splits = splits > p->num_splits ? splits : p->num_splits;
  }
}

using FloatBuffer = std::unique_ptr<float, decltype(&std::free)>;

FloatBuffer allocate_floats(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 63) / 64 * 64;
  float* data = static_cast<float*>(std::aligned_alloc(64, bytes));
  check(data != nullptr, kOp, "scratch", std::to_string(bytes) + " bytes", "none: out of memory");
  return FloatBuffer(data, &std::free);
}

// Threads draw items one by one, last first: the last blocks of a causal segment are the longest.
void run_items(MemoryAttentionParams* p, int64_t blocks) {
  const auto attend = LYCHEE_ISA_TABLE(MemoryAttentionFn, memory_attention).pick();
  const auto merge = LYCHEE_ISA_TABLE(MergeSplitsFn, merge_splits).pick();
  const int64_t items = blocks * p->num_splits;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = threads < items ? threads : items;
  FloatBuffer partial(nullptr, &std::free);
  if (p->num_splits > 1) {
    p->partial_stride = padded_dim(p->head_dim) + kPadLanes;
    partial = allocate_floats(items * p->block_rows * p->partial_stride);
    p->partial = partial.get();
  }
  const int64_t scratch = (memory_attention_scratch(p->head_dim, p->block_rows) + 15) / 16 * 16;
  FloatBuffer buffers = allocate_floats(workers * scratch);
  std::atomic<int64_t> next{items};
  std::atomic<int64_t> worker{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    float* own = buffers.get() + worker.fetch_add(1) * scratch;
    for (int64_t item = next.fetch_sub(1) - 1; item >= 0; item = next.fetch_sub(1) - 1) {
      attend(*p, item, own);
    }
  });
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
  check_cpu(q, kOp, "q");
  check_shape(q, {-1, -1, -1, -1}, kOp, "q");
  check_last_dim_contiguous(q, kOp, "q");
  check_shape(k, {q.size(0), -1, -1, q.size(3)}, kOp, "k");
  check_range(query_stride, 0, INT32_MAX, kOp, "query_stride");
  check_range(rope_mode, 0, 1, kOp, "rope_mode");

  MemoryAttentionParams p{};
  const int64_t batch = q.size(0);
  p.dtype = io_dtype(q, kOp, "q");
  p.num_heads = q.size(1), p.num_queries = q.size(2), p.head_dim = q.size(3);
  p.num_kv_heads = k.size(1), p.num_keys = k.size(2);
  check_head_dim(p.head_dim, kOp, "q");
  check(p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0 &&
            p.num_heads / p.num_kv_heads <= kBlockRows,
        kOp, "k", "a head count that divides q's", std::to_string(p.num_kv_heads));
  check_segment(k, batch, p.num_kv_heads, p.num_keys, p.head_dim, q.scalar_type(), "k");
  check_segment(v, batch, p.num_kv_heads, p.num_keys, p.head_dim, q.scalar_type(), "v");
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.q_batch_stride = q.stride(0), p.q_head_stride = q.stride(1), p.q_token_stride = q.stride(2);
  p.k_batch_stride = k.stride(0), p.k_head_stride = k.stride(1), p.k_token_stride = k.stride(2);
  p.v_batch_stride = v.stride(0), p.v_head_stride = v.stride(1), p.v_token_stride = v.stride(2);
  p.query_stride = query_stride;
  p.softmax_scale = static_cast<float>(softmax_scale);
  if (valid.has_value()) {
    check_cpu(*valid, kOp, "valid");
    check_shape(*valid, {batch, p.num_keys}, kOp, "valid");
    check_dtype(*valid, ScalarType::Bool, kOp, "valid");
    check_last_dim_contiguous(*valid, kOp, "valid");
    p.valid = static_cast<const bool*>(valid->const_data_ptr());
    p.valid_stride = valid->stride(0);
  }
  if (kv.has_value()) set_bank(&p, *kv, kv_scale, layer);
  const int64_t positions = kv.has_value() && rope_mode == 1 ? set_tables(&p, cos, sin) : 0;
  const Tiles tiles =
      list_tiles(p, batch, kv, page_table, page_len, page_base, num_pages, positions);
  p.tiles = tiles.list.data();
  p.tile_begin = tiles.begin.data();

  Tensor out =
      new_output({batch, p.num_heads, p.num_queries, p.head_dim}, q.scalar_type(), {0, 2, 1, 3});
  Tensor lse = new_output({batch, p.num_heads, p.num_queries}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  partition(&p, tiles);
  const int64_t blocks = batch * p.num_kv_heads * p.num_blocks;
  if (blocks > 0) run_items(&p, blocks);
  return {out, lse};
}

}  // namespace
}  // namespace lychee

STABLE_TORCH_LIBRARY_IMPL(lychee, CPU, m) {
  m.impl("memory_attention", TORCH_BOX(&lychee::memory_attention_cpu));
}
