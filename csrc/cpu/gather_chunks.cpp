// SPDX-License-Identifier: Apache-2.0
// gather_chunks, gather_chunks_ and gather_chunks_bwd on CPU: checks, parameters, registration.
#include "cpu/gather_chunks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <tuple>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/isa.h"
#include "stable.h"

namespace lychee {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Elements a thread draws at a time: some tens of microseconds of work.
constexpr int64_t kElementsPerTask = 1 << 17;
// Keys and values this large are written past the caches: whoever reads them comes too late to find
// them there.
constexpr int64_t kStreamBytes = 1 << 25;

const int32_t* table_ints(const Tensor& t, std::initializer_list<int64_t> sizes, const char* op,
                          const char* argument) {
  check_cpu(t, op, argument);
  check_shape(t, sizes, op, argument);
  check_dtype(t, ScalarType::Int, op, argument);
  check_contiguous(t, op, argument);
  return static_cast<const int32_t*>(t.const_data_ptr());
}

const float* rope_table(const Tensor& t, int64_t positions, int64_t half, const char* op,
                        const char* argument) {
  check_cpu(t, op, argument);
  check_shape(t, {positions, half}, op, argument);
  check_dtype(t, ScalarType::Float, op, argument);
  check_contiguous(t, op, argument);
  return static_cast<const float*>(t.const_data_ptr());
}

// Every entry in use lies inside the bank, and its tokens inside the tables of `positions` rows.
void check_entries(const PageTable& t, int64_t bank_pages, int64_t page_tokens, int64_t positions,
                   const char* op) {
  for (int64_t b = 0; b < t.batch; ++b) {
    check_range(t.num_pages[b], 0, t.max_pages, op, "num_pages");
    for (int64_t entry = b * t.max_pages; entry < b * t.max_pages + t.num_pages[b]; ++entry) {
      check_range(t.page[entry], 0, bank_pages - 1, op, "page_table");
      check_range(t.len[entry], 0, page_tokens, op, "page_len");
      if (t.base == nullptr) continue;
      check_range(t.base[entry], 0, positions - t.len[entry], op, "page_base");
    }
  }
}

PageTable make_table(const Tensor& page_table, const Tensor& page_len,
                     const OptionalTensor& page_base, const Tensor& num_pages,
                     const OptionalTensor& cos, const OptionalTensor& sin, int64_t rope_mode,
                     int64_t bank_pages, int64_t page_tokens, int64_t head_dim, const char* op) {
  PageTable t{};
  t.page = table_ints(page_table, {-1, -1}, op, "page_table");
  t.batch = page_table.size(0), t.max_pages = page_table.size(1);
  t.len = table_ints(page_len, {t.batch, t.max_pages}, op, "page_len");
  t.num_pages = table_ints(num_pages, {t.batch}, op, "num_pages");
  check_range(rope_mode, 0, 1, op, "rope_mode");
  int64_t positions = 0;
  if (rope_mode == 1) {
    check(cos.has_value() && sin.has_value() && page_base.has_value(), op, "cos",
          "cos, sin and page_base when rope_mode is affine", "None");
    t.base = table_ints(*page_base, {t.batch, t.max_pages}, op, "page_base");
    t.cos = rope_table(*cos, -1, head_dim / 2, op, "cos");
    t.sin = rope_table(*sin, cos->size(0), head_dim / 2, op, "sin");
    positions = cos->size(0);
  }
  check_entries(t, bank_pages, page_tokens, positions, op);
  return t;
}

void set_bank(GatherChunksParams* p, const Tensor& kv, const OptionalTensor& kv_scale,
              int64_t first_layer, int64_t last_layer, const char* op) {
  check_cpu(kv, op, "kv");
  check_shape(kv, {-1, -1, -1, 2, -1, -1}, op, "kv");
  check(kv.size(1) > 0, op, "kv", "at least one layer", "0");
  check_head_dim(kv.size(5), op, "kv");
  check_last_dim_contiguous(kv, op, "kv");
  check_range(first_layer, 0, last_layer, op, "layer_range");
  check_range(last_layer, first_layer, kv.size(1), op, "layer_range");
  p->layers = last_layer - first_layer;
  p->num_kv_heads = kv.size(2), p->page_tokens = kv.size(4), p->head_dim = kv.size(5);
  p->bank_dtype = bank_dtype(kv, op, "kv");
  p->kv = static_cast<const char*>(kv.const_data_ptr()) +
          first_layer * kv.stride(1) * static_cast<int64_t>(kv.element_size());
  p->page_stride = kv.stride(0), p->layer_stride = kv.stride(1), p->head_stride = kv.stride(2);
  p->part_stride = kv.stride(3), p->token_stride = kv.stride(4);
  const bool quantised = is_quantised(p->bank_dtype);
  check(quantised == kv_scale.has_value(), op, "kv_scale",
        quantised ? "a tensor with this bank dtype" : "None with this bank dtype",
        kv_scale.has_value() ? "a tensor" : "None");
  if (!quantised) return;
  check_cpu(*kv_scale, op, "kv_scale");
  check_shape(*kv_scale, {kv.size(0), kv.size(1), p->num_kv_heads, 2, p->page_tokens}, op,
              "kv_scale");
  check_dtype(*kv_scale, ScalarType::Float, op, "kv_scale");
  check_last_dim_contiguous(*kv_scale, op, "kv_scale");
  p->kv_scale =
      static_cast<const float*>(kv_scale->const_data_ptr()) + first_layer * kv_scale->stride(1);
  p->scale_page_stride = kv_scale->stride(0), p->scale_layer_stride = kv_scale->stride(1);
  p->scale_head_stride = kv_scale->stride(2), p->scale_part_stride = kv_scale->stride(3);
}

// Threads draw runs of items: entries that hold no page cost much less than others.
template <class Kernel, class Params>
void run_items(Kernel kernel, const Params& p, int64_t items) {
  const int64_t item_elements = std::max<int64_t>(2 * p.page_tokens * p.head_dim, 1);
  const int64_t step = std::max<int64_t>(kElementsPerTask / item_elements, 1);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min(threads, (items + step - 1) / step);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t begin = next.fetch_add(step); begin < items; begin = next.fetch_add(step)) {
      kernel(p, begin, std::min(begin + step, items));
    }
  });
}

