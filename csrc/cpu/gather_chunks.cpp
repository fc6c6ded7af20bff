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

#include "cpu/isa.h"
#include "gather_chunks_checks.h"
#include "stable.h"

namespace lychee {
namespace {

// Elements a thread draws at a time: some tens of microseconds of work.
constexpr int64_t kElementsPerTask = 1 << 17;
// Keys and values this large are written past the caches: whoever reads them comes too late to find
// them there.
constexpr int64_t kStreamBytes = 1 << 25;

// Every entry in use lies inside the bank, and its tokens inside the tables.
void check_entries(const PageTable& t, int64_t page_tokens, const char* op) {
  for (int64_t b = 0; b < t.batch; ++b) {
    check_range(t.num_pages[b], 0, t.max_pages, op, "num_pages");
    for (int64_t entry = b * t.max_pages; entry < b * t.max_pages + t.num_pages[b]; ++entry) {
      check_range(t.page[entry], 0, t.bank_pages - 1, op, "page_table");
      check_range(t.len[entry], 0, page_tokens, op, "page_len");
      if (t.base == nullptr) continue;
      check_range(t.base[entry], 0, t.table_rows - t.len[entry], op, "page_base");
    }
  }
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
  GatherChunksParams p = gather_params(kv, kv_scale, page_table, page_len, page_base, num_pages,
                                       cos, sin, first_layer, last_layer, rope_mode, check_cpu, op);
  check_entries(p.table, p.page_tokens, op);
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
  GatherChunksParams p = gather_params(kv, kv_scale, page_table, page_len, page_base, num_pages,
                                       cos, sin, first_layer, last_layer, rope_mode, check_cpu, op);
  check_entries(p.table, p.page_tokens, op);
  p.dtype = io_dtype(k, op, "k");
  check_room(p, k, v, check_cpu, op);
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
  GatherChunksBwdParams p = gather_bwd_params(dk, dv, page_table, page_len, page_base, num_pages,
                                              cos, sin, bank_pages, bank_layers, first_layer,
                                              page_tokens, rope_mode, bank_dtype, check_cpu, op);
  check_entries(p.table, page_tokens, op);
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
