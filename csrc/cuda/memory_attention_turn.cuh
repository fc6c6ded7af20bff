// SPDX-License-Identifier: Apache-2.0
// Rotation of page keys by their place in a tile, for memory_attention with few query rows.
//
// R(p) q . R(base + j) k = (R(p - base) q) . (R(j) k): queries come rotated by p and are turned
// back by `base` once per tile; keys are turned by j < 64, from a table in shared memory. The pair
// (d, d + D / 2) of a rotation lies in one lane: in k-steps s and s + D / 32 of a fragment.
#pragma once

#include <type_traits>

#include "cuda/memory_attention_tiles.cuh"

namespace lychee::cuda {

// First of the two neighbouring dimensions in half `half` of k-step `step` that lane `member` of
// four holds. With 8-bit elements a lane holds four neighbours; queries follow the same order.
template <bool kQuantised>
LYCHEE_DEVICE int fragment_dimension(int step, int half, int member) {
  return step * 16 + (kQuantised ? member * 4 + half * 2 : half * 8 + member * 2);
}

// Where the table has a lane's four cosines and sines of a key and step: 16 bytes. Odd rows are
// shifted by 64, so that neighbours share no banks.
template <int D>
LYCHEE_DEVICE int turn_offset(int key, int step, int member) {
  return key * (D * 2) + (((step * 4 + member) ^ (key & 1) << 2) << 4);
}

// Fills the table, D * 2 bytes per key of a tile. Row j holds the rotation at position j relative
// to that at 0, so that the tables may start anywhere, and may be scaled; times `factor`.
template <int D, bool kQuantised>
LYCHEE_DEVICE void fill_turns(const MemoryAttentionParams& p, unsigned char* table, float factor) {
  constexpr int kChunks = D / 8;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  const int step = chunk / 4, member = chunk % 4;
  const int d[2] = {fragment_dimension<kQuantised>(step, 0, member),
                    fragment_dimension<kQuantised>(step, 1, member)};
  for (int key = static_cast<int>(threadIdx.x) / kChunks; key < kTileKeys;
       key += kAttentionThreads / kChunks) {
    const int row = min(key, p.positions - 1) * (D / 2);
    uint32_t cosines[2], sines[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 c0 = *reinterpret_cast<const float2*>(p.cos + d[half]);
      const float2 s0 = *reinterpret_cast<const float2*>(p.sin + d[half]);
      const float2 c = *reinterpret_cast<const float2*>(p.cos + row + d[half]);
      const float2 s = *reinterpret_cast<const float2*>(p.sin + row + d[half]);
      const float x = factor / (c0.x * c0.x + s0.x * s0.x);
      const float y = factor / (c0.y * c0.y + s0.y * s0.y);
      cosines[half] = pack_f16((c.x * c0.x + s.x * s0.x) * x, (c.y * c0.y + s.y * s0.y) * y);
      sines[half] = pack_f16((s.x * c0.x - c.x * s0.x) * x, (s.y * c0.y - c.y * s0.y) * y);
    }
    *reinterpret_cast<uint4*>(table + turn_offset<D>(key, step, member)) =
        uint4{cosines[0], cosines[1], sines[0], sines[1]};
  }
}

// Pairs of two keys' dimensions d and d + D / 2, turned by cosines c and sines s (halves). In fp16
// they stay as they are; bf16 would lose too much.
template <class Compute>
LYCHEE_DEVICE void turn_keys(uint32_t& low, uint32_t& high, uint32_t c, uint32_t s) {
  const uint32_t x = low, y = high;
  if constexpr (std::is_same_v<Compute, Float16>) {
    low = fma_f16x2(x, c, mul_f16x2(negate_f16x2(y), s));
    high = fma_f16x2(y, c, mul_f16x2(x, s));
  } else {
    const float c0 = f16_low(c), c1 = f16_high(c), s0 = f16_low(s), s1 = f16_high(s);
    const float x0 = Pair<Compute>::low(x), x1 = Pair<Compute>::high(x);
    const float y0 = Pair<Compute>::low(y), y1 = Pair<Compute>::high(y);
    low = Pair<Compute>::pack(x0 * c0 - y0 * s0, x1 * c1 - y1 * s1);
    high = Pair<Compute>::pack(y0 * c0 + x0 * s0, y1 * c1 + x1 * s1);
  }
}

// The tables' rows at a position in shared memory: per step 16 cosines, then 16 sines.
constexpr int kTurnStepBytes = 128;
constexpr int turn_bytes(int dim) { return dim / 32 * kTurnStepBytes; }

// Starts copying the tables' rows at `position`. A warp each has the cosines and sines of one step
// for all lanes, so that the warp that turns the queries of a step has copied what it needs.
template <int D>
LYCHEE_DEVICE void copy_turn(unsigned char* shared, const MemoryAttentionParams& p, int position) {
  const int step = static_cast<int>(threadIdx.x) >> 5, lane = static_cast<int>(threadIdx.x) & 31;
  if (step >= D / 32 || lane >= 8) return;
  const float* const table = lane < 4 ? p.cos : p.sin;
  copy_async(shared + step * kTurnStepBytes + lane * 16,
             table + static_cast<int64_t>(position) * (D / 2) + step * 16 + lane % 4 * 4, true);
}

// Pairs of two queries' dimensions d and d + D / 2, turned back by cosines c and sines s.
template <class Query, class Compute>
LYCHEE_DEVICE void turn_queries_back(uint32_t& low, uint32_t& high, float2 c, float2 s) {
  const float x0 = Pair<Query>::low(low), x1 = Pair<Query>::high(low);
  const float y0 = Pair<Query>::low(high), y1 = Pair<Query>::high(high);
  low = Pair<Compute>::pack(x0 * c.x + y0 * s.x, x1 * c.y + y1 * s.y);
  high = Pair<Compute>::pack(y0 * c.x - x0 * s.x, y1 * c.y - x1 * s.y);
}

}  // namespace lychee::cuda