Tensor make_valid(const PageTable& t, int64_t page_tokens) {
  Tensor valid = new_output({t.batch, t.max_pages * page_tokens}, ScalarType::Bool);
  bool* out = static_cast<bool*>(valid.mutable_data_ptr());
  for (int64_t b = 0; b < t.batch; ++b) {
    for (int64_t i = 0; i < t.max_pages; ++i, out += page_tokens) {
      const int64_t count = i < t.num_pages[b] ? t.len[b * t.max_pages + i] : 0;
      std::fill(out, out + count, true);
      std::fill(out + count, out + page_tokens, false);
    }
  }
  return valid;
}

GatherChunksParams make_params(const Tensor& kv, const OptionalTensor& kv_scale,
                               const Tensor& page_table, const Tensor& page_len,
                               const OptionalTensor& page_base, const Tensor& num_pages,
                               const OptionalTensor& cos, const OptionalTensor& sin,
                               int64_t first_layer, int64_t last_layer, int64_t rope_mode,
                               const char* op) {
  GatherChunksParams p{};
  set_bank(&p, kv, kv_scale, first_layer, last_layer, op);
  p.table = make_table(page_table, page_len, page_base, num_pages, cos, sin, rope_mode, kv.size(0),
                       p.page_tokens, p.head_dim, op);
  return p;
}

