// SPDX-License-Identifier: Apache-2.0
// memory_attention in bfloat16 on AMX: the loop of memory_attention_kernel.inl over groups of 16
// rows, with both products in tile registers.
//
// A tile register holds 16 rows of 64 bytes. A product takes 32 numbers of each of 16 left rows
// and, of the right operand, 16 rows of pairs: two consecutive inner elements side by side for each
// of 16 columns. So keys are packed by transposing 32-bit words, values by interleaving two rows.
#include "cpu/isa.h"
#include "cpu/memory_attention.h"

#ifdef LYCHEE_HAS_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <type_traits>

namespace lychee {

// Runs on any processor, so it stands before the target below.
bool may_use_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // CPUID leaf 7, EDX
  constexpr unsigned kAvx512Bf16 = 1u << 5;               // leaf 7.1, EAX
  constexpr int kAskPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, ...)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kBf16) == 0 || (d & kTile) == 0)
    return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a & kAvx512Bf16) == 0) return false;
  return syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
}

}  // namespace lychee

// After the standard headers, so that nothing they define is compiled for this target.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512bf16,amx-tile,amx-bf16")

#define LYCHEE_VEC_HEADER "cpu/vec_avx512.h"
#include "cpu/memory_attention_kernel.inl"

namespace lychee {
namespace {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTilePairs = kTileBytes / 4;
constexpr int kParts = 3;
constexpr int64_t kDepth = 32;  // numbers of a left row in one tile register

// An item's scratch; `block` has the part that the shared code knows.
struct AmxBlock {
  Block block;
  BFloat16 *q, *weights;    // [rows, dim], [kAmxRows, kTileKeys]
  uint32_t *keys, *values;  // [kParts][dim / 32][4 columns], [2][dim / 16] registers of pairs
  float* rows;              // [kTileKeys, dim]
  int key_parts;            // of the tile at hand
  BFloat16* half_rows;      // [kTileKeys, dim]
};

AmxBlock place(const MemoryAttentionParams& p, int64_t item, float* scratch) {
  AmxBlock a;
  a.block = make_block(p, item, scratch);
  const int64_t rows = (p.block_rows + kAmxRows - 1) / kAmxRows * kAmxRows, dim = p.head_dim;
  const auto take = [&](int64_t floats) {
    float* place = scratch;
    scratch += floats;
    return place;
  };
  a.q = reinterpret_cast<BFloat16*>(take(rows * dim / 2));
  a.block.out = take(rows * dim);
  a.keys = reinterpret_cast<uint32_t*>(take(kParts * kTileKeys * dim / 2));
  a.values = reinterpret_cast<uint32_t*>(take(kTileKeys * dim / 2));
  a.rows = take(kTileKeys * dim);
  a.half_rows = reinterpret_cast<BFloat16*>(take(kTileKeys * dim / 2));
  a.block.scores = take(kAmxRows * kTileKeys);
  a.weights = reinterpret_cast<BFloat16*>(take(kAmxRows * kTileKeys / 2));
  a.block.keep = take(kTileKeys);
  a.block.sum = take(rows * kPadLanes);
  a.block.maximum = take(rows);
  memset(a.q, 0, rows * dim * sizeof(BFloat16));
  memset(a.block.out, 0, rows * dim * sizeof(float));
  memset(a.block.sum, 0, rows * kPadLanes * sizeof(float));
  memset(a.weights, 0, kAmxRows * kTileKeys * sizeof(BFloat16));
  return a;
}

void copy_queries(const MemoryAttentionParams& p, const AmxBlock& a) {
  const Block& block = a.block;
  const BFloat16* q = static_cast<const BFloat16*>(p.q) + block.batch * p.q_batch_stride;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t head = block.kv_head * block.group + r % block.group;
    const int64_t token = block.first_token + r / block.group;
    memcpy(a.q + r * p.head_dim, q + head * p.q_head_stride + token * p.q_token_stride,
           p.head_dim * sizeof(BFloat16));
    block.maximum[r] = -INFINITY;
  }
}

// Registers [d / 32][key / 16] of pairs along d. Scores of keys that are not there are replaced.
void pack_key_pairs(const BFloat16* k, int64_t stride, int64_t dim, int64_t count, uint32_t* keys) {
  for (int64_t d = 0; d < dim; d += kDepth) {
    for (int64_t first = 0; first < kTileKeys; first += 16, keys += kTilePairs) {
      if (first >= count) continue;
      Vec r[kLanes];
      for (int i = 0; i < 16; ++i) {
        r[i] = first + i < count
                   ? _mm512_loadu_ps(reinterpret_cast<const float*>(k + (first + i) * stride + d))
                   : zero();
      }
      transpose(r);
      for (int i = 0; i < 16; ++i) _mm512_storeu_ps(reinterpret_cast<float*>(keys) + i * 16, r[i]);
    }
  }
}

// Registers [key / 32][d / 16] of pairs along the keys; keys that are not there or not kept are
// zero, as a weight of zero does not undo what is not a number.
void pack_value_pairs(const BFloat16* v, int64_t stride, int64_t dim, int64_t count,
                      const float* keep, uint32_t* values) {
  const auto row = [&](int64_t j, int64_t d) {
    if (j >= count || (keep != nullptr && keep[j] == 0.0f)) return _mm512_setzero_si512();
    const BFloat16* p = v + j * stride + d;
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  };
  for (int64_t first = 0; first < kTileKeys; first += kDepth) {
    for (int64_t d = 0; d < dim; d += 16) {
      for (int64_t j = first; j < first + kDepth; j += 2, values += 16) {
        const __m512i pairs = _mm512_or_si512(row(j, d), _mm512_slli_epi32(row(j + 1, d), 16));
        _mm512_storeu_si512(values, pairs);
      }
    }
  }
}

// The float rows in bfloat16; what rounding took away stays in their place.
void split_rows(const AmxBlock& a, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const Vec x = load(a.rows + i);
    store(a.half_rows + i, x);
    const __mmask16 infinite = _mm512_fpclass_ps_mask(x, 0x99);  // or not a number
    store(a.rows + i, _mm512_maskz_sub_ps(_mm512_knot(infinite), x, load(a.half_rows + i)));
  }
}

