// SPDX-License-Identifier: Apache-2.0
// Checks of memory_attention's arguments, and the list of key tiles.
#include "cpu/memory_attention_host.h"

#include <torch/csrc/stable/ops.h>

#include <utility>

namespace lychee {
namespace {

constexpr const char* kOp = "memory_attention";

void check_segment(const MemoryAttentionParams& p, const Tensor& t, ScalarType dtype,
                   const char* argument) {
  check_cpu(t, kOp, argument);
  check_shape(t, {p.batch, p.num_kv_heads, p.num_keys, p.head_dim}, kOp, argument);
  check_dtype(t, dtype, kOp, argument);
  check_last_dim_contiguous(t, kOp, argument);
}

void set_valid(MemoryAttentionParams* p, const Tensor& valid) {
  check_cpu(valid, kOp, "valid");
  check_shape(valid, {p->batch, p->num_keys}, kOp, "valid");
  check_dtype(valid, ScalarType::Bool, kOp, "valid");
  check_last_dim_contiguous(valid, kOp, "valid");
  p->valid = static_cast<const bool*>(valid.const_data_ptr());
  p->valid_stride = valid.stride(0);
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

void set_tables(MemoryAttentionParams* p, const OptionalTensor& cos, const OptionalTensor& sin) {
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
}

// Tiles of `count` consecutive tokens of a page, or of the segment when page is -1.
void add_tiles(std::vector<KeyTile>* list, int64_t page, int64_t count, int64_t position) {
  for (int64_t j = 0; j < count; j += kTileKeys) {
    list->push_back({page, j, count - j < kTileKeys ? count - j : kTileKeys, position + j});
  }
}

// Every row's pages, checked against the bank and the tables, then its contiguous segment.
void list_tiles(const MemoryAttentionParams& p, const MemoryAttentionInputs& in, KeyTiles* tiles) {
  const int32_t *table = nullptr, *len = nullptr, *base = nullptr, *used = nullptr;
  int64_t max_pages = 0, bank_pages = 0, page_tokens = 0, positions = 0;
  if (in.kv.has_value()) {
    table = page_ints(in.page_table, {p.batch, -1}, "page_table");
    max_pages = in.page_table->size(1);
    len = page_ints(in.page_len, {p.batch, max_pages}, "page_len");
    used = page_ints(in.num_pages, {p.batch}, "num_pages");
    bank_pages = in.kv->size(0), page_tokens = in.kv->size(4);
    if (p.cos != nullptr) {
      base = page_ints(in.page_base, {p.batch, max_pages}, "page_base");
      positions = in.cos->size(0);
    }
  }
  tiles->begin.push_back(0);
  for (int64_t b = 0; b < p.batch; ++b) {
    if (used != nullptr) check_range(used[b], 0, max_pages, kOp, "num_pages");
    const int64_t begin = b * max_pages, end = used == nullptr ? begin : begin + used[b];
    for (int64_t i = begin; i < end; ++i) {
      check_range(table[i], 0, bank_pages - 1, kOp, "page_table");
      check_range(len[i], 0, page_tokens, kOp, "page_len");
      if (base != nullptr) check_range(base[i], 0, positions - len[i], kOp, "page_base");
      add_tiles(&tiles->list, table[i], len[i], base == nullptr ? 0 : base[i]);
    }
    add_tiles(&tiles->list, -1, p.num_keys, 0);
    tiles->begin.push_back(static_cast<int64_t>(tiles->list.size()));
  }
}

}  // namespace

MemoryAttentionParams read_inputs(const MemoryAttentionInputs& in, KeyTiles* tiles) {
  const Tensor &q = in.q, &k = in.k, &v = in.v;
  check_cpu(q, kOp, "q");
  check_shape(q, {-1, -1, -1, -1}, kOp, "q");
  check_last_dim_contiguous(q, kOp, "q");
  check_shape(k, {q.size(0), -1, -1, q.size(3)}, kOp, "k");
  check_range(in.query_stride, 0, INT32_MAX, kOp, "query_stride");
  check_range(in.rope_mode, 0, 1, kOp, "rope_mode");

  MemoryAttentionParams p{};
  p.dtype = io_dtype(q, kOp, "q");
  p.batch = q.size(0);
  p.num_heads = q.size(1), p.num_queries = q.size(2), p.head_dim = q.size(3);
  p.num_kv_heads = k.size(1), p.num_keys = k.size(2);
  check_head_dim(p.head_dim, kOp, "q");
  check(p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0 &&
            p.num_heads / p.num_kv_heads <= kBlockRows,
        kOp, "k", "a head count that divides q's", std::to_string(p.num_kv_heads));
  check_segment(p, k, q.scalar_type(), "k");
  check_segment(p, v, q.scalar_type(), "v");
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.q_batch_stride = q.stride(0), p.q_head_stride = q.stride(1), p.q_token_stride = q.stride(2);
  p.k_batch_stride = k.stride(0), p.k_head_stride = k.stride(1), p.k_token_stride = k.stride(2);
  p.v_batch_stride = v.stride(0), p.v_head_stride = v.stride(1), p.v_token_stride = v.stride(2);
  p.query_stride = in.query_stride;
  p.softmax_scale = static_cast<float>(in.softmax_scale);
  if (in.valid.has_value()) set_valid(&p, *in.valid);
  if (in.kv.has_value()) set_bank(&p, *in.kv, in.kv_scale, in.layer);
  if (in.kv.has_value() && in.rope_mode == 1) set_tables(&p, in.cos, in.sin);
  list_tiles(p, in, tiles);
  p.tiles = tiles->list.data();
  p.tile_begin = tiles->begin.data();
  return p;
}

}  // namespace lychee
