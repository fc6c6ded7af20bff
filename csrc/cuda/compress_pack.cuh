// SPDX-License-Identifier: Apache-2.0
// compress_pack on a GPU: one pass that rotates, interleaves and keeps memory rows, in new tensors
// or in the pages of a bank; and write_memory. Torch-free; strides are in elements.
#pragma once

#include "compress_pack_params.h"
#include "cuda/compress_pack_plan.h"
#include "cuda/device.cuh"
#include "cuda/row_vector.cuh"

namespace lychee::cuda {

struct CompressPackParams {
  lychee::CompressPackParams rows;
  SlotTable slots;  // used where rows.bank.data is not null
  PackPlan plan;
};

// Where a row stands in both orders.
struct RowPlace {
  int64_t batch;
  int64_t index;    // in interleaved order
  int64_t segment;  // in segment order
  int64_t memory;   // among the memory rows of its batch entry, or -1
};

LYCHEE_DEVICE RowPlace place_of_row(const RowOrder& order, int64_t row) {
  const int64_t rows = order.window + order.memory, b = row / rows, s = row % rows;
  const int64_t j = s / (order.ratio + 1);
  if (s % (order.ratio + 1) == order.ratio) {
    return {b, s, order.batch * order.window + b * order.memory + j, j};
  }
  return {b, s, b * order.window + s - j, -1};
}

// `row` counts memory rows only.
LYCHEE_DEVICE RowPlace place_of_memory_row(const RowOrder& order, int64_t row) {
  const int64_t b = row / order.memory, j = row % order.memory;
  return {b, j * (order.ratio + 1) + order.ratio, order.batch * order.window + row, j};
}

template <bool kFast, int kWidth>
LYCHEE_DEVICE Angles<kWidth> load_row_angles(const RowOrder& order, const RowPlace& place,
                                             int64_t d) {
  const int64_t position =
      order.positions == nullptr
          ? order.pos0 + place.index
          : order.positions[place.batch * (order.window + order.memory) + place.index];
  return load_angles<kFast, kWidth>(order.cos, order.sin, order.table_rows, order.half, position,
                                    d);
}

// A place in the bank; page is -1 where nothing is written.
struct BankPlace {
  int64_t page, token;
};

// The place of memory row j of batch entry b; all lanes of a warp ask together. A slot outside of
// the table or the bank is not written.
LYCHEE_DEVICE BankPlace find_place(const SlotTable& slots, int64_t memory, int64_t page_tokens,
                                   int64_t b, int64_t j) {
  int64_t slot = slots.first[b];
  if (slot < 0) return {-1, 0};
  if (slots.valid == nullptr) {
    slot += j;
  } else {
    const bool* valid = slots.valid + b * memory;
    if (!valid[j]) return {-1, 0};
    int before = 0;
#pragma unroll 8
    for (int64_t i = threadIdx.x % kLanesPerWarp; i < j; i += kLanesPerWarp) before += valid[i];
    for (int delta = kLanesPerWarp / 2; delta > 0; delta /= 2) {
      before += __shfl_xor_sync(~0u, before, delta);
    }
    slot += before;
  }
  const int64_t entry = slot / page_tokens;
  if (entry >= slots.max_pages) return {-1, 0};
  const int64_t page = slots.page[b * slots.max_pages + entry];
  return {page < slots.bank_pages ? page : -1, slot % page_tokens};
}

// What one group of lanes handles in a step: a head of a row. `part` is -1 for queries, 0 for keys,
// 1 for values. Where there is nothing to do the pointers still point to global memory: a null
// among them would turn every access into a generic one.
template <class T>
struct HeadOfRow {
  const T* in;
  T* out;
  int head, part;
  bool works;  // else there is nothing to do
};

// Stores the elements (x1, x2) of the row's head, scaled as the bank wants it; all lanes of the
// warp call this, those without work with zeros.
template <bool kFast, class Stored, class T, int kWidth>
LYCHEE_DEVICE void store_in_bank(const CompressPackParams& p, const BankPlace& place,
                                 const HeadOfRow<T>& unit, int64_t d, const float (&x1)[kWidth],
                                 const float (&x2)[kWidth]) {
  const BankWriter& bank = p.rows.bank;
  const bool wanted = unit.works && unit.part >= 0;
  constexpr float kSmallestAmax = 1e-30f;  // a row below it is stored as zeros with scale 0
  float factor = 1.0f;
  if constexpr (sizeof(Stored) == 1) {
    constexpr float kLevel = std::is_same_v<Stored, int8_t> ? 127.0f : 448.0f;
    float amax = 0.0f;
    for (int i = 0; i < kWidth; ++i) amax = fmaxf(amax, fmaxf(fabsf(x1[i]), fabsf(x2[i])));
    for (int delta = p.plan.lanes / 2; delta > 0; delta /= 2) {
      amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, delta));
    }
    const bool empty = amax < kSmallestAmax;
    factor = empty ? 0.0f : kLevel / amax;
    if (wanted && d == 0) {
      bank.scale[place.page * bank.scale_page_stride + unit.head * bank.scale_head_stride +
                 unit.part * bank.scale_part_stride + place.token] = empty ? 0.0f : amax / kLevel;
    }
  }
  if (!wanted) return;
  Stored* out = static_cast<Stored*>(bank.data) + place.page * bank.page_stride +
                unit.head * bank.head_stride + unit.part * bank.part_stride +
                place.token * bank.token_stride + d;
  float scaled1[kWidth], scaled2[kWidth];
  for (int i = 0; i < kWidth; ++i) scaled1[i] = x1[i] * factor, scaled2[i] = x2[i] * factor;
  store_run<kFast>(out, from_float<Stored>(scaled1));
  store_run<kFast>(out + p.rows.head_dim / 2, from_float<Stored>(scaled2));
}