// Keys of a page: as they lie, or dequantised and rotated in float32 and then in three parts of
// bfloat16 that sum up to float32, as one would cost the log-sum-exp its accuracy.
template <bool kRotate, class T>
int pack_page_keys(const T* k, int64_t stride, const TileSource& source, int64_t count,
                   const AmxBlock& a) {
  const int64_t dim = a.block.dim;
  if constexpr (std::is_same_v<T, BFloat16> && !kRotate) {
    pack_key_pairs(k, stride, dim, count, a.keys);
    return 1;
  }
  load_rows<kRotate>(k, stride, source.scale, nullptr, source.cos, source.sin, dim, count, a.rows,
                     dim);
  for (int part = 0; part < kParts; ++part) {
    split_rows(a, count * dim);
    pack_key_pairs(a.half_rows, dim, dim, count, a.keys + part * (kTileKeys * dim / 2));
  }
  return kParts;
}

template <class T>
void pack_page_values(const T* v, int64_t stride, const float* scale, int64_t count,
                      const AmxBlock& a) {
  const int64_t dim = a.block.dim;
  if constexpr (std::is_same_v<T, BFloat16>) {
    return pack_value_pairs(v, stride, dim, count, nullptr, a.values);
  }
  load_rows<false>(v, stride, scale, nullptr, nullptr, nullptr, dim, count, a.rows, dim);
  split_rows(a, count * dim);
  pack_value_pairs(a.half_rows, dim, dim, count, nullptr, a.values);
}

TileView pack_page(const MemoryAttentionParams& p, AmxBlock* a, const KeyTile& tile) {
  const TileSource source = page_source(p, a->block.kv_head, tile);
  dispatch_bank_dtype(p.bank_dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* k = page_keys<T>(p, a->block.kv_head, tile);
    const auto pack = source.cos == nullptr ? pack_page_keys<false, T> : pack_page_keys<true, T>;
    a->key_parts = pack(k, p.page_token_stride, source, tile.count, *a);
    pack_page_values(k + p.page_part_stride, p.page_token_stride, source.value_scale, tile.count,
                     *a);
  });
  return {nullptr, 0, nullptr, tile.count, tile.count, 0};
}

