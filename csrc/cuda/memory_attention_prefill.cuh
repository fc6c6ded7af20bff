// SPDX-License-Identifier: Apache-2.0
// memory_attention for many query rows: 64 rows (query tokens x heads of one kv head) per block on
// tensor cores, 16 rows for each of four warps, which share tiles of 64 keys and values. Pages come
// first, then the contiguous segment.
//
// Page keys are rotated, and 8-bit pages unpacked to the type of the queries, which is exact, once
// per tile in shared memory. The scale of a key multiplies its scores, that of a value its weights.
#pragma once

#include "cuda/memory_attention_tiles.cuh"

namespace lychee::cuda {

// Shared memory in bytes. Tiles hold keys, then values, in the type of the queries: two stages of
// them, or one of unpacked rows and two of 8-bit rows in the room of the second.
template <int D>
struct PrefillLayout {
  static constexpr int kRowBytes = D * 2;
  static constexpr int kRowsBytes = kTileKeys * kRowBytes;
  static constexpr int kTileBytes = 2 * kRowsBytes;
  static constexpr int kPacked = kTileBytes;
  static constexpr int kScales = 2 * kTileBytes;
  static constexpr int kScaleBytes = 2 * kTileKeys * 4;
  static constexpr int kKeep = kScales + 2 * kScaleBytes;
  static constexpr int kBytes = kKeep + 2 * 8;
};

// Eight neighbouring elements as floats: 16-bit ones of `Query`, or 8-bit ones.
template <class Query>
LYCHEE_DEVICE void unpack_eight(const unsigned char* from, Dtype dtype, float (&x)[8]) {
  if (dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[i * 2] = Pair<Query>::low(pairs[i]);
      x[i * 2 + 1] = Pair<Query>::high(pairs[i]);
    }
    return;
  }
  const uint2 raw = *reinterpret_cast<const uint2*>(from);
  float low[4], high[4];
  if (dtype == Dtype::kInt8) {
    int8x4_to_float(raw.x, low);
    int8x4_to_float(raw.y, high);
  } else {
    e4m3x4_to_float(raw.x, low);
    e4m3x4_to_float(raw.y, high);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = low[i], x[i + 4] = high[i];
}

template <class Query>
LYCHEE_DEVICE void store_eight(unsigned char* to, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(to) =
      uint4{Pair<Query>::pack(x[0], x[1]), Pair<Query>::pack(x[2], x[3]),
            Pair<Query>::pack(x[4], x[5]), Pair<Query>::pack(x[6], x[7])};
}

LYCHEE_DEVICE void load_eight(const float* from, float (&x)[8]) {
  const float4 low = reinterpret_cast<const float4*>(from)[0];
  const float4 high = reinterpret_cast<const float4*>(from)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

// Rows of a tile from `from` to `to`, which may be the same where elements have 16 bits; keys
// turned by the tables' rows from `position` on where `rotate`. Each thread turns eight pairs (d, d
// + D/2).
template <class Query, int D>
LYCHEE_DEVICE void convert_rows(const MemoryAttentionParams& p, const unsigned char* from,
                                unsigned char* to, Dtype dtype, bool rotate, int position) {
  constexpr int kUnits = D / 16;
  const bool packed = dtype == Dtype::kInt8 || dtype == Dtype::kFloat8E4M3;
#pragma unroll 1
  for (int i = threadIdx.x; i < kTileKeys * kUnits; i += kAttentionThreads) {
    const int row = i / kUnits, unit = i % kUnits;
    const int first =
        packed ? swizzled<D>(row, unit / 2) + unit % 2 * 8 : swizzled<D * 2>(row, unit);
    const int second = packed ? swizzled<D>(row, (unit + kUnits) / 2) + unit % 2 * 8
                              : swizzled<D * 2>(row, unit + kUnits);
    float x[8], y[8];
    unpack_eight<Query>(from + first, dtype, x);
    unpack_eight<Query>(from + second, dtype, y);
    if (rotate) {
      const int64_t at =
          static_cast<int64_t>(min(position + row, p.positions - 1)) * (D / 2) + unit * 8;
      float c[8], s[8];
      load_eight(p.cos + at, c);
      load_eight(p.sin + at, s);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float turned = x[j] * c[j] - y[j] * s[j];
        y[j] = y[j] * c[j] + x[j] * s[j];
        x[j] = turned;
      }
    }
    store_eight<Query>(to + swizzled<D * 2>(row, unit), x);
    store_eight<Query>(to + swizzled<D * 2>(row, unit + kUnits), y);
  }
}

template <class Query, int D>
struct PrefillBlock {
  using Layout = PrefillLayout<D>;
  static constexpr int kKeyGroups = kTileKeys / 8;