template <bool kFast, class T, int kWidth>
LYCHEE_DEVICE void write_to_bank(const CompressPackParams& p, const BankPlace& place,
                                 const HeadOfRow<T>& unit, int64_t d, const float (&x1)[kWidth],
                                 const float (&x2)[kWidth]) {
  switch (p.rows.bank.dtype) {
    case Dtype::kInt8:
      return store_in_bank<kFast, int8_t>(p, place, unit, d, x1, x2);
    case Dtype::kFloat8E4M3:
      return store_in_bank<kFast, Float8E4M3>(p, place, unit, d, x1, x2);
    case Dtype::kBFloat16:
      return store_in_bank<kFast, BFloat16>(p, place, unit, d, x1, x2);
    case Dtype::kFloat16:
      return store_in_bank<kFast, Float16>(p, place, unit, d, x1, x2);
    default:
      return store_in_bank<kFast, float>(p, place, unit, d, x1, x2);
  }
}

// Heads are counted over q, then k, then v.
template <class T>
LYCHEE_DEVICE HeadOfRow<T> find_head(const CompressPackParams& p, const RowPlace& place, int head,
                                     int64_t d) {
  const lychee::CompressPackParams& rows = p.rows;
  const int64_t n = rows.order.window + rows.order.memory, m = rows.order.memory;
  const int num_heads = static_cast<int>(rows.num_heads);
  const int num_kv_heads = static_cast<int>(rows.num_kv_heads);
  HeadOfRow<T> unit{static_cast<const T*>(rows.q), static_cast<T*>(rows.q_rot), 0, -1, false};
  if (d >= rows.head_dim / 2) return unit;
  if (head < num_heads) {
    int64_t source = place.segment, target = place.index, queries = n;
    if (rows.memory_queries_only) {
      if (place.memory < 0) return unit;
      source = place.batch * m + place.memory, target = place.memory, queries = m;
    }
    unit.works = true;
    unit.in =
        static_cast<const T*>(rows.q) + source * rows.q_row_stride + head * rows.q_head_stride + d;
    unit.out = static_cast<T*>(rows.q_rot) +
               ((place.batch * num_heads + head) * queries + target) * rows.head_dim + d;
    return unit;
  }
  unit.head = head - num_heads;
  unit.part = unit.head >= num_kv_heads;
  if (unit.part) unit.head -= num_kv_heads;
  if (unit.head >= num_kv_heads) return unit;
  const bool is_key = unit.part == 0;
  unit.works = true;
  unit.in = static_cast<const T*>(is_key ? rows.k : rows.v) +
            place.segment * (is_key ? rows.k_row_stride : rows.v_row_stride) +
            unit.head * (is_key ? rows.k_head_stride : rows.v_head_stride) + d;
  unit.out = static_cast<T*>(is_key ? rows.k_rot : rows.v_out) +
             ((place.batch * num_kv_heads + unit.head) * n + place.index) * rows.head_dim + d;
  return unit;
}

// Keeps a memory row's key or value as it is.
template <bool kFast, class T, int kWidth>
LYCHEE_DEVICE void keep_memory(const lychee::CompressPackParams& p, const RowPlace& place,
                               const HeadOfRow<T>& unit, int64_t d, const Run<T, kWidth>& low,
                               const Run<T, kWidth>& high) {
  T* memory = static_cast<T*>(unit.part == 0 ? p.mem_k : p.mem_v);
  if (memory == nullptr || unit.part < 0) return;
  const int64_t row = (place.batch * p.num_kv_heads + unit.head) * p.order.memory + place.memory;
  store_run<kFast>(memory + row * p.head_dim + d, low);
  store_run<kFast>(memory + row * p.head_dim + p.head_dim / 2 + d, high);
}

