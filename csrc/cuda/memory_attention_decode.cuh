// SPDX-License-Identifier: Apache-2.0
// memory_attention for few query rows: split keys, the heads of a kv head packed into one 16-row
// tensor-core tile. A split reads pages or the contiguous segment. Each of four warps takes 16 of a
// tile's 64 keys and keeps its own maximum, sum and output; they meet once, at the end.
//
// 8-bit banks are computed in fp16, exact for their elements: the scale of a key multiplies its
// score, that of a value its weight.
#pragma once

#include "cuda/memory_attention_elements.cuh"
#include "cuda/memory_attention_merge.cuh"
#include "cuda/memory_attention_queries.cuh"

namespace lychee::cuda {

// Bytes of shared memory that CUDA keeps of each block.
constexpr int kReservedOfBlock = 1024;

// What reading elements of one type takes in shared memory, in bytes.
template <class Element, int D, bool kRotate>
struct DecodeLayout {
  static constexpr bool kQuantised = sizeof(Element) == 1;
  static constexpr int kRowBytes = D * static_cast<int>(sizeof(Element));
  static constexpr int kTileBytes = kTileKeys * kRowBytes;
  static constexpr int kStages = kQuantised ? 3 : 2;
  static constexpr int kTable = kStages * 2 * kTileBytes;
  static constexpr int kTurn = kTable + (kRotate ? kTileKeys * D * 2 : 0);
  static constexpr int kTurnBytes = kRotate ? turn_bytes(D) : 0;
  static constexpr int kScales = kTurn + kStages * kTurnBytes;
  static constexpr int kScaleBytes = kQuantised ? 2 * kTileKeys * 4 : 0;
  static constexpr int kQueries = kScales + kStages * kScaleBytes;
  static constexpr int kBytes = kQueries + (kRotate && kQuantised ? queries_bytes(D) : 0);
  // Blocks of a multiprocessor that registers are limited for: 168 of them, 128 for four.
  static constexpr int kFitting = LYCHEE_SHARED_OF_MULTIPROCESSOR / (kBytes + kReservedOfBlock);
  static constexpr int kBlocks = !kRotate ? (D == 64 ? 4 : 3) : kFitting < 3 ? kFitting : 3;
};

// Shared memory of a block: for reading pages, the segment, and for the end.
template <class Query, class Element, int D, bool kRotate>
constexpr int64_t decode_shared_bytes(bool has_pages, bool has_segment) {
  int64_t bytes = block_parts_bytes(kAttentionThreads / 32, D);
  const int64_t pages = DecodeLayout<Element, D, kRotate>::kBytes;
  const int64_t segment = DecodeLayout<Query, D, false>::kBytes;
  if (has_pages && pages > bytes) bytes = pages;
  if (has_segment && segment > bytes) bytes = segment;
  return bytes;
}

// A warp's results, as lanes hold them: rows lane / 4 and lane / 4 + 8.
template <int D>
struct DecodeState {
  float out[D / 8][4];
  float maximum[2], sum[2];
};

// Reads tiles of `Element` for queries of `Query`.
template <class Query, class Element, int D, bool kRotate, class Source>
struct DecodePass {
  using Layout = DecodeLayout<Element, D, kRotate>;
  using Compute = std::conditional_t<Layout::kQuantised, Float16, Query>;
  static constexpr bool kQuantised = Layout::kQuantised;
  static constexpr int kSteps = D / 32;  // pairs of k-steps

  const MemoryAttentionParams& p;
  const Source source;
  const DecodeQueries<Query, Element, D, kRotate> queries;
  unsigned char* const shared;
  const int lane, warp, group, member;  // group, member: row and column pair of fragments
  const bool upper;                     // rows 8 .. 15 exist
  int limit[2];                         // last key of the segment that each row sees

  LYCHEE_DEVICE DecodePass(const MemoryAttentionParams& params, const Work& work,
                           unsigned char* memory)
      : p(params),
        source(params, work, sizeof(Element)),
        queries(params, work),
        shared(memory),
        lane(static_cast<int>(threadIdx.x) & 31),
        warp(static_cast<int>(threadIdx.x) >> 5),
        group(lane >> 2),
        member(lane & 3),
        upper(work.rows > 8) {
    for (int r = 0; r < 2; ++r) limit[r] = last_key(p, find_row(p, work, group + r * 8).token);
  }