TileView pack_segment(const MemoryAttentionParams& p, AmxBlock* a, const KeyTile& tile) {
  const Block& block = a->block;
  a->key_parts = 1;
  const float* keep = load_keep(p, block.batch, tile, block.keep);
  pack_key_pairs(segment_keys<BFloat16>(p, block.batch, block.kv_head, tile), p.k_token_stride,
                 p.head_dim, tile.count, a->keys);
  pack_value_pairs(segment_values<BFloat16>(p, block.batch, block.kv_head, tile), p.v_token_stride,
                   p.head_dim, tile.count, keep, a->values);
  return segment_view(p, tile, nullptr, 0, keep);
}

// scores[16][kTileKeys] = q * keys; registers 0 to 3 sum up, 4 is q, 5 and 6 are keys.
inline void score_group(const BFloat16* q, const uint32_t* keys, int parts, int64_t dim,
                        float* scores) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t d = 0; d < parts * dim; d += kDepth, keys += 4 * kTilePairs) {
    _tile_loadd(4, q + d % dim, dim * 2);
    _tile_loadd(5, keys, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, keys + kTilePairs, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, keys + 2 * kTilePairs, 64);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, keys + 3 * kTilePairs, 64);
    _tile_dpbf16ps(3, 4, 6);
  }
  _tile_stored(0, scores, kTileKeys * 4);
  _tile_stored(1, scores + 16, kTileKeys * 4);
  _tile_stored(2, scores + 32, kTileKeys * 4);
  _tile_stored(3, scores + 48, kTileKeys * 4);
}

// out[16][dim] += weights * values, 32 columns at a time in registers 0 and 1.
inline void value_group(const BFloat16* weights, const uint32_t* values, int64_t dim, float* out) {
  const int64_t half = dim / 16 * kTilePairs;  // of the tile's keys
  for (int64_t d = 0; d < dim; d += 32, values += 2 * kTilePairs) {
    _tile_loadd(0, out + d, dim * 4);
    _tile_loadd(1, out + d + 16, dim * 4);
    _tile_loadd(4, weights, kTileKeys * 2);
    _tile_loadd(5, values, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, values + kTilePairs, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(4, weights + kDepth, kTileKeys * 2);
    _tile_loadd(5, values + half, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, values + half + kTilePairs, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_stored(0, out + d, dim * 4);
    _tile_stored(1, out + d + 16, dim * 4);
  }
}

void attend_group(const MemoryAttentionParams& p, const AmxBlock& a, const TileView& view,
                  int64_t row) {
  const Block& block = a.block;
  const int64_t count = block.rows - row < kAmxRows ? block.rows - row : kAmxRows;
  const int64_t visible = view.visible(block.first_token + (row + count - 1) / block.group);
  if (visible == 0) return;
  score_group(a.q + row * p.head_dim, a.keys, a.key_parts, p.head_dim, block.scores);
  const Vec scale = broadcast(p.softmax_scale * kLog2E);
  for (int64_t i = 0; i < count * kTileKeys; i += kLanes) {
    store(block.scores + i, mul(load(block.scores + i), scale));
  }
  softmax_rows(block, view, row, count, kTileKeys / kLanes, visible);
  for (int64_t i = 0; i < count * kTileKeys; i += kLanes) {
    const __m256bh half = _mm512_cvtneps_pbh(load(block.scores + i));
    memcpy(a.weights + i, &half, sizeof half);
  }
  value_group(a.weights, a.values, p.head_dim, block.out + row * p.head_dim);
}

// All eight registers with 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace

void memory_attention_amx(const MemoryAttentionParams& p, int64_t item, float* scratch) {
  AmxBlock a = place(p, item, scratch);
  int64_t begin, end;
  tile_range(p, a.block, &begin, &end);
  copy_queries(p, a);
  const TileConfig config;
  _tile_loadconfig(&config);
  for_tiles(p, a.block, begin, end, [&](const KeyTile& tile) {
    const TileView view = tile.page < 0 ? pack_segment(p, &a, tile) : pack_page(p, &a, tile);
    for (int64_t row = 0; row < a.block.rows; row += kAmxRows) attend_group(p, a, view, row);
  });
  _tile_release();
  finish_rows<BFloat16>(p, a.block, item);
}

}  // namespace lychee
#else
namespace lychee {
bool may_use_amx() { return false; }
// cpu_isa() is never kAmx here.
void memory_attention_amx(const MemoryAttentionParams&, int64_t, float*) {}
}  // namespace lychee
#endif
