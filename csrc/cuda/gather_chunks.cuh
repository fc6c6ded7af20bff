// SPDX-License-Identifier: Apache-2.0
// gather_chunks on a GPU: pages of all layers to contiguous keys and values, dequantised and
// rotated, in one launch. Torch-free; strides are in elements.
#pragma once

#include "cuda/device.cuh"
#include "cuda/gather_chunks_plan.h"
#include "cuda/row_vector.cuh"
#include "gather_chunks_params.h"

namespace lychee::cuda {

struct GatherChunksParams {
  lychee::GatherChunksParams rows;
  bool* valid;  // [B, max_pages * page_tokens]
  GatherPlan plan;
};

// Whether entry i of row b holds a page: beyond the row's count the table is never read.
LYCHEE_DEVICE bool entry_in_use(const PageTable& table, int64_t b, int64_t i) {
  return i < table.num_pages[b];
}

// What a thread reads of a row: two runs, half a row apart, and the row's scale.
template <class Stored, int kWidth>
struct StoredRow {
  Run<Stored, kWidth> low, high;
  float scale;
};

template <bool kFast, int kWidth, class Stored>
LYCHEE_DEVICE StoredRow<Stored, kWidth> load_row(const Stored* in, const float* scale,
                                                 int64_t half) {
  return {load_run<kFast, kWidth>(in), load_run<kFast, kWidth>(in + half),
          sizeof(Stored) == 1 ? *scale : 1.0f};
}

// Dequantises, rotates if wanted, and rounds once. Where no value changes, none is converted.
template <bool kFast, class T, class Stored, int kWidth>
LYCHEE_DEVICE void store_row(const StoredRow<Stored, kWidth>& row, T* out, int64_t half,
                             bool rotated, const Angles<kWidth>& angles) {
  if constexpr (std::is_same_v<T, Stored>) {
    if (!rotated) {
      store_run<kFast>(out, row.low);
      store_run<kFast>(out + half, row.high);
      return;
    }
  }
  float x1[kWidth], x2[kWidth];
  to_float(row.low, x1);
  to_float(row.high, x2);
  if constexpr (sizeof(Stored) == 1) {
    for (int i = 0; i < kWidth; ++i) x1[i] *= row.scale, x2[i] *= row.scale;
  }
  if (rotated) rotate(angles, x1, x2);
  store_run<kFast>(out, from_float<T>(x1));
  store_run<kFast>(out + half, from_float<T>(x2));
}

template <bool kFast, int kWidth, class T>
LYCHEE_DEVICE void fill_row(T* out, int64_t half, float value) {
  const Run<T, kWidth> run = filled_run<T, kWidth>(value);
  store_run<kFast>(out, run);
  store_run<kFast>(out + half, run);
}

// What a block, and in it a thread, handles.
struct GatherPlace {
  int64_t page;               // entry of the table, or page of the bank
  int64_t first_head, heads;  // (layer, head) pairs: the first, and one past the last
  int64_t token, d;
};

LYCHEE_DEVICE GatherPlace gather_place(const GatherPlan& plan, int64_t all_heads, int width) {
  const int64_t block = blockIdx.x, page = block / (plan.head_blocks * plan.token_blocks);
  const int64_t first = block / plan.token_blocks % plan.head_blocks * plan.heads;
  return {page, first, min(first + plan.heads, all_heads),
          block % plan.token_blocks * plan.tokens + threadIdx.x / plan.lanes,
          int64_t{threadIdx.x % plan.lanes * width}};
}

template <class T, class Stored, bool kFast>
__global__ void __launch_bounds__(kGatherThreads, 6)
    gather_chunks_kernel(const GatherChunksParams p) {
  constexpr int kWidth = kRunWidth<T, kFast>;
  const lychee::GatherChunksParams& rows = p.rows;
  const PageTable& table = rows.table;
  const int64_t half = rows.head_dim / 2;
  const GatherPlace place = gather_place(p.plan, rows.layers * rows.num_kv_heads, kWidth);
  if (place.token >= rows.page_tokens || place.d >= half) return;
  const int64_t b = place.page / table.max_pages, i = place.page % table.max_pages;
  const bool filled = entry_in_use(table, b, i) && place.token < table.len[place.page];
  const int64_t token = i * rows.page_tokens + place.token;
  if (place.first_head == 0 && place.d == 0) {
    p.valid[b * table.max_pages * rows.page_tokens + token] = filled;
  }
  // a page outside of the bank is not read: its tokens become NaN
  const int64_t page = filled ? table.page[place.page] : -1;
  const bool readable = page >= 0 && page < table.bank_pages;
  Angles<kWidth> angles{};
  if (readable && table.cos != nullptr) {
    angles = load_angles<kFast, kWidth>(table.cos, table.sin, table.table_rows, half,
                                        table.base[place.page] + place.token, place.d);
  }
  const Stored* in = static_cast<const Stored*>(rows.kv) + page * rows.page_stride +
                     place.token * rows.token_stride + place.d;
  const float* scale = rows.kv_scale + page * rows.scale_page_stride + place.token;
  T* k = static_cast<T*>(rows.k.data) + b * rows.k.batch_stride + token * rows.k.token_stride;
  T* v = static_cast<T*>(rows.v.data) + b * rows.v.batch_stride + token * rows.v.token_stride;

  for (int64_t at = place.first_head; at < place.heads; ++at) {
    const int64_t layer = at / rows.num_kv_heads, head = at % rows.num_kv_heads;
    T* k_out = k + layer * rows.k.layer_stride + head * rows.k.head_stride + place.d;
    T* v_out = v + layer * rows.v.layer_stride + head * rows.v.head_stride + place.d;
    if (readable) {
      const Stored* from = in + layer * rows.layer_stride + head * rows.head_stride;
      const float* factor = scale + layer * rows.scale_layer_stride + head * rows.scale_head_stride;
      // both are under way before the first is stored
      const auto key = load_row<kFast, kWidth>(from, factor, half);
      const auto value =
          load_row<kFast, kWidth>(from + rows.part_stride, factor + rows.scale_part_stride, half);
      store_row<kFast>(key, k_out, half, table.cos != nullptr, angles);
      store_row<kFast>(value, v_out, half, false, angles);
    } else {
      const float value = filled ? not_a_number() : 0.0f;
      fill_row<kFast, kWidth>(k_out, half, value);
      fill_row<kFast, kWidth>(v_out, half, value);
    }
  }
}

}  // namespace lychee::cuda
