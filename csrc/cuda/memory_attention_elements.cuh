// SPDX-License-Identifier: Apache-2.0
// Elements of 8-bit banks as pairs of halves, for the tensor cores of memory_attention with few
// query rows: exact up to a constant factor, which scores and outputs are freed of later.
#pragma once

#include "cuda/memory_attention_tiles.cuh"

namespace lychee::cuda {

// 16-bit elements are read as they are.
template <class Element>
struct Halves {
  static constexpr float kKeyFactor = 1.0f;

  // 16-bit types carry their NaN through everything, and no int8 code is NaN.
  struct NanWatch {
    LYCHEE_DEVICE void see(uint32_t) {}
    LYCHEE_DEVICE void mark(float (&)[4]) const {}
  };
};

template <>
struct Halves<int8_t> {
  static constexpr float kKeyFactor = 1.0f, kValueFactor = 1.0f;

  LYCHEE_DEVICE static void keys(uint32_t packed, uint32_t& low, uint32_t& high) {
    int8x4_to_f16x2<0x4140, 0x4342>(packed, low, high);
  }
  // Bytes 0 and 2, then bytes 1 and 3.
  LYCHEE_DEVICE static void values(uint32_t packed, uint32_t& even, uint32_t& odd) {
    int8x4_to_f16x2<0x4240, 0x4341>(packed, even, odd);
  }
  LYCHEE_DEVICE static float output(float x) { return x; }

  using NanWatch = Halves<BFloat16>::NanWatch;
};

#if LYCHEE_CONVERTS_E4M3

template <>
struct Halves<Float8E4M3> {
  static constexpr float kKeyFactor = 1.0f, kValueFactor = 1.0f;

  LYCHEE_DEVICE static void keys(uint32_t packed, uint32_t& low, uint32_t& high) {
    e4m3x4_to_f16x2(packed, low, high);
  }
  LYCHEE_DEVICE static void values(uint32_t packed, uint32_t& even, uint32_t& odd) {
    e4m3x4_to_f16x2(permute_bytes(packed, 0, 0x3120), even, odd);
  }
  LYCHEE_DEVICE static float output(float x) { return x; }

  using NanWatch = Halves<BFloat16>::NanWatch;
};

#else

// Bits are shifted into a half, which is then 2^-8 of the value, and 480 * 2^-8 for NaN. Times
// 140 * 2^8 that becomes infinity, while 448, the largest value, stays finite, and four significant
// bits times 140 are exact.
template <>
struct Halves<Float8E4M3> {
  static constexpr float kKeyFactor = 0x1p-8f, kValueFactor = 140.0f;
  static constexpr uint32_t kNanToInfinity = 0x78607860u;  // 140 * 2^8

  LYCHEE_DEVICE static void keys(uint32_t packed, uint32_t& low, uint32_t& high) {
    low = shift_e4m3x2<0x9180>(packed);
    high = shift_e4m3x2<0xb3a2>(packed);
  }
  LYCHEE_DEVICE static void values(uint32_t packed, uint32_t& even, uint32_t& odd) {
    even = mul_f16x2(shift_e4m3x2<0xa280>(packed), kNanToInfinity);
    odd = mul_f16x2(shift_e4m3x2<0xb391>(packed), kNanToInfinity);
  }
  // Only NaN values make infinite sums.
  LYCHEE_DEVICE static float output(float x) { return x + 0.0f * x; }

  // Of the keys of a fragment, a lane sees a part of key lane / 4; a key's scores become NaN if any
  // lane saw one.
  struct NanWatch {
    uint32_t largest = 0;
    LYCHEE_DEVICE void see(uint32_t pair) { largest = max_magnitude_f16x2(largest, pair); }
    LYCHEE_DEVICE void mark(float (&scores)[4]) const {
      // only NaN, as if it were 480, carries into bit 14
      const bool seen = (largest + 0x00800080u) & 0x40004000u;
      const uint32_t keys = __ballot_sync(kAllLanes, seen) >> (threadIdx.x & 3) * 8;
      if (keys & 0x0fu) scores[0] = scores[2] = NAN;
      if (keys & 0xf0u) scores[1] = scores[3] = NAN;
    }
  };
};

#endif

}  // namespace lychee::cuda