  const MemoryAttentionParams& p;
  const Work& work;
  unsigned char* const shared;
  const int lane, group, member;  // group, member: row and column pair of fragments
  const int first_row;            // of the warp, within the block
  int first_limit;                // last key of the segment that every row of the block sees
  int limit[2];                   // that each of the lane's rows sees
  uint32_t query[D / 16][4];
  float out[D / 8][4], maximum[2], sum[2];

  LYCHEE_DEVICE PrefillBlock(const MemoryAttentionParams& params, const Work& part,
                             unsigned char* memory)
      : p(params),
        work(part),
        shared(memory),
        lane(static_cast<int>(threadIdx.x) & 31),
        group(lane >> 2),
        member(lane & 3),
        first_row(static_cast<int>(threadIdx.x) / 32 * 16) {
    first_limit = last_key(p, find_row(p, work, 0).token);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + group + r * 8;
      const Row at = find_row(p, work, row);
      limit[r] = last_key(p, at.token);
      maximum[r] = kMinusInfinity;
      sum[r] = 0.0f;
      const uint16_t* q =
          static_cast<const uint16_t*>(p.q) + query_offset(p, work, at) + member * 2;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        query[i / 2][i % 2 * 2 + r] =
            row < work.rows ? *reinterpret_cast<const uint32_t*>(q + i * 8) : 0u;
      }
    }
#pragma unroll
    for (int j = 0; j < D / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[j][i] = 0.0f;
    }
  }

  template <bool kPacked>
  LYCHEE_DEVICE unsigned char* stage_keys(int stage) const {
    return shared +
           (kPacked ? Layout::kPacked + stage * Layout::kRowsBytes : stage * Layout::kTileBytes);
  }
  LYCHEE_DEVICE float* stage_scales(int stage) const {
    return reinterpret_cast<float*>(shared + Layout::kScales + stage * Layout::kScaleBytes);
  }
  LYCHEE_DEVICE uint2* stage_keep(int stage) const {
    return reinterpret_cast<uint2*>(shared + Layout::kKeep + stage * 8);
  }

  template <bool kPacked, class Source>
  LYCHEE_DEVICE void start_copies(const Source& source, const Tile& tile, int stage) const {
    constexpr int kRowBytes = kPacked ? D : D * 2;
    unsigned char* const keys = stage_keys<kPacked>(stage);
    copy_rows<kRowBytes>(keys, tile.k, source.k_stride(), tile.keep);
    copy_rows<kRowBytes>(keys + kTileKeys * kRowBytes, tile.v, source.v_stride(), tile.keep);
    if constexpr (kPacked) copy_scales(stage_scales(stage), tile, p.scale_part_stride);
    if (threadIdx.x == 0) *stage_keep(stage) = uint2{tile.keep[0], tile.keep[1]};
  }

  // scores[n] is a fragment of the warp's rows by keys n * 8 .. n * 8 + 7.
  LYCHEE_DEVICE void compute_scores(const unsigned char* keys,
                                    float (&scores)[kKeyGroups][4]) const {
    const int matrix = lane >> 3;
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
#pragma unroll
      for (int n = 0; n < kKeyGroups; n += 2) {
        const int row = n * 8 + (matrix >> 1) * 8 + (lane & 7);
        uint32_t raw[4];
        load_matrix(raw, keys + swizzled<D * 2>(row, step * 2 + (matrix & 1)));
        const uint32_t first[2] = {raw[0], raw[1]}, second[2] = {raw[2], raw[3]};
        Pair<Query>::multiply(scores[n], query[step], first);
        Pair<Query>::multiply(scores[n + 1], query[step], second);
      }
    }
  }

  template <bool kPacked, bool kSegment>
  LYCHEE_DEVICE void scale_and_mask(int stage, int first_key,
                                    float (&scores)[kKeyGroups][4]) const {
    const uint2 keep = *stage_keep(stage);
    const bool whole =
        (keep.x & keep.y) == ~0u && (!kSegment || first_key + kTileKeys - 1 <= first_limit);
#pragma unroll
    for (int n = 0; n < kKeyGroups; ++n) {
      const int pair = n * 8 + member * 2;
      float2 scale{p.scale_log2, p.scale_log2};
      if constexpr (kPacked) {
        const float2 k_scale = *reinterpret_cast<const float2*>(stage_scales(stage) + pair);
        scale.x *= k_scale.x, scale.y *= k_scale.y;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] *= i % 2 ? scale.y : scale.x;
      if (whole) continue;
      const uint32_t bits = (n < 4 ? keep.x : keep.y) >> pair % 32;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool kept = bits >> i % 2 & 1;
        const bool seen = kept && (!kSegment || first_key + pair + i % 2 <= limit[i / 2]);
        if (!seen) scores[n][i] = kMinusInfinity;
      }
    }
  }

  // Scores of the lane's row r become weights, the outputs so far are scaled to the new maximum.
  LYCHEE_DEVICE void softmax(int r, float (&scores)[kKeyGroups][4]) {
    float largest = kMinusInfinity;
#pragma unroll
    for (int n = 0; n < kKeyGroups; ++n) {
      largest = max(largest, max(scores[n][r * 2], scores[n][r * 2 + 1]));
    }
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, 1));
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, 2));
    const float next = max(maximum[r], largest), factor = weight(maximum[r], next);
    maximum[r] = next;
    // most tiles leave the maximum as it was
    if (__ballot_sync(kAllLanes, factor != 1.0f)) {
      sum[r] *= factor;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        out[j][r * 2] *= factor;
        out[j][r * 2 + 1] *= factor;
      }
    }
