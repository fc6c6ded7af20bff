// SPDX-License-Identifier: Apache-2.0
// What the memory_attention kernels share: a block's part of the work, tiles of keys and values in
// device memory, and copies of them to shared memory.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"
#include "cuda/memory_attention_params.h"
#include "cuda/memory_attention_plan.h"

namespace lychee::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kMinusInfinity = -INFINITY;
// Weights times the scales of 8-bit values stay clear of fp16's subnormal numbers by this factor.
constexpr float kValueBoost = 256.0f;

// Pairs of a 16-bit type in 32 bits.
template <class T>
struct Pair;

template <>
struct Pair<BFloat16> {
  LYCHEE_DEVICE static uint32_t pack(float low, float high) { return pack_bf16(low, high); }
  LYCHEE_DEVICE static float low(uint32_t pair) { return bf16_low(pair); }
  LYCHEE_DEVICE static float high(uint32_t pair) { return bf16_high(pair); }
  LYCHEE_DEVICE static void multiply(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
    mma_bf16(d, a, b);
  }
};

template <>
struct Pair<Float16> {
  LYCHEE_DEVICE static uint32_t pack(float low, float high) { return pack_f16(low, high); }
  LYCHEE_DEVICE static float low(uint32_t pair) { return f16_low(pair); }
  LYCHEE_DEVICE static float high(uint32_t pair) { return f16_high(pair); }
  LYCHEE_DEVICE static void multiply(float (&d)[4], const uint32_t (&a)[4],
                                     const uint32_t (&b)[2]) {
    mma_f16(d, a, b);
  }
};

// One block's part: rows of one batch entry and kv head, and ranges of tiles. Rows are query tokens
// x heads of the kv head, heads innermost.
struct Work {
  int batch, kv_head;
  int first_row, rows;
  int slot, slots;  // this split, and how many the entry has
  int page_begin, page_end, segment_begin, segment_end;
};

// Whether there is anything to do: the grid is as large as the longest entry needs. An entry
// without keys keeps one block, which writes that.
LYCHEE_DEVICE bool find_work(const MemoryAttentionParams& p, Work& work) {
  const int splits = p.page_splits + p.segment_splits;
  const int row_block = splits > 0 ? 0 : blockIdx.x;
  work.slot = splits > 0 ? blockIdx.x : 0;
  work.kv_head = blockIdx.y;
  work.batch = blockIdx.z;
  work.first_row = row_block * p.block_rows;
  work.rows = min(static_cast<int>(p.num_queries) * p.group - work.first_row, p.block_rows);

  int pages = 0;
  if (p.num_pages != nullptr) pages = max(0, min(p.num_pages[work.batch], p.max_pages));
  const int page_tiles = pages * p.tiles_per_page;
  const int segment_tiles = static_cast<int>(divide_up(p.num_keys, kTileKeys));
  work.page_begin = work.segment_begin = 0;
  work.page_end = page_tiles;
  work.segment_end = segment_tiles;
  work.slots = 1;
  if (splits == 0) return true;

  const int page_share = static_cast<int>(tiles_per_split(page_tiles));
  const int page_splits = static_cast<int>(divide_up(page_tiles, page_share));
  const int segment_share = static_cast<int>(tiles_per_split(segment_tiles));
  work.slots = max(1, page_splits + p.segment_splits);
  work.page_begin = min(page_tiles, work.slot * page_share);
  work.page_end = min(page_tiles, work.page_begin + page_share);
  work.segment_begin = min(segment_tiles, max(0, work.slot - page_splits) * segment_share);
  work.segment_end = min(segment_tiles, work.segment_begin + segment_share);
  if (work.slot < page_splits) work.segment_end = work.segment_begin;
  return work.slot < work.slots;
}

// The last key of the segment that a query token sees; -1: none.
LYCHEE_DEVICE int last_key(const MemoryAttentionParams& p, int64_t token) {
  const int64_t last = p.num_keys - 1 - (p.num_queries - 1 - token) * p.query_stride;
  return static_cast<int>(max(last, static_cast<int64_t>(-1)));
}

