// SPDX-License-Identifier: Apache-2.0
// What the sanitizer's tests share: a list of cases, guarded buffers, and exact number formats.
// A new op adds one file with CASE(...) functions; test_sanitizer.py finds it.
#pragma once

#include <math.h>
#include <sanitizer/asan_interface.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <utility>
#include <vector>

#include "dispatch.h"

namespace sanitizer_test {

using lychee::Dtype;

struct Case {
  const char* name;
  void (*run)();
};
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

#define CASE(name)                                                \
  static void name();                                             \
  [[maybe_unused]] static const bool name##_listed =              \
      (::sanitizer_test::cases().push_back({#name, name}), true); \
  static void name()

#define EXPECT(condition)                                                      \
  do {                                                                         \
    if (!(condition)) {                                                        \
      fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #condition); \
      exit(1);                                                                 \
    }                                                                          \
  } while (0)

// The builds of kernel `fn` that this processor runs.
template <class Fn>
std::vector<Fn> runnable(Fn generic, [[maybe_unused]] Fn avx2, [[maybe_unused]] Fn avx512) {
  std::vector<Fn> builds = {generic};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    builds.push_back(avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      builds.push_back(avx512);
    }
  }
#endif
  return builds;
}
#if defined(__x86_64__)
#define RUNNABLE(fn) ::sanitizer_test::runnable(fn##_generic, fn##_avx2, fn##_avx512)
#else
#define RUNNABLE(fn) ::sanitizer_test::runnable(fn##_generic, fn##_generic, fn##_generic)
#endif

// Uniform in (-1, 1), the same sequence in every run.
inline double random_value() {
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<double>(static_cast<int64_t>(state)) * 0x1p-63;
}

// An integer, 0 <= value < count.
inline int64_t random_below(int64_t count) {
  return static_cast<int64_t>((random_value() + 1) / 2 * count);
}

inline int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat32                                ? 4
         : dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16 ? 2
                                                                 : 1;
}

// x rounded to nearest even with so many binary digits; below min_exponent the step stays.
inline double round_digits(double x, int digits, int min_exponent) {
  if (x == 0) return x;
  int exponent;
  frexp(x, &exponent);
  if (exponent - 1 < min_exponent) exponent = min_exponent + 1;
  return ldexp(nearbyint(ldexp(x, digits - exponent)), exponent - digits);
}
inline double round_to(Dtype dtype, double x) {
  switch (dtype) {
    case Dtype::kFloat32:
      return round_digits(x, 24, -126);
    case Dtype::kBFloat16:
      return round_digits(x, 8, -126);
    case Dtype::kFloat16:
      return round_digits(x, 11, -14);
    case Dtype::kFloat8E4M3:
      return round_digits(x, 4, -6);
    default:
      return nearbyint(x);
  }
}

// Value of a finite small float with `mantissa` bits below an exponent field of that bias.
inline double decode_small(uint32_t bits, int width, int mantissa, int bias) {
  const uint32_t magnitude = bits & ((1u << (width - 1)) - 1),
                 fraction = magnitude % (1u << mantissa);
  const int exponent = static_cast<int>(magnitude >> mantissa);
  const double x = exponent == 0 ? ldexp(fraction, 1 - bias - mantissa)
                                 : ldexp(fraction + (1u << mantissa), exponent - bias - mantissa);
  return bits >> (width - 1) ? -x : x;
}
// Whether `actual` is `exact` rounded to the type, or as far off as arithmetic in float may be.
inline bool is_close(double actual, double exact, Dtype dtype, double slack = 1e-6) {
  const double step = dtype == Dtype::kBFloat16 ? 0x1p-8 : dtype == Dtype::kFloat16 ? 0x1p-11 : 0;
  return fabs(actual - exact) <= fabs(exact) * step + slack;
}
inline bool is_quantised(Dtype dtype) { return size_of(dtype) == 1; }

inline double get(Dtype dtype, const void* p, int64_t i = 0) {
  const char* at = static_cast<const char*>(p) + i * size_of(dtype);
  float single;
  uint16_t half;
  uint32_t bits;
  switch (dtype) {
    case Dtype::kFloat32:
      memcpy(&single, at, 4);
      return single;
    case Dtype::kBFloat16:
      memcpy(&half, at, 2);
      bits = static_cast<uint32_t>(half) << 16;
      memcpy(&single, &bits, 4);
      return single;
    case Dtype::kFloat16:
      memcpy(&half, at, 2);
      return decode_small(half, 16, 10, 15);
    case Dtype::kFloat8E4M3:
      return decode_small(static_cast<uint8_t>(*at), 8, 3, 7);
    default:
      return static_cast<int8_t>(*at);
  }
}
// The bits of x, which such a float represents; not of infinity or NaN.
inline uint32_t encode_small(double x, int width, int mantissa, int bias) {
  uint32_t code = 0;
  for (uint32_t bit = 1u << (width - 2); bit != 0; bit >>= 1) {
    if (decode_small(code | bit, width, mantissa, bias) <= fabs(x)) code |= bit;
  }
  return code | (signbit(x) ? 1u << (width - 1) : 0);
}
// Stores x, which the type represents.
inline void put(Dtype dtype, void* p, int64_t i, double x) {
  char* at = static_cast<char*>(p) + i * size_of(dtype);
  const float single = static_cast<float>(x);
  uint32_t bits;
  memcpy(&bits, &single, 4);
  uint16_t half = static_cast<uint16_t>(bits >> 16);
  if (dtype == Dtype::kFloat16) half = static_cast<uint16_t>(encode_small(x, 16, 10, 15));
  if (dtype == Dtype::kFloat32) memcpy(at, &bits, 4);
  if (size_of(dtype) == 2) memcpy(at, &half, 2);
  if (dtype == Dtype::kInt8) *at = static_cast<char>(static_cast<int>(x));
  if (dtype == Dtype::kFloat8E4M3) *at = static_cast<char>(encode_small(x, 8, 3, 7));
}

// Rows of elements with gaps between them. Reading or writing a gap, or past either end, is an
// error: AddressSanitizer stops at it, and check_gaps() finds what it cannot see.
class Rows {
 public:
  Rows(int64_t rows, int64_t size, int64_t gap, Dtype dtype) : dtype(dtype), rows_(rows) {
    size_ = size * size_of(dtype);
    pitch_ = size_ + gap * size_of(dtype);
    // At a multiple of 64 when there are no gaps, 8 past it otherwise.
    bytes_ = rows * pitch_;
    offset_ = gap == 0 ? 0 : 8;
    memory_ = static_cast<char*>(aligned_alloc(64, (offset_ + bytes_ + 63) / 64 * 64 + 64));
    memset(memory_, kGap, offset_ + bytes_);
    __asan_poison_memory_region(memory_, (offset_ + bytes_ + 63) / 64 * 64 + 64);
    for (int64_t i = 0; i < rows; ++i) __asan_unpoison_memory_region(row(i), size_);
  }
  Rows(const Rows&) = delete;
  ~Rows() {
    __asan_unpoison_memory_region(memory_, (offset_ + bytes_ + 63) / 64 * 64 + 64);
    free(memory_);
  }

  char* data() { return memory_ + offset_; }
  char* row(int64_t i) { return data() + i * pitch_; }
  int64_t stride() const { return pitch_ / size_of(dtype); }
  double at(int64_t i, int64_t d) { return get(dtype, row(i), d); }
  void put(int64_t i, int64_t d, double x) { sanitizer_test::put(dtype, row(i), d, x); }
  // Uniform in (-largest, largest).
  void fill_random(double largest = 1) {
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t d = 0; d * size_of(dtype) < size_; ++d) {
        put(i, d, round_to(dtype, largest * random_value()));
      }
    }
  }
  // From now on, reading or writing row i from element `first` on is an error.
  void forbid(int64_t i, int64_t first = 0) {
    const int64_t skipped = first * size_of(dtype);
    __asan_poison_memory_region(row(i) + skipped, size_ - skipped);
  }
  bool untouched(int64_t i) {
    for (int64_t b = 0; b < size_; ++b) {
      if (row(i)[b] != kGap) return false;
    }
    return true;
  }
  void check_gaps() {
    __asan_unpoison_memory_region(memory_, offset_ + bytes_);
    for (int64_t b = 0; b < offset_; ++b) EXPECT(memory_[b] == kGap);
    for (int64_t i = 0; i < rows_; ++i) {
      for (int64_t b = size_; b < pitch_; ++b) EXPECT(row(i)[b] == kGap);
    }
  }

  const Dtype dtype;

 private:
  static constexpr char kGap = 0x5a;
  int64_t rows_, size_, pitch_, bytes_, offset_;
  char* memory_;
};

}  // namespace sanitizer_test