#pragma unroll
    for (int n = 0; n < kKeyGroups; ++n) {
#pragma unroll
      for (int i = r * 2; i < r * 2 + 2; ++i) {
        scores[n][i] = weight(scores[n][i], next);
        sum[r] += scores[n][i];
      }
    }
  }

  // Weights carry the values' scales; those of rows past the last are garbage and count as zero.
  template <bool kPacked>
  LYCHEE_DEVICE void scale_weights(int stage, float (&weights)[kKeyGroups][4]) const {
    if constexpr (!kPacked) return;
    const uint2 keep = *stage_keep(stage);
#pragma unroll
    for (int n = 0; n < kKeyGroups; ++n) {
      const int pair = n * 8 + member * 2;
      const uint32_t bits = (n < 4 ? keep.x : keep.y) >> pair % 32;
      const float2 scale = *reinterpret_cast<const float2*>(stage_scales(stage) + kTileKeys + pair);
      const float even = bits & 1 ? scale.x * kValueBoost : 0.0f;
      const float odd = bits & 2 ? scale.y * kValueBoost : 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[n][i] *= i % 2 ? odd : even;
    }
  }

  LYCHEE_DEVICE void add_values(const unsigned char* values,
                                const float (&weights)[kKeyGroups][4]) {
    const int matrix = lane >> 3;
#pragma unroll
    for (int step = 0; step < kTileKeys / 16; ++step) {
      const float (&low)[4] = weights[step * 2], (&high)[4] = weights[step * 2 + 1];
      const uint32_t packed[4] = {
          Pair<Query>::pack(low[0], low[1]), Pair<Query>::pack(low[2], low[3]),
          Pair<Query>::pack(high[0], high[1]), Pair<Query>::pack(high[2], high[3])};
      const int row = step * 16 + (matrix & 1) * 8 + (lane & 7);
#pragma unroll
      for (int j = 0; j < D / 8; j += 2) {
        uint32_t raw[4];
        load_matrix_transposed(raw, values + swizzled<D * 2>(row, j + (matrix >> 1)));
        const uint32_t first[2] = {raw[0], raw[1]}, second[2] = {raw[2], raw[3]};
        Pair<Query>::multiply(out[j], packed, first);
        Pair<Query>::multiply(out[j + 1], packed, second);
      }
    }
  }

  // Makes a landed tile what the products read; ends with a barrier where it does anything.
  template <bool kPacked, bool kSegment>
  LYCHEE_DEVICE void prepare(int stage, int position) const {
    const bool rotate = !kSegment && p.cos != nullptr;
    if (!kPacked && !rotate) return;
    const Dtype dtype = kPacked ? p.bank_dtype : p.dtype;
    unsigned char* const from = stage_keys<kPacked>(stage);
    convert_rows<Query, D>(p, from, kPacked ? shared : from, dtype, rotate, position);
    if constexpr (kPacked) {
      convert_rows<Query, D>(p, from + Layout::kRowsBytes / 2, shared + Layout::kRowsBytes, dtype,
                             false, 0);
    }
    __syncthreads();
  }

  template <bool kPacked, class Source>
  LYCHEE_DEVICE void run(int begin, int end) {
    if (begin >= end) return;
    const Source source(p, work, kPacked ? 1 : 2);
    Tile next = source.tile(begin);
    start_copies<kPacked>(source, next, 0);
    copy_commit();
    int position = next.position;
    if (begin + 1 < end) next = source.tile(begin + 1);
    for (int index = begin; index < end; ++index) {
      const int stage = (index - begin) & 1;
      if (index + 1 < end) start_copies<kPacked>(source, next, stage ^ 1);
      copy_commit();
      const int next_position = next.position;
      if (index + 2 < end) next = source.tile(index + 2);
      copy_wait<1>();
      __syncthreads();
      prepare<kPacked, Source::kSegment>(stage, position);
      position = next_position;
      const unsigned char* const keys = kPacked ? shared : stage_keys<false>(stage);
      float scores[kKeyGroups][4] = {};
      compute_scores(keys, scores);
      scale_and_mask<kPacked, Source::kSegment>(stage, index * kTileKeys, scores);
      softmax(0, scores);
      softmax(1, scores);
      scale_weights<kPacked>(stage, scores);
      add_values(keys + Layout::kRowsBytes, scores);
      __syncthreads();
    }
    copy_wait<0>();
    __syncthreads();
    // the segment's values have no boost
    if constexpr (kPacked) {
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[j][i] *= 1.0f / kValueBoost;
      }
    }
  }

  LYCHEE_DEVICE void store() {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 1);
      sum[r] += __shfl_xor_sync(kAllLanes, sum[r], 2);
      const int row = first_row + group + r * 8;
      if (row >= work.rows) continue;
      const Row at = find_row(p, work, row);
      const float inverse = sum[r] == 0.0f ? 0.0f : 1.0f / sum[r];
      uint16_t* to = static_cast<uint16_t*>(p.out) + output_offset(p, work, at) + member * 2;
#pragma unroll
      for (int j = 0; j < D / 8; ++j) {
        *reinterpret_cast<uint32_t*>(to + j * 8) =
            Pair<Query>::pack(out[j][r * 2] * inverse, out[j][r * 2 + 1] * inverse);
      }
      if (member > 0) continue;
      store_lse(p, work, at, sum[r] == 0.0f ? kMinusInfinity : maximum[r] + log2f(sum[r]));
    }
  }
};

// Grid: row blocks, kv heads, batch.
template <class Query, int D>
__global__ void __launch_bounds__(kAttentionThreads)
    memory_attention_prefill(const MemoryAttentionParams p) {
  LYCHEE_SHARED(shared);
  Work work;
  if (!find_work(p, work)) return;
  PrefillBlock<Query, D> block(p, work, shared);
  if (p.bank_dtype == Dtype::kInt8 || p.bank_dtype == Dtype::kFloat8E4M3) {
    block.template run<true, PageSource>(0, work.page_end);
  } else {
    block.template run<false, PageSource>(0, work.page_end);
  }
  block.template run<false, SegmentSource>(0, seen_segment_end(p, work));
  block.store();
}

}  // namespace lychee::cuda
