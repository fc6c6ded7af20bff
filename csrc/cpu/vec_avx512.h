// SPDX-License-Identifier: Apache-2.0
// Sixteen-lane float vectors on AVX-512; include after the target pragma. Internal linkage only.
#pragma once

#include "dispatch.h"

namespace lychee {
namespace {

using Vec = __m512;
constexpr int kLanes = 16;
// Register blocking of the matrix products: rows x vectors of columns, 24 of 32 registers.
constexpr int kRowBlock = 6;
constexpr int kColBlock = 4;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a); }
inline bool any_greater(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}
inline Vec load(const Float8E4M3* p) {
  const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi32(0x7f));
  // Exponent bias 7 becomes 127; subnormals are mantissa * 2^-9; 0x7f is NaN.
  __m512i bits = _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23));
  const __m512 subnormal =
      _mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0.001953125f));
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8)),
                               _mm512_castps_si512(subnormal));
  bits = _mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f)),
                               _mm512_set1_epi32(0x7fc00000));
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(x, _mm512_set1_epi32(0x80)), 24);
  return _mm512_castsi512_ps(_mm512_or_si512(bits, sign));
}

inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void store(BFloat16* p, Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                                  _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}
inline void store(Float16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// Rounds to nearest even; x lies within int8 range.
inline void store(int8_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
}

// 2^x for x below 2^7, exactly 0 below -126 (subnormal weights would slow every product they
// enter), NaN for NaN. Minimax polynomial on [0, 1), relative error 8.2e-8.
inline Vec exp2(Vec x) {
  const Vec f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);
  Vec y = _mm512_fmadd_ps(_mm512_set1_ps(0.001867130515165627f), f,
                          _mm512_set1_ps(0.009017029777169228f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.05579991266131401f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.24016444385051727f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.6931512951850891f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return _mm512_maskz_scalef_ps(normal, y, x);
}

// Lanes `count` and above become -inf.
inline Vec keep_first(Vec x, int64_t count) {
  const __mmask16 keep = count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1;
  return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), keep, x);
}
// Lanes whose `keep` is 0 become -inf.
inline Vec keep_where(Vec x, Vec keep) {
  const __mmask16 mask = _mm512_cmp_ps_mask(keep, _mm512_setzero_ps(), _CMP_NEQ_OQ);
  return _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), mask, x);
}

inline void transpose(Vec (&r)[kLanes]) {
  __m512 t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 2]);
    const __m512d c = _mm512_castps_pd(t[4 * i + 1]), d = _mm512_castps_pd(t[4 * i + 3]);
    r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
    r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d));
    r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// a, then b.
template <class T>
inline void store_pair(T* p, Vec a, Vec b) {
  store(p, a);
  store(p + kLanes, b);
}

// Each lane's high 16 bits are x in bfloat16, rounded to nearest even.
inline __m512i round_to_high(Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i bias =
      _mm512_mask_mov_epi32(_mm512_set1_epi32(0x7fff), odd, _mm512_set1_epi32(0x8000));
  return _mm512_mask_add_epi32(_mm512_set1_epi32(0x7fc00000), _mm512_cmp_ps_mask(x, x, _CMP_ORD_Q),
                               bits, bias);
}
inline void store_pair(BFloat16* p, Vec a, Vec b) {
  const __m512i high =
      _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                       25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  _mm512_storeu_si512(p, _mm512_permutex2var_epi16(round_to_high(a), high, round_to_high(b)));
}

// 2 * kLanes consecutive elements as the even and the odd ones: shifts instead of shuffles.
inline void load_even_odd(const BFloat16* p, Vec* even, Vec* odd) {
  const __m512i bits = _mm512_loadu_si512(p);
  *even = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
  *odd = _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff0000)));
}
// Rounds to bfloat16, nearest even, and puts the two vectors back together. The lower half of a NaN
// must be zero, as it is in every NaN that arithmetic makes or takes from bfloat16.
inline __m512i pack_even_odd(Vec even, Vec odd) {
  const __m512i low = _mm512_castps_si512(even), high = _mm512_castps_si512(odd);
  const __mmask32 odd_words = 0xaaaaaaaa;
  const __m512i kept = _mm512_mask_mov_epi16(_mm512_srli_epi32(low, 16), odd_words, high);
  const __m512i cut = _mm512_mask_mov_epi16(low, odd_words, _mm512_slli_epi32(high, 16));
  // Up where more than half is cut, or just half from an odd number.
  const __m512i one = _mm512_set1_epi16(1);
  const __m512i above = _mm512_adds_epu16(cut, _mm512_and_si512(kept, one));
  const __mmask32 up = _mm512_cmpgt_epu16_mask(above, _mm512_set1_epi16(-0x8000));
  return _mm512_mask_add_epi16(kept, up, kept, one);
}
inline void store_even_odd(BFloat16* p, Vec even, Vec odd) {
  _mm512_storeu_si512(p, pack_even_odd(even, odd));
}

// Stores that leave nothing in the cache; aligned to 64 bytes. fence() orders them.
inline void stream(float* p, Vec x) { _mm512_stream_ps(p, x); }
inline void stream_even_odd(BFloat16* p, Vec even, Vec odd) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), pack_even_odd(even, odd));
}
inline void stream_bytes(void* out, const void* in, int64_t size) {
  for (int64_t i = 0; i < size; i += 64) {
    const __m512i bits = _mm512_loadu_si512(static_cast<const char*>(in) + i);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(out) + i), bits);
  }
}
inline void fence() { _mm_sfence(); }

// Rounds to nearest even; |x| <= 448. Subnormals are multiples of 2^-9.
inline void store(Float8E4M3* p, Vec x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, 20), _mm512_set1_epi32(1));
  const __m512i normal = _mm512_sub_epi32(
      _mm512_srli_epi32(
          _mm512_add_epi32(magnitude, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7ffff))), 20),
      _mm512_set1_epi32(120 << 3));
  const __m512i subnormal =
      _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_castsi512_ps(magnitude), _mm512_set1_ps(512.0f)));
  const __m512i rounded = _mm512_mask_mov_epi32(
      normal, _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(0x3c800000)), subnormal);
  const __m512i sign = _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm512_cvtepi32_epi8(_mm512_or_si512(rounded, sign)));
}

// Lane i is the sum of the lanes of r[i].
inline Vec sum_each(const Vec (&r)[kLanes]) {
  __m512 half[8], quarter[4], pair[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = r[i % 4 + i / 4 * 8], b = r[i % 4 + i / 4 * 8 + 4];
    half[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 4; ++i) {
    quarter[i] = _mm512_add_ps(_mm512_shuffle_f32x4(half[i], half[i + 4], 0x88),
                               _mm512_shuffle_f32x4(half[i], half[i + 4], 0xdd));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = quarter[2 * i], b = quarter[2 * i + 1];
    pair[i] = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  }
  return _mm512_add_ps(_mm512_shuffle_ps(pair[0], pair[1], 0x88),
                       _mm512_shuffle_ps(pair[0], pair[1], 0xdd));
}

// Eight lanes of a, then eight of b.
inline Vec eights(float a, float b) {
  return _mm512_mask_mov_ps(_mm512_set1_ps(a), 0xff00, _mm512_set1_ps(b));
}
inline Vec swap_eights(Vec x) { return _mm512_shuffle_f32x4(x, x, 0x4e); }

}  // namespace
}  // namespace lychee
