// SPDX-License-Identifier: Apache-2.0
// Eight-lane float vectors on AVX2, FMA and F16C; include after the target pragma. Internal
// linkage.
#pragma once

#include "dispatch.h"

namespace lychee {
namespace {

using Vec = __m256;
constexpr int kLanes = 8;
// Register blocking of the matrix products: rows x vectors of columns, 12 of 16 registers.
constexpr int kRowBlock = 6;
constexpr int kColBlock = 2;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline float reduce_add(Vec a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline float reduce_max(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
inline bool any_greater(Vec a, Vec b) {
  return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vec load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load(const int8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}
inline Vec load(const Float8E4M3* p) {
  const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi32(0x7f));
  // Exponent bias 7 becomes 127; subnormals are mantissa * 2^-9; 0x7f is NaN.
  __m256i bits = _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23));
  const __m256 subnormal =
      _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0.001953125f));
  bits = _mm256_blendv_epi8(bits, _mm256_castps_si256(subnormal),
                            _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude));
  bits = _mm256_blendv_epi8(bits, _mm256_set1_epi32(0x7fc00000),
                            _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f)));
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(x, _mm256_set1_epi32(0x80)), 24);
  return _mm256_castsi256_ps(_mm256_or_si256(bits, sign));
}

// The low 16 bits of each lane, in order.
inline __m128i narrow(__m256i x) {
  return _mm_packus_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
}

inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline void store(BFloat16* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0),
                               _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(rounded));
}
inline void store(Float16* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// Rounds to nearest even; x lies within int8 range.
inline void store(int8_t* p, Vec x) {
  const __m256i rounded = _mm256_cvtps_epi32(x);
  const __m128i words =
      _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

// 2^x for x below 2^7, exactly 0 below -126, NaN for NaN. Minimax polynomial on [0, 1), relative
// error 8.2e-8.
inline Vec exp2(Vec x) {
  const Vec clamped = _mm256_max_ps(_mm256_set1_ps(-126.0f), x);  // of a NaN, its second argument
  const Vec floor = _mm256_floor_ps(clamped);
  const Vec f = _mm256_sub_ps(clamped, floor);
  Vec y = _mm256_fmadd_ps(_mm256_set1_ps(0.001867130515165627f), f,
                          _mm256_set1_ps(0.009017029777169228f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(0.05579991266131401f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(0.24016444385051727f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(0.6931512951850891f));
  y = _mm256_fmadd_ps(y, f, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(floor), 23);
  y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
  return _mm256_and_ps(y, _mm256_cmp_ps(x, _mm256_set1_ps(-126.0f), _CMP_NLT_UQ));
}

// Lanes `count` and above become -inf.
inline Vec keep_first(Vec x, int64_t count) {
  const int bound = count >= kLanes ? kLanes : count <= 0 ? 0 : static_cast<int>(count);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i keep = _mm256_cmpgt_epi32(_mm256_set1_epi32(bound), lane);
  return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, _mm256_castsi256_ps(keep));
}
// Lanes whose `keep` is 0 become -inf.
inline Vec keep_where(Vec x, Vec keep) {
  const Vec mask = _mm256_cmp_ps(keep, _mm256_setzero_ps(), _CMP_NEQ_OQ);
  return _mm256_blendv_ps(_mm256_set1_ps(-INFINITY), x, mask);
}

inline void transpose(Vec (&r)[kLanes]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

// a, then b.
template <class T>
inline void store_pair(T* p, Vec a, Vec b) {
  store(p, a);
  store(p + kLanes, b);
}

// 2 * kLanes consecutive elements as the even and the odd ones: shifts instead of shuffles.
inline void load_even_odd(const BFloat16* p, Vec* even, Vec* odd) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  *even = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 16));
  *odd = _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0xffff0000)));
}
// Rounds to bfloat16, nearest even, and puts the two vectors back together. The lower half of a NaN
// must be zero, as it is in every NaN that arithmetic makes or takes from bfloat16.
inline __m256i pack_even_odd(Vec even, Vec odd) {
  const __m256i low = _mm256_castps_si256(even), high = _mm256_castps_si256(odd);
  const __m256i kept = _mm256_blend_epi16(_mm256_srli_epi32(low, 16), high, 0xaa);
  const __m256i cut = _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
  // Up where more than half is cut, or just half from an odd number.
  const __m256i above = _mm256_adds_epu16(cut, _mm256_and_si256(kept, _mm256_set1_epi16(1)));
  const __m256i half = _mm256_set1_epi16(-0x8000);
  const __m256i up = _mm256_cmpgt_epi16(_mm256_xor_si256(above, half), _mm256_setzero_si256());
  return _mm256_sub_epi16(kept, up);
}
inline void store_even_odd(BFloat16* p, Vec even, Vec odd) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_even_odd(even, odd));
}

// Stores that leave nothing in the cache; aligned to 64 bytes. fence() orders them.
inline void stream(float* p, Vec x) { _mm256_stream_ps(p, x); }
inline void stream_even_odd(BFloat16* p, Vec even, Vec odd) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), pack_even_odd(even, odd));
}
inline void stream_bytes(void* out, const void* in, int64_t size) {
  for (int64_t i = 0; i < size; i += 32) {
    const auto* from = reinterpret_cast<const __m256i*>(static_cast<const char*>(in) + i);
    auto* to = reinterpret_cast<__m256i*>(static_cast<char*>(out) + i);
    _mm256_stream_si256(to, _mm256_loadu_si256(from));
  }
}
inline void fence() { _mm_sfence(); }

// Rounds to nearest even; |x| <= 448. Subnormals are multiples of 2^-9.
inline void store(Float8E4M3* p, Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
  const __m256i normal = _mm256_sub_epi32(
      _mm256_srli_epi32(
          _mm256_add_epi32(magnitude, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7ffff))), 20),
      _mm256_set1_epi32(120 << 3));
  const __m256i subnormal =
      _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(512.0f)));
  const __m256i rounded = _mm256_blendv_epi8(
      normal, subnormal, _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), magnitude));
  const __m256i sign = _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80));
  const __m128i words = narrow(_mm256_or_si256(rounded, sign));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

// Lane i is the sum of the lanes of r[i].
inline Vec sum_each(const Vec (&r)[kLanes]) {
  __m256 half[4], pair[2];
  for (int i = 0; i < 4; ++i) {
    half[i] = _mm256_add_ps(_mm256_permute2f128_ps(r[i], r[i + 4], 0x20),
                            _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
  for (int i = 0; i < 2; ++i) {
    const __m256 a = half[2 * i], b = half[2 * i + 1];
    pair[i] = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
  }
  return _mm256_add_ps(_mm256_shuffle_ps(pair[0], pair[1], 0x88),
                       _mm256_shuffle_ps(pair[0], pair[1], 0xdd));
}

// Eight lanes of a; wider vectors have eight of b behind them.
inline Vec eights(float a, float) { return broadcast(a); }
inline Vec swap_eights(Vec x) { return x; }

}  // namespace
}  // namespace lychee
