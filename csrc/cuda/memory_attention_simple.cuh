// SPDX-License-Identifier: Apache-2.0
// memory_attention without tensor cores: every dtype, mixture of dtypes, head dimension and stride,
// in float32. Correct, and far from the machine's limits. A tile of 32 keys and values lies in
// shared memory; each of four warps owns four rows, its lanes keys for the scores and dimensions
// for the outputs.
#pragma once

#include "cuda/memory_attention_merge.cuh"

namespace lychee::cuda {

constexpr int kSimpleKeys = 32;
constexpr int kSimpleRows = kDecodeRows / 4;  // of a warp
constexpr int kSimpleColumns = 256 / 32;      // of a lane, at most

constexpr int64_t simple_shared_bytes(int head_dim) {
  const int64_t dim = head_dim;
  const int64_t tile = 4 * (kDecodeRows * dim + kSimpleKeys * (2 * dim + 1) +
                            static_cast<int64_t>(kDecodeRows) * kSimpleKeys);
  const int64_t parts = block_parts_bytes(1, head_dim);
  return tile > parts ? tile : parts;
}

LYCHEE_DEVICE int element_bytes(Dtype dtype) {
  if (dtype == Dtype::kFloat32) return 4;
  return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16 ? 2 : 1;
}

LYCHEE_DEVICE float load_element(const unsigned char* x, Dtype dtype) {
  float pair[4];
  switch (dtype) {
    case Dtype::kFloat32:
      return *reinterpret_cast<const float*>(x);
    case Dtype::kBFloat16:
      return bf16_low(*reinterpret_cast<const uint16_t*>(x));
    case Dtype::kFloat16:
      return f16_low(*reinterpret_cast<const uint16_t*>(x));
    case Dtype::kInt8:
      return static_cast<float>(*reinterpret_cast<const int8_t*>(x));
    default:
      e4m3x4_to_float(*x, pair);
      return pair[0];
  }
}

struct SimpleBlock {
  const MemoryAttentionParams& p;
  const Work& work;
  const int dim, lane, first_row;  // first_row of the warp, within the block
  float *q, *k, *v, *scores;       // [16, dim], [32, dim + 1], [32, dim], [16, 32]
  float out[kSimpleRows][kSimpleColumns], maximum[kSimpleRows], sum[kSimpleRows];
  int limit[kSimpleRows];  // last key of the segment that each row sees

  LYCHEE_DEVICE SimpleBlock(const MemoryAttentionParams& params, const Work& part,
                            unsigned char* shared)
      : p(params),
        work(part),
        dim(p.head_dim),
        lane(static_cast<int>(threadIdx.x) & 31),
        first_row(static_cast<int>(threadIdx.x) / 32 * kSimpleRows) {
    q = reinterpret_cast<float*>(shared);
    k = q + kDecodeRows * dim;
    v = k + kSimpleKeys * (dim + 1);
    scores = v + kSimpleKeys * dim;
#pragma unroll
    for (int r = 0; r < kSimpleRows; ++r) {
#pragma unroll
      for (int i = 0; i < kSimpleColumns; ++i) out[r][i] = 0.0f;
      maximum[r] = kMinusInfinity;
      sum[r] = 0.0f;
      limit[r] = last_key(p, find_row(p, work, first_row + r).token);
    }
    const int bytes = element_bytes(p.dtype);
    for (int i = threadIdx.x; i < kDecodeRows * dim; i += kAttentionThreads) {
      const int row = i / dim, d = i - row * dim;
      q[i] = 0.0f;
      if (row >= work.rows) continue;
      const int64_t at = query_offset(p, work, find_row(p, work, row)) + d;
      q[i] = load_element(static_cast<const unsigned char*>(p.q) + at * bytes, p.dtype);
    }
  }

  // Keys and values first .. first + 31 of a tile; those not kept become zero.
  template <class Source>
  LYCHEE_DEVICE void load_tile(const Source& source, const Tile& tile, int first, Dtype dtype) {
    const int half = dim / 2, bytes = element_bytes(dtype);
    const uint32_t keep = first == 0 ? tile.keep[0] : tile.keep[1];
    for (int i = threadIdx.x; i < kSimpleKeys * half; i += kAttentionThreads) {
      const int key = i / half, d = i - key * half, row = first + key;
      float x = 0.0f, y = 0.0f, value[2] = {0.0f, 0.0f};
      if (keep >> key & 1) {
        const unsigned char* from = tile.k + row * source.k_stride() + d * bytes;
        x = load_element(from, dtype);
        y = load_element(from + half * bytes, dtype);
        from = tile.v + row * source.v_stride() + d * bytes;
        value[0] = load_element(from, dtype);
        value[1] = load_element(from + half * bytes, dtype);
        if (!Source::kSegment && bytes == 1) {
          const float scale = tile.scale[row], value_scale = tile.scale[p.scale_part_stride + row];
          x *= scale, y *= scale, value[0] *= value_scale, value[1] *= value_scale;
        }
        if (!Source::kSegment && p.cos != nullptr) {
          const int64_t at = static_cast<int64_t>(tile.position + row) * half + d;
          const float c = p.cos[at], s = p.sin[at], turned = x * c - y * s;
          y = y * c + x * s;
          x = turned;
        }
      }
      k[key * (dim + 1) + d] = x;
      k[key * (dim + 1) + half + d] = y;
      v[key * dim + d] = value[0];
      v[key * dim + half + d] = value[1];
    }
  }

