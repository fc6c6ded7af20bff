// SPDX-License-Identifier: Apache-2.0
// The 16 query rows of a memory_attention block as tensor-core fragments of every warp: loaded
// once, and turned back by each tile's position where page keys are rotated.
#pragma once

#include "cuda/memory_attention_turn.cuh"

namespace lychee::cuda {

// Where 8-bit banks are read, queries are limited to this, so that rotated ones fit fp16.
constexpr float kLargestQuery = 32768.0f;

// Turned queries of a block in shared memory.
constexpr int queries_bytes(int dim) { return kDecodeRows * dim * 2; }

template <class Query, class Element, int D, bool kRotate>
struct DecodeQueries {
  static constexpr bool kQuantised = sizeof(Element) == 1;
  // Each warp turns one pair of k-steps for all; 16-bit tiles leave no room for that.
  static constexpr bool kShared = kRotate && kQuantised;
  static constexpr int kSteps = D / 32;  // pairs of k-steps
  using Compute = std::conditional_t<kQuantised, Float16, Query>;

  const int lane, warp, member;            // member: column pair of fragments
  const bool upper;                        // rows 8 .. 15 exist
  uint32_t part[kShared ? 2 : D / 16][4];  // k-steps; the warp's own pair where they are shared

  LYCHEE_DEVICE DecodeQueries(const MemoryAttentionParams& p, const Work& work)
      : lane(static_cast<int>(threadIdx.x) & 31),
        warp(static_cast<int>(threadIdx.x) >> 5),
        member(lane & 3),
        upper(work.rows > 8) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = (lane >> 2) + r * 8;
      const bool exists = row < work.rows;
      const uint16_t* q =
          static_cast<const uint16_t*>(p.q) + query_offset(p, work, find_row(p, work, row));
#pragma unroll
      for (int i = 0; i < (kShared ? 4 : D / 8); ++i) {
        const int step = kShared ? warp % kSteps + i / 2 * kSteps : i / 2;
        const int d = fragment_dimension<kQuantised>(step, i % 2, member);
        part[i / 2][i % 2 * 2 + r] =
            converted(exists ? *reinterpret_cast<const uint32_t*>(q + d) : 0u);
      }
    }
  }

  LYCHEE_DEVICE static float limited(float x) {
    return x > kLargestQuery ? kLargestQuery : x < -kLargestQuery ? -kLargestQuery : x;
  }

  // Stays in the type of the queries where they are rotated later, so that they are rounded once.
  LYCHEE_DEVICE static uint32_t converted(uint32_t pair) {
    if constexpr (kQuantised && !std::is_same_v<Query, Float16>) {
      const float low = limited(Pair<Query>::low(pair)), high = limited(Pair<Query>::high(pair));
      return kRotate ? Pair<Query>::pack(low, high) : pack_f16(low, high);
    }
    return pair;
  }

  // part[first] and part[second], which are `step` and its partner, turned back by the position
  // whose cosines and sines lie at `turn`.
  LYCHEE_DEVICE void turn_back(const unsigned char* turn, int step, int first, int second,
                               uint32_t (&low)[4], uint32_t (&high)[4]) const {
    const float* const cos = reinterpret_cast<const float*>(turn + step * kTurnStepBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int d = fragment_dimension<kQuantised>(0, half, member);
      const float2 c = *reinterpret_cast<const float2*>(cos + d);
      const float2 s = *reinterpret_cast<const float2*>(cos + 16 + d);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = half * 2 + r;
        low[i] = part[first][i];
        high[i] = part[second][i];
        if (r == 0 || upper) turn_queries_back<Query, Compute>(low[i], high[i], c, s);
      }
    }
  }

  LYCHEE_DEVICE uint4* shared_step(unsigned char* queries, int step) const {
    return reinterpret_cast<uint4*>(queries + step * 1024) + lane;
  }

  // Writes the warp's pair of k-steps to `queries`, once its own copies of `turn` have arrived.
  LYCHEE_DEVICE void share(const unsigned char* turn, unsigned char* queries) const {
    if (!kShared || warp >= kSteps) return;
    __syncwarp();
    uint32_t low[4], high[4];
    turn_back(turn, warp, 0, 1, low, high);
    uint4* const target = shared_step(queries, warp);
    target[0] = uint4{low[0], low[1], low[2], low[3]};
    target[32] = uint4{high[0], high[1], high[2], high[3]};
  }

  // Fragments of k-steps `step` and `step + kSteps` for a tile.
  LYCHEE_DEVICE void get(const unsigned char* turn, unsigned char* queries, int step,
                         uint32_t (&low)[4], uint32_t (&high)[4]) const {
    if constexpr (kShared) {
      const uint4 x = shared_step(queries, step)[0], y = shared_step(queries, step)[32];
      low[0] = x.x, low[1] = x.y, low[2] = x.z, low[3] = x.w;
      high[0] = y.x, high[1] = y.y, high[2] = y.z, high[3] = y.w;
    } else if constexpr (kRotate) {
      turn_back(turn, step, step, step + kSteps, low, high);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) low[i] = part[step][i], high[i] = part[step + kSteps][i];
    }
  }
};

}  // namespace lychee::cuda