  LYCHEE_DEVICE unsigned char* stage_keys(int stage) const {
    return shared + stage * 2 * Layout::kTileBytes;
  }

  LYCHEE_DEVICE unsigned char* stage_turn(int stage) const {
    return shared + Layout::kTurn + stage * Layout::kTurnBytes;
  }

  LYCHEE_DEVICE void start_copies(const Tile& tile, int stage) const {
    unsigned char* const keys = stage_keys(stage);
    copy_rows<Layout::kRowBytes>(keys, tile.k, source.k_stride(), tile.keep);
    copy_rows<Layout::kRowBytes>(keys + Layout::kTileBytes, tile.v, source.v_stride(), tile.keep);
    if constexpr (kQuantised) {
      copy_scales(reinterpret_cast<float*>(shared + Layout::kScales + stage * Layout::kScaleBytes),
                  tile, p.scale_part_stride);
    }
    if constexpr (kRotate) {
      copy_turn<D>(stage_turn(stage), p, tile.position);
    }
  }

  // Keys of both k-steps for the warp's two groups of eight keys.
  LYCHEE_DEVICE void load_keys(const unsigned char* keys, int step, uint32_t (&low)[2][2],
                               uint32_t (&high)[2][2]) const {
    const int matrix = lane >> 3;
    if constexpr (kQuantised) {
      const int row = warp * 16 + (matrix & 1) * 8 + (lane & 7);
      const int chunk = step + (matrix >> 1) * kSteps;
      uint32_t raw[4];
      load_matrix(raw, keys + swizzled<Layout::kRowBytes>(row, chunk));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        Halves<Element>::keys(raw[n], low[n][0], low[n][1]);
        Halves<Element>::keys(raw[n + 2], high[n][0], high[n][1]);
      }
    } else {
      const int row = warp * 16 + (matrix >> 1) * 8 + (lane & 7);
      const int chunk = step * 2 + (matrix & 1);
      uint32_t first[4], second[4];
      load_matrix(first, keys + swizzled<Layout::kRowBytes>(row, chunk));
      load_matrix(second, keys + swizzled<Layout::kRowBytes>(row, chunk + D / 16));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        low[i / 2][i % 2] = first[i];
        high[i / 2][i % 2] = second[i];
      }
    }
  }

  // scores[n] is a fragment of the rows by keys n * 8 .. n * 8 + 7 of the warp.
  LYCHEE_DEVICE void compute_scores(int stage, float (&scores)[2][4]) const {
    typename Halves<Element>::NanWatch watch[2];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t low[2][2], high[2][2];
      load_keys(stage_keys(stage), step, low, high);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        watch[n].see(low[n][0]), watch[n].see(low[n][1]);
        watch[n].see(high[n][0]), watch[n].see(high[n][1]);
      }
      uint32_t query_low[4], query_high[4];
      queries.get(stage_turn(stage), shared + Layout::kQueries, step, query_low, query_high);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        if constexpr (kRotate) {
          const uint4 turn = *reinterpret_cast<const uint4*>(
              shared + Layout::kTable + turn_offset<D>(warp * 16 + n * 8 + group, step, member));
          turn_keys<Compute>(low[n][0], high[n][0], turn.x, turn.z);
          turn_keys<Compute>(low[n][1], high[n][1], turn.y, turn.w);
        }
        Pair<Compute>::multiply(scores[n], query_low, low[n]);
        Pair<Compute>::multiply(scores[n], query_high, high[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) watch[n].mark(scores[n]);
  }

  // Scales and masks the scores, then turns them into weights (a fragment for `add_values`), which
  // carry the values' scales; sums leave those out. `keep`: one bit per key of the warp.
  LYCHEE_DEVICE void softmax(int stage, int first_key, uint32_t keep, float (&scores)[2][4],
                             DecodeState<D>& state, uint32_t (&weights)[4]) const {
    float value_scale[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int pair = n * 8 + member * 2;
      constexpr float kFactor = kRotate ? 1.0f : 1.0f / Halves<Element>::kKeyFactor;
      float2 scale{p.scale_log2 * kFactor, p.scale_log2 * kFactor};
      if constexpr (kQuantised) {
        const float* const scales =
            reinterpret_cast<const float*>(shared + Layout::kScales + stage * Layout::kScaleBytes) +
            warp * 16 + pair;
        const float2 k_scale = *reinterpret_cast<const float2*>(scales);
        const float2 v_scale = *reinterpret_cast<const float2*>(scales + kTileKeys);
        scale.x *= k_scale.x, scale.y *= k_scale.y;
        value_scale[n][0] = keep >> pair & 1 ? v_scale.x * kValueBoost : 0.0f;
        value_scale[n][1] = keep >> (pair + 1) & 1 ? v_scale.y * kValueBoost : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = pair + i % 2;
        bool seen = keep >> key & 1;
        if constexpr (Source::kSegment) seen = seen && first_key + key <= limit[i / 2];
        scores[n][i] = seen ? scores[n][i] * (i % 2 ? scale.y : scale.x) : kMinusInfinity;
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      weights[r] = weights[r + 2] = 0u;
      if (r == 1 && !upper) continue;
      const int i = r * 2;
      float largest = max(max(scores[0][i], scores[0][i + 1]), max(scores[1][i], scores[1][i + 1]));
      largest = max(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = max(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      const float maximum = max(state.maximum[r], largest);
      rescale(r, weight(state.maximum[r], maximum), state);
      state.maximum[r] = maximum;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float x = weight(scores[n][i], maximum), y = weight(scores[n][i + 1], maximum);
        state.sum[r] += x + y;
        if constexpr (kQuantised) x *= value_scale[n][0], y *= value_scale[n][1];
        weights[n * 2 + r] = Pair<Compute>::pack(x, y);
      }
    }
  }

  // Most tiles leave the maximum as it was.
  LYCHEE_DEVICE static void rescale(int r, float factor, DecodeState<D>& state) {
    if (__ballot_sync(kAllLanes, factor != 1.0f) == 0) return;
    state.sum[r] *= factor;
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
      state.out[j][r * 2] *= factor;
      state.out[j][r * 2 + 1] *= factor;
    }
  }

  // 8-bit rows are transposed in units of two bytes: two neighbouring dimensions of a key. They are
  // taken apart into the even and the odd dimensions of 16.
  LYCHEE_DEVICE void add_values(int stage, const uint32_t (&weights)[4],
                                DecodeState<D>& state) const {
    const unsigned char* const values = stage_keys(stage) + Layout::kTileBytes;
    const int matrix = lane >> 3, row = warp * 16 + (matrix & 1) * 8 + (lane & 7);
#pragma unroll
    for (int j = 0; j < Layout::kRowBytes / 32; ++j) {
      uint32_t raw[4];
      load_matrix_transposed(raw, values + swizzled<Layout::kRowBytes>(row, j * 2 + (matrix >> 1)));
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        if constexpr (kQuantised) {
          uint32_t even[2], odd[2];
          Halves<Element>::values(raw[n * 2], even[0], odd[0]);
          Halves<Element>::values(raw[n * 2 + 1], even[1], odd[1]);
          Pair<Compute>::multiply(state.out[j * 4 + n * 2], weights, even);
          Pair<Compute>::multiply(state.out[j * 4 + n * 2 + 1], weights, odd);
        } else {
          const uint32_t pair[2] = {raw[n * 2], raw[n * 2 + 1]};
          Pair<Compute>::multiply(state.out[j * 2 + n], weights, pair);
        }
      }
    }
  }

  // The warp's part of one tile in shared memory. `keep`: one bit per key of the warp.
  LYCHEE_DEVICE void attend(int stage, int first_key, uint32_t keep, DecodeState<D>& state) const {
    if (keep == 0) return;
    float scores[2][4] = {};
    compute_scores(stage, scores);
    uint32_t weights[4];
    softmax(stage, first_key + warp * 16, keep, scores, state, weights);
    add_values(stage, weights, state);
  }

  // Bits of the warp's 16 keys in a tile that is copied now and attended to `ahead` tiles later.
  LYCHEE_DEVICE uint64_t kept(const Tile& tile, int ahead) const {
    const uint32_t word = warp < 2 ? tile.keep[0] : tile.keep[1];
    return static_cast<uint64_t>(word >> (warp & 1) * 16 & 0xffffu) << ahead * 16;
  }

  LYCHEE_DEVICE void run(int begin, int end, DecodeState<D>& state) const {
    constexpr int kAhead = Layout::kStages - 1;
    Tile next = source.tile(begin);
    uint64_t keep = 0;  // kept(), of every tile under way
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (begin + i < end) {
        start_copies(next, i);
        keep |= kept(next, i);
      }
      copy_commit();
      if (begin + i + 1 < end) next = source.tile(begin + i + 1);
    }
    if constexpr (kRotate) {
      fill_turns<D, kQuantised>(p, shared + Layout::kTable, 1.0f / Halves<Element>::kKeyFactor);
    }
    int stage = 0, free_stage = kAhead;
    for (int index = begin; index < end; ++index) {
      if (index + kAhead < end) {
        start_copies(next, free_stage);
        keep |= kept(next, kAhead);
      }
      copy_commit();
      // looked up one tile early: its copies need not wait for the tables
      if (index + kAhead + 1 < end) next = source.tile(index + kAhead + 1);
      copy_wait<kAhead>();
      queries.share(stage_turn(stage), shared + Layout::kQueries);
      __syncthreads();
      attend(stage, index * kTileKeys, static_cast<uint32_t>(keep) & 0xffffu, state);
      keep >>= 16;
      __syncthreads();
      stage = stage + 1 == Layout::kStages ? 0 : stage + 1;
      free_stage = free_stage + 1 == Layout::kStages ? 0 : free_stage + 1;
    }
    copy_wait<0>();
    __syncthreads();
  }

  // To parts[warp] of the block's result.
  LYCHEE_DEVICE void store(const DecodeState<D>& state, const BlockParts& parts) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int at = warp * kDecodeRows + group + r * 8;
      float sum = state.sum[r];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (member == 0) {
        parts.maximum[at] = state.maximum[r];
        parts.sum[at] = sum;
      }
      float* const out = parts.out + at * parts.stride;