// Up to kTileKeys keys and values in device memory.
struct Tile {
  const unsigned char *k, *v;  // their first rows
  const float* scale;          // of the first key
  int position;                // of the first key; pages in affine mode
  uint32_t keep[2];            // bit i % 32 of word i / 32: key i exists and is not hidden
};

LYCHEE_DEVICE uint32_t low_bits(int count) { return count >= 32 ? ~0u : (1u << max(count, 0)) - 1; }

// Tiles of one batch entry's pages. Table entries may hold anything: what they name outside of the
// bank or the tables counts as empty, since the host does not look at them.
struct PageSource {
  static constexpr bool kSegment = false;
  const MemoryAttentionParams& p;
  int64_t first_entry, element_bytes;
  const unsigned char* head;
  const float* head_scale;

  LYCHEE_DEVICE PageSource(const MemoryAttentionParams& params, const Work& work, int bytes)
      : p(params),
        first_entry(static_cast<int64_t>(work.batch) * p.max_pages),
        element_bytes(bytes) {
    head =
        static_cast<const unsigned char*>(p.kv) + work.kv_head * p.page_head_stride * element_bytes;
    head_scale = p.kv_scale + work.kv_head * p.scale_head_stride;
  }
  LYCHEE_DEVICE int64_t k_stride() const { return p.page_token_stride * element_bytes; }
  LYCHEE_DEVICE int64_t v_stride() const { return k_stride(); }

  LYCHEE_DEVICE Tile tile(int index) const {
    int entry = index, first = 0;
    if (p.tiles_per_page > 1) {
      entry = index / p.tiles_per_page;
      first = (index - entry * p.tiles_per_page) * kTileKeys;
    }
    int64_t page = p.page_table[first_entry + entry];
    int count = min(min(p.page_len[first_entry + entry], p.page_tokens) - first, kTileKeys);
    if (page < 0 || page >= p.bank_pages) page = count = 0;
    Tile tile;
    tile.position = 0;
    if (p.page_base != nullptr) {
      count = min(count, p.positions);
      const int base = max(p.page_base[first_entry + entry], 0);
      // inside the tables also where no key is kept
      tile.position = min(base, p.positions - max(count, 1) - first) + first;
    }
    tile.k = head + (page * p.page_stride + first * p.page_token_stride) * element_bytes;
    tile.v = tile.k + p.page_part_stride * element_bytes;
    tile.scale = head_scale + page * p.scale_page_stride + first;
    tile.keep[0] = low_bits(count);
    tile.keep[1] = low_bits(count - 32);
    return tile;
  }
};

// Tiles of one batch entry's contiguous segment. Every lane of a warp must call tile together.
struct SegmentSource {
  static constexpr bool kSegment = true;
  const MemoryAttentionParams& p;
  int64_t element_bytes;
  const unsigned char *k, *v;
  const bool* valid;

  LYCHEE_DEVICE SegmentSource(const MemoryAttentionParams& params, const Work& work, int bytes)
      : p(params), element_bytes(bytes) {
    const int64_t batch = work.batch, head = work.kv_head;
    k = static_cast<const unsigned char*>(p.k) +
        (batch * p.k_batch_stride + head * p.k_head_stride) * element_bytes;
    v = static_cast<const unsigned char*>(p.v) +
        (batch * p.v_batch_stride + head * p.v_head_stride) * element_bytes;
    valid = p.valid == nullptr ? nullptr : p.valid + batch * p.valid_stride;
  }
  LYCHEE_DEVICE int64_t k_stride() const { return p.k_token_stride * element_bytes; }
  LYCHEE_DEVICE int64_t v_stride() const { return p.v_token_stride * element_bytes; }

  LYCHEE_DEVICE Tile tile(int index) const {
    const int64_t first = static_cast<int64_t>(index) * kTileKeys;
    const int count = static_cast<int>(min(p.num_keys - first, static_cast<int64_t>(kTileKeys)));
    Tile tile;
    tile.k = k + first * k_stride();
    tile.v = v + first * v_stride();
    tile.scale = nullptr;
    tile.position = 0;
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      tile.keep[word] = low_bits(count - word * 32);
      if (valid == nullptr) continue;
      const int key = word * 32 + static_cast<int>(threadIdx.x & 31);
      tile.keep[word] = __ballot_sync(kAllLanes, key < count && valid[first + key]);
    }
    return tile;
  }
};

