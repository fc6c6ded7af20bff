// SPDX-License-Identifier: Apache-2.0
// memory_attention's arguments as parameters, and the list of key tiles.
#include "cpu/memory_attention_host.h"

#include <torch/csrc/stable/ops.h>

namespace lychee {
namespace {

constexpr const char* kOp = "memory_attention";

const int32_t* ints(const OptionalTensor& t) {
  return static_cast<const int32_t*>(t->const_data_ptr());
}

void set_bank(MemoryAttentionParams* p, const Tensor& kv, const OptionalTensor& kv_scale,
              int64_t layer) {
  p->bank_dtype = bank_dtype(kv, kOp, "kv");
  p->kv = static_cast<const char*>(kv.const_data_ptr()) +
          layer * kv.stride(1) * static_cast<int64_t>(kv.element_size());
  p->page_stride = kv.stride(0), p->page_head_stride = kv.stride(2);
  p->page_part_stride = kv.stride(3), p->page_token_stride = kv.stride(4);
  if (!kv_scale.has_value()) return;
  p->kv_scale = static_cast<const float*>(kv_scale->const_data_ptr()) + layer * kv_scale->stride(1);
  p->scale_page_stride = kv_scale->stride(0), p->scale_head_stride = kv_scale->stride(2);
  p->scale_part_stride = kv_scale->stride(3);
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
    table = ints(in.page_table), len = ints(in.page_len), used = ints(in.num_pages);
    max_pages = in.page_table->size(1);
    bank_pages = in.kv->size(0), page_tokens = in.kv->size(4);
    if (in.rotated()) {
      base = ints(in.page_base);
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
  MemoryAttentionCheck(in, check_cpu, kOp).run();
  MemoryAttentionParams p{};
  p.dtype = io_dtype(q, kOp, "q");
  p.batch = q.size(0);
  p.num_heads = q.size(1), p.num_queries = q.size(2), p.head_dim = q.size(3);
  p.num_kv_heads = k.size(1), p.num_keys = k.size(2);
  check(p.num_heads / p.num_kv_heads <= kBlockRows, kOp, "k", "a head count that divides q's",
        std::to_string(p.num_kv_heads));
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.q_batch_stride = q.stride(0), p.q_head_stride = q.stride(1), p.q_token_stride = q.stride(2);
  p.k_batch_stride = k.stride(0), p.k_head_stride = k.stride(1), p.k_token_stride = k.stride(2);
  p.v_batch_stride = v.stride(0), p.v_head_stride = v.stride(1), p.v_token_stride = v.stride(2);
  p.query_stride = in.query_stride;
  p.softmax_scale = static_cast<float>(in.softmax_scale);
  if (in.valid.has_value()) {
    p.valid = static_cast<const bool*>(in.valid->const_data_ptr());
    p.valid_stride = in.valid->stride(0);
  }
  if (in.kv.has_value()) set_bank(&p, *in.kv, in.kv_scale, in.layer);
  if (in.rotated()) {
    p.cos = static_cast<const float*>(in.cos->const_data_ptr());
    p.sin = static_cast<const float*>(in.sin->const_data_ptr());
  }
  list_tiles(p, in, tiles);
  p.tiles = tiles->list.data();
  p.tile_begin = tiles->begin.data();
  return p;
}

}  // namespace lychee
