// SPDX-License-Identifier: Apache-2.0
// The backward of gather_chunks on a GPU: each page of the bank sums the gradients of everyone who
// read it, in the order of the table, so that the result is the same every time. Torch-free.
#pragma once

#include "cuda/gather_chunks.cuh"

namespace lychee::cuda {

struct GatherChunksBwdParams {
  lychee::GatherChunksBwdParams rows;
  GatherPlan plan;
};

constexpr int kMostReaders = 512;  // that are listed at once

// In shared memory: some of the table's entries that read the block's page, in order.
struct ReaderList {
  int64_t entry[kMostReaders];
  int found[kGatherThreads / kLanesPerWarp];
};
static_assert(kMostReaders >= kGatherThreads);

// Entries [begin, end) of the table were searched, `count` of them read the page.
struct Readers {
  int64_t begin, end;
  int count;
};

// Lists the readers of `page` from entry `begin` on until the list is full or the table ends; all
// threads of the block call it.
LYCHEE_DEVICE Readers list_readers(const PageTable& table, int64_t page, int64_t begin,
                                   ReaderList* list) {
  const int lane = threadIdx.x % kLanesPerWarp, warp = threadIdx.x / kLanesPerWarp;
  const int64_t entries = table.batch * table.max_pages;
  Readers readers{begin, begin, 0};
  while (readers.end < entries && readers.count + kGatherThreads <= kMostReaders) {
    const int64_t entry = readers.end + threadIdx.x;
    const bool reads = entry < entries &&
                       entry_in_use(table, entry / table.max_pages, entry % table.max_pages) &&
                       table.page[entry] == page;
    const unsigned votes = __ballot_sync(~0u, reads);
    __syncthreads();  // nobody needs the list, or the last counts, any longer
    if (lane == 0) list->found[warp] = __popc(votes);
    __syncthreads();
    int before = readers.count;
    for (int w = 0; w < kGatherThreads / kLanesPerWarp; ++w) {
      if (w < warp) before += list->found[w];
      readers.count += list->found[w];
    }
    if (reads) list->entry[before + __popc(votes & ((1u << lane) - 1))] = entry;
    readers.end += kGatherThreads;
  }
  __syncthreads();
  return readers;
}

// Adds what the listed readers contribute to one row of a page: keys rotated backwards.
template <class T, bool kFast, int kWidth>
LYCHEE_DEVICE void add_readers(const lychee::GatherChunksBwdParams& p, const ReaderList& list,
                               int count, const T* grad, bool rotated, int64_t head_row,
                               const GatherPlace& place, float (&sum1)[kWidth],
                               float (&sum2)[kWidth]) {
  const PageTable& table = p.table;
  const int64_t half = p.head_dim / 2;
  for (int r = 0; r < count; ++r) {
    const int64_t entry = list.entry[r];
    if (place.token >= table.len[entry]) continue;
    const int64_t b = entry / table.max_pages, i = entry % table.max_pages;
    const int64_t layer = head_row / p.num_kv_heads, head = head_row % p.num_kv_heads;
    const int64_t row = ((layer * table.batch + b) * p.num_kv_heads + head) * table.max_pages + i;
    const T* in = grad + (row * p.page_tokens + place.token) * p.head_dim + place.d;
    float x1[kWidth], x2[kWidth];
    to_float(load_run<kFast, kWidth>(in), x1);
    to_float(load_run<kFast, kWidth>(in + half), x2);
    if (rotated) {
      rotate_back(load_angles<kFast, kWidth>(table.cos, table.sin, table.table_rows, half,
                                             table.base[entry] + place.token, place.d),
                  x1, x2);
    }
    for (int k = 0; k < kWidth; ++k) sum1[k] += x1[k], sum2[k] += x2[k];
  }
}

template <class T, class Stored, bool kFast>
__global__ void __launch_bounds__(kGatherThreads, 6)
    gather_chunks_bwd_kernel(const GatherChunksBwdParams p) {
  LYCHEE_SHARED(shared);
  ReaderList* list = reinterpret_cast<ReaderList*>(shared);
  constexpr int kWidth = kRunWidth<T, kFast>;
  const lychee::GatherChunksBwdParams& rows = p.rows;
  const int64_t half = rows.head_dim / 2, entries = rows.table.batch * rows.table.max_pages;
  const int64_t bank_heads = rows.bank_layers * rows.num_kv_heads;
  const GatherPlace place = gather_place(p.plan, bank_heads, kWidth);
  const bool works = place.token < rows.page_tokens && place.d < half;
  Readers readers{-1, -1, 0};
  for (int64_t at = place.first_head; at < place.heads; ++at) {
    const int64_t layer = at / rows.num_kv_heads - rows.first_layer;
    for (int part = 0; part < 2; ++part) {
      float sum1[kWidth] = {}, sum2[kWidth] = {};
      const bool gathered = layer >= 0 && layer < rows.layers;
      for (int64_t begin = 0; gathered && begin < entries; begin = readers.end) {
        // as a rule all readers fit, and are listed once
        if (readers.begin != begin) readers = list_readers(rows.table, place.page, begin, list);
        if (!works) continue;
        add_readers<T, kFast>(rows, *list, readers.count,
                              static_cast<const T*>(part == 0 ? rows.dk : rows.dv),
                              part == 0 && rows.table.cos != nullptr,
                              at - rows.first_layer * rows.num_kv_heads, place, sum1, sum2);
      }
      if (!works) continue;
      Stored* out = static_cast<Stored*>(rows.dkv) +
                    (((place.page * bank_heads + at) * 2 + part) * rows.page_tokens + place.token) *
                        rows.head_dim +
                    place.d;
      store_run<kFast>(out, from_float<Stored>(sum1));
      store_run<kFast>(out + half, from_float<Stored>(sum2));
    }
  }
}

}  // namespace lychee::cuda