template <class T, bool kFast>
__global__ void __launch_bounds__(kPackThreads, 5)
    compress_pack_kernel(const CompressPackParams p) {
  constexpr int kWidth = kRunWidth<T, kFast>;
  const int64_t half = p.rows.head_dim / 2;
  const RowOrder& order = p.rows.order;
  const int64_t row = int64_t{blockIdx.x} * kPackWarps + threadIdx.x / kLanesPerWarp;
  if (row >= order.batch * (order.window + order.memory)) return;
  const RowPlace place = place_of_row(order, row);
  const int lane = threadIdx.x % kLanesPerWarp, group = lane / p.plan.lanes;
  const int groups = kLanesPerWarp / p.plan.lanes;
  const int64_t d = lane % p.plan.lanes * kWidth;
  const int first = static_cast<int>(blockIdx.y) * p.plan.steps * groups;
  const int end = first + p.plan.steps * groups;

  BankPlace bank{-1, 0};
  if (p.rows.bank.data != nullptr && place.memory >= 0 && end > p.rows.num_heads) {
    bank = find_place(p.slots, order.memory, p.rows.bank.page_tokens, place.batch, place.memory);
  }
  Angles<kWidth> angles{};
  if (d < half) angles = load_row_angles<kFast, kWidth>(order, place, d);

  for (int head = first; head < end; head += kPackUnroll * groups) {
    HeadOfRow<T> units[kPackUnroll];
    Run<T, kWidth> low[kPackUnroll], high[kPackUnroll];
#pragma unroll
    for (int u = 0; u < kPackUnroll; ++u) {
      units[u] = find_head<T>(p, place, head + u * groups + group, d);
      if (!units[u].works) continue;
      const T* in = in_global_memory(units[u].in);
      low[u] = load_run<kFast, kWidth>(in);
      high[u] = load_run<kFast, kWidth>(in + half);
    }
#pragma unroll
    for (int u = 0; u < kPackUnroll; ++u) {
      float x1[kWidth] = {}, x2[kWidth] = {};
      if (units[u].works) {
        to_float(low[u], x1);
        to_float(high[u], x2);
      }
      // the same for all lanes: they share the row
      if (bank.page >= 0) write_to_bank<kFast>(p, bank, units[u], d, x1, x2);
      if (!units[u].works) continue;
      if (place.memory >= 0) keep_memory<kFast>(p.rows, place, units[u], d, low[u], high[u]);
      if (units[u].part != 1) {
        rotate(angles, x1, x2);
        low[u] = from_float<T>(x1), high[u] = from_float<T>(x2);
      }
      T* out = in_global_memory(units[u].out);
      store_run<kFast>(out, low[u]);
      store_run<kFast>(out + half, high[u]);
    }
  }
}

// k and v hold memory rows only, and nothing but the bank is written.
template <class T, bool kFast>
__global__ void __launch_bounds__(kPackThreads) write_memory_kernel(const CompressPackParams p) {
  constexpr int kWidth = kRunWidth<T, kFast>;
  const int64_t half = p.rows.head_dim / 2, memory = p.rows.order.memory;
  const int64_t row = int64_t{blockIdx.x} * kPackWarps + threadIdx.x / kLanesPerWarp;
  if (row >= p.rows.order.batch * memory) return;
  const BankPlace place =
      find_place(p.slots, memory, p.rows.bank.page_tokens, row / memory, row % memory);
  if (place.page < 0) return;
  const int lane = threadIdx.x % kLanesPerWarp, groups = kLanesPerWarp / p.plan.lanes;
  const int64_t d = lane % p.plan.lanes * kWidth;
  const int first = static_cast<int>(blockIdx.y) * p.plan.steps * groups;
  for (int step = 0; step < p.plan.steps; ++step) {
    HeadOfRow<T> unit{static_cast<const T*>(p.rows.k), nullptr, 0, 0, false};
    unit.head = first + step * groups + lane / p.plan.lanes;
    unit.part = unit.head >= p.rows.num_kv_heads;
    if (unit.part) unit.head -= static_cast<int>(p.rows.num_kv_heads);
    float x1[kWidth] = {}, x2[kWidth] = {};
    if (d < half && unit.head < p.rows.num_kv_heads) {
      unit.works = true;
      unit.in = unit.part ? static_cast<const T*>(p.rows.v) + row * p.rows.v_row_stride +
                                unit.head * p.rows.v_head_stride + d
                          : static_cast<const T*>(p.rows.k) + row * p.rows.k_row_stride +
                                unit.head * p.rows.k_head_stride + d;
      to_float(load_run<kFast, kWidth>(unit.in), x1);
      to_float(load_run<kFast, kWidth>(unit.in + half), x2);
    }
    write_to_bank<kFast>(p, place, unit, d, x1, x2);
  }
}

}  // namespace lychee::cuda