  // Row r of the warp: its lane's score becomes a weight, in base 2.
  LYCHEE_DEVICE void softmax(int r, float score, bool seen) {
    score = seen ? score * p.scale_log2 : kMinusInfinity;
    float largest = score;
    for (int i = 16; i > 0; i /= 2) {
      largest = max(largest, __shfl_xor_sync(kAllLanes, largest, i));
    }
    const float next = max(maximum[r], largest), factor = weight(maximum[r], next);
    const float w = weight(score, next);
    maximum[r] = next;
    sum[r] = sum[r] * factor + w;
#pragma unroll
    for (int i = 0; i < kSimpleColumns; ++i) out[r][i] *= factor;
    scores[(first_row + r) * kSimpleKeys + lane] = w;
  }

  LYCHEE_DEVICE void attend(uint32_t keep, int first_key, bool segment) {
    float score[kSimpleRows] = {};
    for (int d = 0; d < dim; ++d) {
      const float x = k[lane * (dim + 1) + d];
#pragma unroll
      for (int r = 0; r < kSimpleRows; ++r) score[r] += q[(first_row + r) * dim + d] * x;
    }
#pragma unroll
    for (int r = 0; r < kSimpleRows; ++r) {
      const bool seen = (keep >> lane & 1) && (!segment || first_key + lane <= limit[r]);
      softmax(r, score[r], seen);
    }
    __syncwarp();
    for (int key = 0; key < kSimpleKeys; ++key) {
#pragma unroll
      for (int i = 0; i < kSimpleColumns; ++i) {
        const int d = i * 32 + lane;
        const float x = d < dim ? v[key * dim + d] : 0.0f;
#pragma unroll
        for (int r = 0; r < kSimpleRows; ++r) {
          out[r][i] += scores[(first_row + r) * kSimpleKeys + key] * x;
        }
      }
    }
  }

  template <class Source>
  LYCHEE_DEVICE void run(int begin, int end, Dtype dtype) {
    const Source source(p, work, element_bytes(dtype));
    for (int index = begin; index < end; ++index) {
      const Tile tile = source.tile(index);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t keep = tile.keep[half];
        if (keep == 0) continue;
        __syncthreads();
        load_tile(source, tile, half * kSimpleKeys, dtype);
        __syncthreads();
        attend(keep, index * kTileKeys + half * kSimpleKeys, Source::kSegment);
      }
    }
  }

  LYCHEE_DEVICE void store(const BlockParts& parts) {
#pragma unroll
    for (int r = 0; r < kSimpleRows; ++r) {
      for (int i = 16; i > 0; i /= 2) sum[r] += __shfl_xor_sync(kAllLanes, sum[r], i);
      const int row = first_row + r;
      if (lane == 0) {
        parts.maximum[row] = maximum[r];
        parts.sum[row] = sum[r];
      }
#pragma unroll
      for (int i = 0; i < kSimpleColumns; ++i) {
        if (i * 32 + lane < dim) parts.out[row * parts.stride + i * 32 + lane] = out[r][i];
      }
    }
  }
};

// Grid: row blocks or splits, kv heads, batch.
__global__ void __launch_bounds__(kAttentionThreads)
    memory_attention_simple(const MemoryAttentionParams p) {
  LYCHEE_SHARED(shared);
  Work work;
  if (!find_work(p, work)) return;
  SimpleBlock block(p, work, shared);
  if (work.page_begin < work.page_end) {
    block.run<PageSource>(work.page_begin, work.page_end, p.bank_dtype);
  }
  block.run<SegmentSource>(work.segment_begin, seen_segment_end(p, work), p.dtype);
  __syncthreads();
  const BlockParts parts = block_parts(shared, 1, p.head_dim);
  block.store(parts);
  __syncthreads();
  finish_rows(p, work, parts);
}

}  // namespace lychee::cuda