// Where 16-byte piece `chunk` of a row lies in a tile: eight rows that ldmatrix reads together
// never share banks.
template <int kRowBytes>
LYCHEE_DEVICE int swizzled(int row, int chunk) {
  static_assert(kRowBytes == 64 || kRowBytes % 128 == 0);
  return row * kRowBytes + ((chunk ^ (kRowBytes == 64 ? row >> 1 & 3 : row & 7)) << 4);
}

// Starts copying a tile's rows; rows that are not kept become zero, whatever they hold.
template <int kRowBytes>
LYCHEE_DEVICE void copy_rows(unsigned char* shared, const unsigned char* rows, int64_t stride,
                             const uint32_t (&keep)[2]) {
  constexpr int kChunks = kRowBytes / 16, kRows = kAttentionThreads / kChunks;
  const int row = static_cast<int>(threadIdx.x) / kChunks;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  unsigned char* const target = shared + swizzled<kRowBytes>(row, chunk);
  const unsigned char* source = rows + row * stride + chunk * 16;
#pragma unroll
  for (int i = 0; i < kTileKeys; i += kRows) {
    copy_async(target + i * kRowBytes, source, keep[i / 32] >> row >> i % 32 & 1);
    source += kRows * stride;
  }
}

// The scales of a tile's keys, then of its values: 2 * kTileKeys floats. Those past the last key
// kept may be zero or garbage.
LYCHEE_DEVICE void copy_scales(float* shared, const Tile& tile, int64_t part_stride) {
  constexpr int kChunks = kTileKeys / 4;
  const int chunk = static_cast<int>(threadIdx.x) % kChunks;
  const int part = static_cast<int>(threadIdx.x) / kChunks;
  if (part > 1) return;
  const uint32_t keep = chunk < kChunks / 2 ? tile.keep[0] : tile.keep[1];
  const bool kept = keep >> chunk % 8 * 4 & 15;
  copy_async(shared + part * kTileKeys + chunk * 4, tile.scale + part * part_stride + chunk * 4,
             kept);
}

// The query token and head of one row of the work.
struct Row {
  int64_t token, head;
};

LYCHEE_DEVICE Row find_row(const MemoryAttentionParams& p, const Work& work, int row) {
  const int token = (work.first_row + row) / p.group;
  return {token, work.kv_head * p.group + (work.first_row + row - token * p.group)};
}

// The end of the segment's tiles that the last of the rows, and so any of them, sees.
LYCHEE_DEVICE int seen_segment_end(const MemoryAttentionParams& p, const Work& work) {
  const int last = last_key(p, find_row(p, work, work.rows - 1).token);
  return min(work.segment_end, (last + kTileKeys) / kTileKeys);
}

// Elements before a row's queries, before its outputs, and before its lse.
LYCHEE_DEVICE int64_t query_offset(const MemoryAttentionParams& p, const Work& work, Row row) {
  return work.batch * p.q_batch_stride + row.head * p.q_head_stride + row.token * p.q_token_stride;
}

LYCHEE_DEVICE int64_t output_offset(const MemoryAttentionParams& p, const Work& work, Row row) {
  return ((work.batch * p.num_queries + row.token) * p.num_heads + row.head) * p.head_dim;
}

LYCHEE_DEVICE int64_t lse_offset(const MemoryAttentionParams& p, const Work& work, Row row) {
  return (static_cast<int64_t>(work.batch) * p.num_heads + row.head) * p.num_queries + row.token;
}

// exp2(x - maximum) where the maximum may be -inf: no key was seen then, and nothing is added.
LYCHEE_DEVICE float weight(float x, float maximum) {
  return exp2_approx(x - (maximum == kMinusInfinity ? 0.0f : maximum));
}

LYCHEE_DEVICE void store_lse(const MemoryAttentionParams& p, const Work& work, Row row,
                             float log2_sum) {
  constexpr float kLn2 = 0.693147180559945309f;
  p.lse[lse_offset(p, work, row)] = log2_sum * kLn2;
}

}  // namespace lychee::cuda
