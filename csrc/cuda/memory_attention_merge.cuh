// SPDX-License-Identifier: Apache-2.0
// The end of a memory_attention block of at most 16 rows: its parts are summed, then the splits of
// the batch entry by whichever block ends last, always in the same order.
#pragma once

#include "cuda/memory_attention_tiles.cuh"

namespace lychee::cuda {

// Parts of a block's result in shared memory: outputs [parts, kDecodeRows, stride], then maxima
// (base 2) and sums [parts, kDecodeRows] each, and a word for all threads.
struct BlockParts {
  float *out, *maximum, *sum, *word;
  int count, dim, stride;
};

// Rows of outputs are kept apart, so that lanes that store four of them share no banks.
constexpr int kPartsPadding = 8;

constexpr int64_t block_parts_bytes(int count, int dim) {
  return 4 * (static_cast<int64_t>(count) * kDecodeRows * (dim + kPartsPadding + 2) + 1);
}

LYCHEE_DEVICE BlockParts block_parts(unsigned char* shared, int count, int dim) {
  BlockParts parts;
  parts.count = count;
  parts.dim = dim;
  parts.stride = dim + kPartsPadding;
  parts.out = reinterpret_cast<float*>(shared);
  parts.maximum = parts.out + count * kDecodeRows * parts.stride;
  parts.sum = parts.maximum + count * kDecodeRows;
  parts.word = parts.sum + count * kDecodeRows;
  return parts;
}

LYCHEE_DEVICE void store_output(const MemoryAttentionParams& p, int64_t index, float x) {
  if (p.dtype == Dtype::kFloat32) {
    static_cast<float*>(p.out)[index] = x;
  } else {
    const uint32_t bits = p.dtype == Dtype::kBFloat16 ? pack_bf16(x, 0.0f) : pack_f16(x, 0.0f);
    static_cast<uint16_t*>(p.out)[index] = static_cast<uint16_t>(bits);
  }
}

// Sums the parts of every row: to the outputs where there is one split, else to `partial`.
LYCHEE_DEVICE void sum_parts(const MemoryAttentionParams& p, const Work& work,
                             const BlockParts& parts, float* partial) {
  for (int i = threadIdx.x; i < work.rows * parts.dim; i += kAttentionThreads) {
    const int row = i / parts.dim, d = i - row * parts.dim;
    float maximum = kMinusInfinity, sum = 0.0f, out = 0.0f;
    for (int part = 0; part < parts.count; ++part) {
      maximum = max(maximum, parts.maximum[part * kDecodeRows + row]);
    }
    for (int part = 0; part < parts.count; ++part) {
      const int at = part * kDecodeRows + row;
      const float w = weight(parts.maximum[at], maximum);
      sum += w * parts.sum[at];
      out += w * parts.out[at * parts.stride + d];
    }
    out = sum == 0.0f ? 0.0f : out / sum;
    const float log2_sum = sum == 0.0f ? kMinusInfinity : maximum + log2f(sum);
    if (work.slots == 1) {
      const Row at = find_row(p, work, row);
      store_output(p, output_offset(p, work, at) + d, out);
      if (d == 0) store_lse(p, work, at, log2_sum);
    } else {
      partial[i] = out;
      if (d == 0) partial[p.block_rows * parts.dim + row] = log2_sum;
    }
  }
}

// Whether this block is the last of its batch entry and kv head to get here; the others' partial
// results can be read then.
LYCHEE_DEVICE bool is_last_block(const MemoryAttentionParams& p, const Work& work, float* word) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int64_t at = work.batch * static_cast<int64_t>(p.num_kv_heads) + work.kv_head;
    const unsigned before = atomicAdd(p.tickets + at, 1u);
    *word = before + 1 == static_cast<unsigned>(work.slots) ? 1.0f : 0.0f;
  }
  __syncthreads();
  const bool last = *word != 0.0f;
  __threadfence();
  return last;
}

// Outputs of all rows from the partial results of the entry's splits.
LYCHEE_DEVICE void merge_splits(const MemoryAttentionParams& p, const Work& work, int dim,
                                const float* partials, int64_t stride) {
  const float* const log2_sums = partials + p.block_rows * dim;
  for (int i = threadIdx.x * 4; i < work.rows * dim; i += kAttentionThreads * 4) {
    const int row = i / dim, d = i - row * dim;
    float maximum = kMinusInfinity, sum = 0.0f;
    for (int slot = 0; slot < work.slots; ++slot) {
      maximum = max(maximum, log2_sums[slot * stride + row]);
    }
    float4 out{0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
    for (int slot = 0; slot < work.slots; ++slot) {
      const float w = weight(log2_sums[slot * stride + row], maximum);
      const float4 x = *reinterpret_cast<const float4*>(partials + slot * stride + i);
      sum += w;
      out.x += w * x.x, out.y += w * x.y, out.z += w * x.z, out.w += w * x.w;
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    const Row at = find_row(p, work, row);
    const int64_t offset = output_offset(p, work, at) + d;
    store_output(p, offset, out.x * inverse);
    store_output(p, offset + 1, out.y * inverse);
    store_output(p, offset + 2, out.z * inverse);
    store_output(p, offset + 3, out.w * inverse);
    if (d == 0) store_lse(p, work, at, sum == 0.0f ? kMinusInfinity : maximum + log2f(sum));
  }
}

// Called by every thread, after a barrier behind the last write to `parts`.
LYCHEE_DEVICE void finish_rows(const MemoryAttentionParams& p, const Work& work,
                               const BlockParts& parts) {
  const int64_t stride = partial_floats(p.block_rows, parts.dim);
  const int64_t entry = work.batch * static_cast<int64_t>(p.num_kv_heads) + work.kv_head;
  float* const partials = p.partial + entry * (p.page_splits + p.segment_splits) * stride;
  sum_parts(p, work, parts, partials + work.slot * stride);
  if (work.slots == 1 || !is_last_block(p, work, parts.word)) return;
  merge_splits(p, work, parts.dim, partials, stride);
}

}  // namespace lychee::cuda
