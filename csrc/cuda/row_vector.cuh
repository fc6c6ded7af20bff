// SPDX-License-Identifier: Apache-2.0
// Consecutive elements of one row: loads and stores of up to 16 bytes, and conversions from and to
// float. Torch-free.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device.cuh"
#include "dispatch.h"

namespace lychee::cuda {

// kWidth elements as they lie in memory.
template <class T, int kWidth>
struct Run {
  static constexpr int kWords = kWidth * sizeof(T) / 4;
  static_assert(kWords > 0 && (kWords < 4 || kWords % 4 == 0) && kWords != 3);
  uint32_t words[kWords];
};

// How many elements a thread handles at once: 16 bytes of T where everything is aligned to that,
// else four elements, one by one.
template <class T, bool kFast>
inline constexpr int kRunWidth = kFast ? 16 / sizeof(T) : 4;

template <class T>
LYCHEE_DEVICE uint32_t element_bits(T x) {
  if constexpr (std::is_same_v<T, float>) {
    return as_bits(x);
  } else if constexpr (std::is_same_v<T, int8_t>) {
    return static_cast<uint8_t>(x);
  } else {
    return x.bits;
  }
}

template <class T>
LYCHEE_DEVICE T element_of(uint32_t bits) {
  if constexpr (std::is_same_v<T, float>) {
    return as_float(bits);
  } else if constexpr (std::is_same_v<T, int8_t>) {
    return static_cast<int8_t>(bits);
  } else {
    return {static_cast<decltype(T{}.bits)>(bits)};
  }
}

template <bool kFast, int kWidth, class T>
LYCHEE_DEVICE Run<T, kWidth> load_run(const T* in) {
  using R = Run<T, kWidth>;
  R run;
  if constexpr (!kFast) {
    constexpr int kPerWord = 4 / sizeof(T);
    for (int w = 0; w < R::kWords; ++w) {
      run.words[w] = 0;
      for (int i = 0; i < kPerWord; ++i) {
        run.words[w] |= element_bits(in[w * kPerWord + i]) << (8 * sizeof(T) * i);
      }
    }
  } else if constexpr (R::kWords == 1) {
    run.words[0] = *reinterpret_cast<const uint32_t*>(in);
  } else if constexpr (R::kWords == 2) {
    const uint2 x = *reinterpret_cast<const uint2*>(in);
    run.words[0] = x.x, run.words[1] = x.y;
  } else {
    for (int w = 0; w < R::kWords; w += 4) {
      const uint4 x = reinterpret_cast<const uint4*>(in)[w / 4];
      run.words[w] = x.x, run.words[w + 1] = x.y, run.words[w + 2] = x.z, run.words[w + 3] = x.w;
    }
  }
  return run;
}

template <bool kFast, int kWidth, class T>
LYCHEE_DEVICE void store_run(T* out, const Run<T, kWidth>& run) {
  using R = Run<T, kWidth>;
  if constexpr (!kFast) {
    constexpr int kPerWord = 4 / sizeof(T);
    for (int i = 0; i < kWidth; ++i) {
      out[i] = element_of<T>(run.words[i / kPerWord] >> (8 * sizeof(T) * (i % kPerWord)));
    }
  } else if constexpr (R::kWords == 1) {
    *reinterpret_cast<uint32_t*>(out) = run.words[0];
  } else if constexpr (R::kWords == 2) {
    *reinterpret_cast<uint2*>(out) = make_uint2(run.words[0], run.words[1]);
  } else {
    for (int w = 0; w < R::kWords; w += 4) {
      reinterpret_cast<uint4*>(out)[w / 4] =
          make_uint4(run.words[w], run.words[w + 1], run.words[w + 2], run.words[w + 3]);
    }
  }
}

template <class T, int kWidth>
LYCHEE_DEVICE void to_float(const Run<T, kWidth>& run, float (&x)[kWidth]) {
  if constexpr (std::is_same_v<T, float>) {
    for (int i = 0; i < kWidth; ++i) x[i] = as_float(run.words[i]);
  } else if constexpr (sizeof(T) == 2) {
    constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
    for (int w = 0; w < kWidth / 2; ++w) {
      x[2 * w] = kBFloat16 ? bf16_low(run.words[w]) : f16_low(run.words[w]);
      x[2 * w + 1] = kBFloat16 ? bf16_high(run.words[w]) : f16_high(run.words[w]);
    }
  } else {
    for (int w = 0; w < kWidth / 4; ++w) {
      float four[4];
      if constexpr (std::is_same_v<T, int8_t>) {
        int8x4_to_float(run.words[w], four);
      } else {
        e4m3x4_to_float(run.words[w], four);
      }
      for (int i = 0; i < 4; ++i) x[4 * w + i] = four[i];
    }
  }
}

// Rounds to nearest even; int8 and e4m3 saturate.
template <class T, int kWidth>
LYCHEE_DEVICE Run<T, kWidth> from_float(const float (&x)[kWidth]) {
  Run<T, kWidth> run;
  if constexpr (std::is_same_v<T, float>) {
    for (int i = 0; i < kWidth; ++i) run.words[i] = as_bits(x[i]);
  } else if constexpr (sizeof(T) == 2) {
    for (int w = 0; w < kWidth / 2; ++w) {
      run.words[w] = std::is_same_v<T, BFloat16> ? pack_bf16(x[2 * w], x[2 * w + 1])
                                                 : pack_f16(x[2 * w], x[2 * w + 1]);
    }
  } else {
    for (int w = 0; w < kWidth / 4; ++w) {
      const float four[4] = {x[4 * w], x[4 * w + 1], x[4 * w + 2], x[4 * w + 3]};
      run.words[w] = std::is_same_v<T, int8_t> ? pack_int8x4(four) : pack_e4m3x4(four);
    }
  }
  return run;
}

template <class T, int kWidth>
LYCHEE_DEVICE Run<T, kWidth> filled_run(float value) {
  float x[kWidth];
  for (int i = 0; i < kWidth; ++i) x[i] = value;
  return from_float<T>(x);
}

LYCHEE_DEVICE float not_a_number() { return as_float(0x7fc00000u); }

// Cosines and sines of one position, for the elements a thread handles.
template <int kWidth>
struct Angles {
  float cos[kWidth], sin[kWidth];
};

// A position outside of the tables rotates to NaN, and nothing is read.
template <bool kFast, int kWidth>
LYCHEE_DEVICE Angles<kWidth> load_angles(const float* cos, const float* sin, int64_t table_rows,
                                         int64_t half, int64_t position, int64_t d) {
  Angles<kWidth> angles;
  if (position < 0 || position >= table_rows) {
    for (int i = 0; i < kWidth; ++i) angles.cos[i] = angles.sin[i] = not_a_number();
    return angles;
  }
  to_float(load_run<kFast, kWidth>(cos + position * half + d), angles.cos);
  to_float(load_run<kFast, kWidth>(sin + position * half + d), angles.sin);
  return angles;
}

// (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)
template <int kWidth>
LYCHEE_DEVICE void rotate(const Angles<kWidth>& angles, float (&x1)[kWidth], float (&x2)[kWidth]) {
  for (int i = 0; i < kWidth; ++i) {
    const float y1 = x1[i] * angles.cos[i] - x2[i] * angles.sin[i];
    x2[i] = x2[i] * angles.cos[i] + x1[i] * angles.sin[i];
    x1[i] = y1;
  }
}

template <int kWidth>
LYCHEE_DEVICE void rotate_back(const Angles<kWidth>& angles, float (&x1)[kWidth],
                               float (&x2)[kWidth]) {
  for (int i = 0; i < kWidth; ++i) {
    const float y1 = x1[i] * angles.cos[i] + x2[i] * angles.sin[i];
    x2[i] = x2[i] * angles.cos[i] - x1[i] * angles.sin[i];
    x1[i] = y1;
  }
}

}  // namespace lychee::cuda
