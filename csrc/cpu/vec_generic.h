// SPDX-License-Identifier: Apache-2.0
// Four-lane float vectors in the compiler's vector extension: any CPU, no special flags.
#pragma once

#include "dispatch.h"

namespace lychee {
namespace {

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t IntVec __attribute__((vector_size(16)));
constexpr int kLanes = 4;
// Register blocking of the matrix products: rows x vectors of columns, 8 of 16 registers.
constexpr int kRowBlock = 4;
constexpr int kColBlock = 2;

inline Vec broadcast(float x) { return Vec{x, x, x, x}; }
inline Vec zero() { return broadcast(0.0f); }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec abs(Vec a) { return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(a) & 0x7fffffff); }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec fms(Vec a, Vec b, Vec c) { return a * b - c; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline float reduce_add(Vec a) { return (a[0] + a[2]) + (a[1] + a[3]); }
inline float reduce_max(Vec a) {
  const float x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
inline bool any_greater(Vec a, Vec b) {
  const IntVec greater = a > b;
  return (greater[0] | greater[1] | greater[2] | greater[3]) != 0;
}

inline float from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t to_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return x; }
inline float to_float(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
  const uint32_t magnitude = x.bits & 0x7fff;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  // Exponent bias 15 becomes 127; the largest exponent is inf or NaN; subnormals are m * 2^-24.
  if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | magnitude << 13);
  if (magnitude >= 0x0400) return from_bits(sign | ((magnitude << 13) + (112u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
  return sign ? -subnormal : subnormal;
}
inline float to_float(Float8E4M3 x) {
  const uint32_t magnitude = x.bits & 0x7f;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80) << 24;
  // Exponent bias 7 becomes 127; subnormals are mantissa * 2^-9; 0x7f is NaN.
  if (magnitude == 0x7f) return from_bits(sign | 0x7fc00000);
  if (magnitude >= 8) return from_bits(sign | ((magnitude << 20) + (120u << 23)));
  const float subnormal = static_cast<float>(magnitude) * 0.001953125f;
  return sign ? -subnormal : subnormal;
}

inline void from_float(float* p, float x) { *p = x; }
inline void from_float(int8_t* p, float x) { *p = static_cast<int8_t>(rintf(x)); }
inline void from_float(BFloat16* p, float x) {
  const uint32_t bits = to_bits(x);
  p->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(Float16* p, float x) {
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {  // rounds to 2^16 or more
    half = 0x7c00;
  } else if (magnitude >= 0x38800000) {
    half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  } else {
    half = static_cast<uint32_t>(rintf(from_bits(magnitude) * 16777216.0f));
  }
  p->bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

template <class T>
inline Vec load(const T* p) {
  return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class T>
inline void store(T* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) from_float(p + i, x[i]);
}

// 2^x for x below 2^7, exactly 0 below -126, NaN for NaN. Minimax polynomial on [0, 1), relative
// error 8.2e-8.
inline Vec exp2(Vec x) {
  const Vec clamped = x < -126.0f ? broadcast(-126.0f) : x;
  const IntVec truncated = __builtin_convertvector(clamped, IntVec);
  const IntVec floor = truncated + (__builtin_convertvector(truncated, Vec) > clamped);
  const Vec f = clamped - __builtin_convertvector(floor, Vec);
  Vec y = 0.001867130515165627f * f + 0.009017029777169228f;
  y = y * f + 0.05579991266131401f;
  y = y * f + 0.24016444385051727f;
  y = y * f + 0.6931512951850891f;
  y = y * f + 1.0f;
  y = reinterpret_cast<Vec>(reinterpret_cast<IntVec>(y) + (floor << 23));
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(y) & ~(x < -126.0f));
}

// Lanes `count` and above become -inf.
inline Vec keep_first(Vec x, int64_t count) {
  for (int i = 0; i < kLanes; ++i) {
    if (i >= count) x[i] = -INFINITY;
  }
  return x;
}
// Lanes whose `keep` is 0 become -inf.
inline Vec keep_where(Vec x, Vec keep) { return keep != 0.0f ? x : broadcast(-INFINITY); }

inline void transpose(Vec (&r)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = x;
    }
  }
}

// a, then b.
template <class T>
inline void store_pair(T* p, Vec a, Vec b) {
  store(p, a);
  store(p + kLanes, b);
}

typedef uint32_t UintVec __attribute__((vector_size(16)));

// 2 * kLanes consecutive elements as the even and the odd ones: shifts instead of shuffles.
constexpr bool kEvenIsLow = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
inline void load_even_odd(const BFloat16* p, Vec* even, Vec* odd) {
  UintVec bits;
  memcpy(&bits, p, sizeof bits);
  *(kEvenIsLow ? even : odd) = reinterpret_cast<Vec>(bits << 16);
  *(kEvenIsLow ? odd : even) = reinterpret_cast<Vec>(bits & 0xffff0000);
}
// The float's bits, rounded to nearest even in the upper half. The lower half of a NaN must be
// zero, as it is in every NaN that arithmetic makes or takes from bfloat16.
inline UintVec round_to_upper_half(Vec x) {
  const UintVec bits = reinterpret_cast<UintVec>(x);
  return bits + 0x7fff + (bits >> 16 & 1);
}
inline void store_even_odd(BFloat16* p, Vec even, Vec odd) {
  const UintVec low = round_to_upper_half(kEvenIsLow ? even : odd) >> 16;
  const UintVec high = round_to_upper_half(kEvenIsLow ? odd : even) & 0xffff0000;
  const UintVec bits = low | high;
  memcpy(p, &bits, sizeof bits);
}

// No portable way to store past the cache.
inline void stream(float* p, Vec x) { store(p, x); }
inline void stream_even_odd(BFloat16* p, Vec even, Vec odd) { store_even_odd(p, even, odd); }
inline void stream_bytes(void* out, const void* in, int64_t size) { memcpy(out, in, size); }
inline void fence() {}

// Rounds to nearest even; |x| <= 448. Subnormals are multiples of 2^-9.
inline void store(Float8E4M3* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t bits = to_bits(x[i]), magnitude = bits & 0x7fffffff;
    const uint32_t normal = ((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - (120 << 3);
    const uint32_t subnormal = static_cast<uint32_t>(rintf(from_bits(magnitude) * 512.0f));
    const uint32_t rounded = from_bits(magnitude) < 0.015625f ? subnormal : normal;
    p[i].bits = static_cast<uint8_t>(bits >> 24 & 0x80 | rounded);
  }
}

// Lane i is the sum of the lanes of r[i].
inline Vec sum_each(const Vec (&r)[kLanes]) {
  return Vec{reduce_add(r[0]), reduce_add(r[1]), reduce_add(r[2]), reduce_add(r[3])};
}

// As many lanes of a as there are; wider vectors have eight of b behind eight of a.
inline Vec eights(float a, float) { return broadcast(a); }
inline Vec swap_eights(Vec x) { return x; }

}  // namespace
}  // namespace lychee