#pragma unroll
      for (int j = 0; j < D / 8; j += 2) {
        const float *even = state.out[j] + r * 2, *odd = state.out[j + 1] + r * 2;
        if constexpr (kQuantised) {
          using Values = Halves<Element>;
          constexpr float kFactor = 1.0f / (kValueBoost * Values::kValueFactor);
          *reinterpret_cast<float4*>(out + j * 8 + member * 4) =
              float4{Values::output(even[0]) * kFactor, Values::output(odd[0]) * kFactor,
                     Values::output(even[1]) * kFactor, Values::output(odd[1]) * kFactor};
        } else {
          *reinterpret_cast<float2*>(out + j * 8 + member * 2) = float2{even[0], even[1]};
          *reinterpret_cast<float2*>(out + j * 8 + 8 + member * 2) = float2{odd[0], odd[1]};
        }
      }
    }
  }
};

template <class Pass, int D>
LYCHEE_DEVICE void run_decode_pass(const MemoryAttentionParams& p, const Work& work, int begin,
                                   int end, unsigned char* shared, const BlockParts& parts) {
  DecodeState<D> state;
#pragma unroll
  for (int j = 0; j < D / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) state.out[j][i] = 0.0f;
  }
  state.maximum[0] = state.maximum[1] = kMinusInfinity;
  state.sum[0] = state.sum[1] = 0.0f;
  const Pass pass(p, work, shared);
  if (begin < end) pass.run(begin, end, state);
  pass.store(state, parts);
}

// Grid: splits, kv heads, batch. kRotate: page keys, by p.cos and p.sin.
template <class Query, class Element, int D, bool kRotate>
__global__ void __launch_bounds__(kAttentionThreads, DecodeLayout<Element, D, kRotate>::kBlocks)
    memory_attention_decode(const MemoryAttentionParams p) {
  LYCHEE_SHARED(shared);
  Work work;
  if (!find_work(p, work)) return;
  const BlockParts parts = block_parts(shared, kAttentionThreads / 32, D);
  if (work.page_begin < work.page_end) {
    run_decode_pass<DecodePass<Query, Element, D, kRotate, PageSource>, D>(
        p, work, work.page_begin, work.page_end, shared, parts);
  } else {
    run_decode_pass<DecodePass<Query, Query, D, false, SegmentSource>, D>(
        p, work, work.segment_begin, work.segment_end, shared, parts);
  }
  __syncthreads();
  finish_rows(p, work, parts);
}

}  // namespace lychee::cuda