Tensor gather(GatherChunksParams* p, const Tensor& k, const Tensor& v) {
  for (const auto& [rows, t] : {std::pair(&p->k, k), std::pair(&p->v, v)}) {
    *rows = {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
  }
  const int64_t items = p->table.batch * p->table.max_pages * p->layers * p->num_kv_heads;
  const int64_t item_bytes =
      2 * p->page_tokens * p->head_dim * static_cast<int64_t>(k.element_size());
  p->streamed = items * item_bytes >= kStreamBytes;
  run_items(LYCHEE_ISA_TABLE(GatherChunksFn, gather_chunks).pick(), *p, items);
  return make_valid(p->table, p->page_tokens);
}

std::tuple<Tensor, Tensor, Tensor> gather_chunks_cpu(
    const Tensor& kv, const OptionalTensor& kv_scale, const Tensor& page_table,
    const Tensor& page_len, const OptionalTensor& page_base, const Tensor& num_pages,
    const OptionalTensor& cos, const OptionalTensor& sin, int64_t first_layer, int64_t last_layer,
    int64_t rope_mode, ScalarType out_dtype) {
  const char* op = "gather_chunks";
  GatherChunksParams p = make_params(kv, kv_scale, page_table, page_len, page_base, num_pages, cos,
                                     sin, first_layer, last_layer, rope_mode, op);
  p.dtype = io_dtype(out_dtype, op, "out_dtype");
  const std::vector<int64_t> sizes{p.layers, p.table.batch, p.num_kv_heads,
                                   p.table.max_pages * p.page_tokens, p.head_dim};
  Tensor k = new_output(sizes, out_dtype), v = new_output(sizes, out_dtype);
  for (const Tensor& t : {k, v}) prefer_huge_pages(t);
  Tensor valid = gather(&p, k, v);
  return {k, v, valid};
}

Tensor gather_chunks_write_cpu(const Tensor& k, const Tensor& v, const Tensor& kv,
                               const OptionalTensor& kv_scale, const Tensor& page_table,
                               const Tensor& page_len, const OptionalTensor& page_base,
                               const Tensor& num_pages, const OptionalTensor& cos,
                               const OptionalTensor& sin, int64_t first_layer, int64_t last_layer,
                               int64_t rope_mode) {
  const char* op = "gather_chunks_";
  GatherChunksParams p = make_params(kv, kv_scale, page_table, page_len, page_base, num_pages, cos,
                                     sin, first_layer, last_layer, rope_mode, op);
  p.dtype = io_dtype(k, op, "k");
  const int64_t tokens = p.table.max_pages * p.page_tokens;
  for (const auto& [t, name] : {std::pair(k, "k"), std::pair(v, "v")}) {
    check_cpu(t, op, name);
    check_shape(t, {p.layers, p.table.batch, p.num_kv_heads, -1, p.head_dim}, op, name);
    check(t.size(3) >= tokens, op, name, "room for " + std::to_string(tokens) + " tokens",
          std::to_string(t.size(3)));
    check_dtype(t, k.scalar_type(), op, name);
    check_last_dim_contiguous(t, op, name);
  }
  return gather(&p, k, v);
}

// The entries of the table that read each page: fills `readers`, returns where each page's begin.
std::vector<int64_t> list_readers(const PageTable& t, int64_t bank_pages,
                                  std::vector<int64_t>* readers) {
  std::vector<int64_t> begin(bank_pages + 1);
  const auto for_each_entry = [&](const auto& visit) {
    for (int64_t b = 0; b < t.batch; ++b) {
      for (int64_t i = 0; i < t.num_pages[b]; ++i) visit(b * t.max_pages + i);
    }
  };
  for_each_entry([&](int64_t entry) { ++begin[t.page[entry] + 1]; });
  for (int64_t page = 0; page < bank_pages; ++page) begin[page + 1] += begin[page];
  readers->resize(begin[bank_pages]);
  std::vector<int64_t> next(begin);
  for_each_entry([&](int64_t entry) { (*readers)[next[t.page[entry]]++] = entry; });
  return begin;
}

Tensor gather_chunks_bwd_cpu(const Tensor& dk, const Tensor& dv, const Tensor& page_table,
                             const Tensor& page_len, const OptionalTensor& page_base,
                             const Tensor& num_pages, const OptionalTensor& cos,
                             const OptionalTensor& sin, int64_t bank_pages, int64_t bank_layers,
                             int64_t first_layer, int64_t page_tokens, int64_t rope_mode,
                             ScalarType bank_dtype) {
  const char* op = "gather_chunks_bwd";
  GatherChunksBwdParams p{};
  check_shape(dk, {-1, -1, -1, -1, -1}, op, "dk");
  check_shape(dv, {dk.size(0), dk.size(1), dk.size(2), dk.size(3), dk.size(4)}, op, "dv");
  check_dtype(dv, dk.scalar_type(), op, "dv");
  for (const auto& [t, name] : {std::pair(dk, "dk"), std::pair(dv, "dv")}) {
    check_cpu(t, op, name);
    check_contiguous(t, op, name);
  }
  check_range(bank_pages, 0, INT32_MAX, op, "bank_pages");
  check_range(page_tokens, 0, INT32_MAX, op, "page_tokens");
  p.layers = dk.size(0), p.num_kv_heads = dk.size(2), p.head_dim = dk.size(4);
  p.page_tokens = page_tokens, p.bank_layers = bank_layers, p.first_layer = first_layer;
  check_head_dim(p.head_dim, op, "dk");
  check_range(first_layer, 0, bank_layers - p.layers, op, "first_layer");
  p.dtype = io_dtype(dk, op, "dk");
  p.bank_dtype = io_dtype(bank_dtype, op, "bank_dtype");
  p.table = make_table(page_table, page_len, page_base, num_pages, cos, sin, rope_mode, bank_pages,
                       page_tokens, p.head_dim, op);
  const int64_t tokens = p.table.max_pages * page_tokens;
  check_shape(dk, {-1, p.table.batch, -1, tokens, -1}, op, "dk");
  p.dk = dk.const_data_ptr();
  p.dv = dv.const_data_ptr();
  std::vector<int64_t> readers;
  const std::vector<int64_t> begin = list_readers(p.table, bank_pages, &readers);
  p.readers = readers.data();
  p.reader_begin = begin.data();
  Tensor dkv =
      new_output({bank_pages, bank_layers, p.num_kv_heads, 2, page_tokens, p.head_dim}, bank_dtype);
  p.dkv = dkv.mutable_data_ptr();
  run_items(LYCHEE_ISA_TABLE(GatherChunksBwdFn, gather_chunks_bwd).pick(), p,
            bank_pages * bank_layers * p.num_kv_heads);
  return dkv;
}

}  // namespace
}  // namespace lychee

STABLE_TORCH_LIBRARY_IMPL(lychee, CPU, m) {
  m.impl("gather_chunks", TORCH_BOX(&lychee::gather_chunks_cpu));
  m.impl("gather_chunks_", TORCH_BOX(&lychee::gather_chunks_write_cpu));
  m.impl("gather_chunks_bwd", TORCH_BOX(&lychee::gather_chunks_bwd_cpu));
}
