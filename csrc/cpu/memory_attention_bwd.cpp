// SPDX-License-Identifier: Apache-2.0
// The backward of memory_attention on CPU: checks, slots for the pages' gradients, registration.
#include "cpu/memory_attention_bwd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <tuple>
#include <vector>

#include "cpu/isa.h"
#include "cpu/memory_attention_host.h"
#include "cpu/scratch.h"
#include "stable.h"

namespace lychee {
namespace {

constexpr const char* kOp = "memory_attention_bwd";
// The batch is cut into at most this many chunks, whatever the number of threads, so that sums over
// the rows that read one page have one order.
constexpr int64_t kChunks = 16;

void check_output(const MemoryAttentionParams& p, const Tensor& t, ScalarType dtype,
                  const char* argument) {
  check_cpu(t, kOp, argument);
  check_shape(t, {p.batch, p.num_heads, p.num_queries, p.head_dim}, kOp, argument);
  check_dtype(t, dtype, kOp, argument);
  check_last_dim_contiguous(t, kOp, argument);
}

// Which slot each page tile adds to, and which slots make up each page.
struct Slots {
  std::vector<int64_t> of_tile, begin, pages, page_begin, of_page;
};

Slots assign_slots(const MemoryAttentionBwdParams& p, const KeyTiles& tiles, int64_t bank_pages) {
  Slots slots;
  slots.of_tile.assign(tiles.list.size(), -1);
  std::vector<int64_t> newest(bank_pages, -1), count(bank_pages, 0), page_of_slot;
  for (int64_t b = 0; b < p.in.batch; ++b) {
    if (b % p.chunk_batch == 0) slots.begin.push_back(page_of_slot.size());
    for (int64_t i = tiles.begin[b]; i < tiles.begin[b + 1]; ++i) {
      const int64_t page = tiles.list[i].page;
      if (page < 0) continue;
      if (newest[page] < slots.begin.back()) {
        newest[page] = static_cast<int64_t>(page_of_slot.size());
        page_of_slot.push_back(page);
        ++count[page];
      }
      slots.of_tile[i] = newest[page];
    }
  }
  slots.begin.push_back(page_of_slot.size());
  slots.page_begin.push_back(0);
  for (int64_t page = 0; page < bank_pages; ++page) {
    if (count[page] == 0) continue;
    newest[page] = slots.page_begin.back();
    slots.pages.push_back(page);
    slots.page_begin.push_back(slots.page_begin.back() + count[page]);
  }
  slots.of_page.resize(page_of_slot.size());
  for (size_t slot = 0; slot < page_of_slot.size(); ++slot) {
    slots.of_page[newest[page_of_slot[slot]]++] = static_cast<int64_t>(slot);
  }
  return slots;
}

void set_gradient_inputs(MemoryAttentionBwdParams* p, const Tensor& dout, const Tensor& out,
                         const Tensor& lse, ScalarType dtype) {
  check_output(p->in, dout, dtype, "dout");
  check_output(p->in, out, dtype, "out");
  check_cpu(lse, kOp, "lse");
  check_shape(lse, {p->in.batch, p->in.num_heads, p->in.num_queries}, kOp, "lse");
  check_dtype(lse, ScalarType::Float, kOp, "lse");
  check_contiguous(lse, kOp, "lse");
  p->dout = dout.const_data_ptr(), p->out = out.const_data_ptr();
  p->lse = static_cast<const float*>(lse.const_data_ptr());
  p->dout_batch_stride = dout.stride(0), p->out_batch_stride = out.stride(0);
  p->dout_head_stride = dout.stride(1), p->out_head_stride = out.stride(1);
  p->dout_token_stride = dout.stride(2), p->out_token_stride = out.stride(2);
}

void run_chunks(const MemoryAttentionBwdParams& p) {
  const auto kernel = LYCHEE_ISA_TABLE(MemoryAttentionBwdFn, memory_attention_bwd).pick();
  const int64_t chunks = (p.in.batch + p.chunk_batch - 1) / p.chunk_batch;
  const int64_t rows = p.in.num_queries * (p.in.num_heads / p.in.num_kv_heads);
  for_each_item(chunks * p.in.num_kv_heads, memory_attention_bwd_scratch(p.in.head_dim, rows), kOp,
                [&](int64_t item, float* scratch) { kernel(p, item, scratch); });
}

// The gradient of the whole bank, zero but for the pages read in this layer.
Tensor bank_gradient(MemoryAttentionBwdParams* p, const Tensor& kv, int64_t layer,
                     const KeyTiles& tiles) {
  const int64_t layers = kv.size(1);
  p->page_tokens = kv.size(4);
  Tensor dkv =
      new_output({kv.size(0), layers, p->in.num_kv_heads, 2, p->page_tokens, p->in.head_dim},
                 kv.scalar_type());
  std::memset(dkv.mutable_data_ptr(), 0, dkv.numel() * dkv.element_size());
  const Slots slots = assign_slots(*p, tiles, kv.size(0));
  const int64_t page = p->in.num_kv_heads * 2 * p->page_tokens * p->in.head_dim;
  FloatBuffer sums = allocate_floats(static_cast<int64_t>(slots.of_page.size()) * page, kOp);
  p->tile_slot = slots.of_tile.data(), p->slot_begin = slots.begin.data();
  p->pages = slots.pages.data(), p->page_begin = slots.page_begin.data();
  p->page_slots = slots.of_page.data(), p->slots = sums.get();
  p->dkv_page_stride = layers * page;
  p->dkv = static_cast<char*>(dkv.mutable_data_ptr()) +
           layer * page * static_cast<int64_t>(kv.element_size());
  run_chunks(*p);
  const auto sum = LYCHEE_ISA_TABLE(SumSlotsFn, sum_slots).pick();
  const int64_t count = static_cast<int64_t>(slots.pages.size()) * p->in.num_kv_heads;
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) sum(*p, index);
  });
  return dkv;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> memory_attention_bwd_cpu(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
    const Tensor& lse, const OptionalTensor& kv, const OptionalTensor& kv_scale, int64_t layer,
    const OptionalTensor& page_table, const OptionalTensor& page_len,
    const OptionalTensor& page_base, const OptionalTensor& num_pages, const OptionalTensor& valid,
    const OptionalTensor& cos, const OptionalTensor& sin, int64_t rope_mode, int64_t query_stride,
    double softmax_scale, bool bank_wanted) {
  KeyTiles tiles;
  MemoryAttentionBwdParams p{};
  p.in = read_inputs({q, k, v, kv, kv_scale, layer, page_table, page_len, page_base, num_pages,
                      valid, cos, sin, rope_mode, query_stride, softmax_scale},
                     &tiles);
  set_gradient_inputs(&p, dout, out, lse, q.scalar_type());
  check(!bank_wanted || (kv.has_value() && !kv_scale.has_value()), kOp, "kv", "a float bank",
        kv.has_value() ? "a quantised one" : "None");
  p.chunk_batch = p.in.batch <= kChunks ? 1 : (p.in.batch + kChunks - 1) / kChunks;
  const MemoryAttentionParams& in = p.in;
  Tensor dq = new_output({in.batch, in.num_heads, in.num_queries, in.head_dim}, q.scalar_type());
  Tensor dk = new_output({in.batch, in.num_kv_heads, in.num_keys, in.head_dim}, q.scalar_type());
  Tensor dv = new_output({in.batch, in.num_kv_heads, in.num_keys, in.head_dim}, q.scalar_type());
  p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
  if (bank_wanted) return {dq, dk, dv, bank_gradient(&p, *kv, layer, tiles)};
  run_chunks(p);
  return {dq, dk, dv, new_output({0}, q.scalar_type())};
}

}  // namespace
}  // namespace lychee

STABLE_TORCH_LIBRARY_IMPL(lychee, CPU, m) {
  m.impl("memory_attention_bwd", TORCH_BOX(&lychee::memory_attention_bwd_cpu));
}
