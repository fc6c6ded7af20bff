// SPDX-License-Identifier: Apache-2.0
// Conversions of device.cuh, each against its definition: every code, every tie.
#include "cuda/device.cuh"
#include "harness.h"

namespace lychee::cuda {
namespace {

using emulator::expect;

bool same(float a, float b) {
  return a == b ? std::signbit(a) == std::signbit(b) : a != a && b != b;
}

// The value of an e4m3 code: one sign, four exponent and three mantissa bits, no infinities.
float e4m3_value(int code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 127) == 127) return NAN;
  const float magnitude = exponent ? std::ldexp(8.0f + mantissa, exponent - 10)
                                   : std::ldexp(static_cast<float>(mantissa), -9);
  return code & 128 ? -magnitude : magnitude;
}

// The code of the nearest finite value; of two equally near ones, the even code.
int nearest_e4m3(float x) {
  int best = 0;
  for (int code = 0; code < 127; ++code) {
    const double error = std::fabs(std::fabs(x) - e4m3_value(code));
    const double least = std::fabs(std::fabs(x) - e4m3_value(best));
    if (error < least || (error == least && code % 2 == 0)) best = code;
  }
  return std::signbit(x) ? best | 128 : best;
}

EMULATOR_CASE(int8_is_exact) {
  for (int code = 0; code < 256; ++code) {
    const uint32_t packed = code | (code ^ 0x5a) << 8 | (255 - code) << 16 | 0x80000000u;
    float x[4];
    uint32_t even, odd;
    int8x4_to_float(packed, x);
    int8x4_to_f16x2<0x4240, 0x4341>(packed, even, odd);
    for (int i = 0; i < 4; ++i) {
      const auto value = static_cast<float>(static_cast<int8_t>(packed >> (8 * i)));
      const uint32_t pair = i % 2 ? odd : even;
      expect(x[i] == value, std::to_string(value) + " as float");
      expect((i < 2 ? f16_low(pair) : f16_high(pair)) == value, std::to_string(value) + " as half");
    }
  }
}

EMULATOR_CASE(int8_rounds_to_nearest_even) {
  for (int i = -1100; i <= 1100; ++i) {
    const float x = i / 8.0f;
    const int nearest = static_cast<int>(std::nearbyint(x));
    expect(round_to_int8(x) == std::min(127, std::max(-127, nearest)), std::to_string(x));
  }
  const float x[4] = {-1e30f, INFINITY, NAN, -2.5f};
  expect(pack_int8x4(x) == (0x81u | 0x7fu << 8 | 0xfeu << 24), "limits, and zero for NaN");
}

EMULATOR_CASE(e4m3_is_exact) {
  for (int code = 0; code < 256; ++code) {
    float x[4];
    e4m3x4_to_float(code | (code ^ 0x80) << 8 | 0x7fu << 16 | 0xff000000u, x);
    expect(same(x[0], e4m3_value(code)), "code " + std::to_string(code) + " in byte 0");
    expect(same(x[1], e4m3_value(code ^ 0x80)), "code " + std::to_string(code ^ 0x80));
    expect(x[2] != x[2] && x[3] != x[3], "both NaN codes");
  }
}

EMULATOR_CASE(e4m3_bits_are_shifted_exactly) {
  for (int code = 0; code < 256; ++code) {
    const uint32_t pair = shift_e4m3x2<0xb391>(code << 8 | (code ^ 0x80u) << 24);
    const int finite = code & 127;
    const float magnitude = finite == 127 ? 480.0f : e4m3_value(finite);
    const float value = (code & 128 ? -magnitude : magnitude) / 256;
    expect(same(f16_low(pair), value) && same(f16_high(pair), -value),
           "code " + std::to_string(code));
  }
}

EMULATOR_CASE(e4m3_rounds_to_nearest_even) {
  for (int code = 0; code < 126; ++code) {
    const float low = e4m3_value(code), high = e4m3_value(code + 1), middle = (low + high) / 2;
    for (float x : {low, middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 500.0f)}) {
      for (float value : {x, -x}) {
        expect(static_cast<int>(round_to_e4m3(value)) == nearest_e4m3(value),
               std::to_string(value));
      }
    }
  }
  const float x[4] = {449.0f, -INFINITY, NAN, 1e-30f};
  expect(pack_e4m3x4(x) == (0x7eu | 0xfeu << 8 | 0x7fu << 16), "limits, NaN and underflow");
}

EMULATOR_CASE(sixteen_bit_floats) {
  // a tie goes to the even mantissa: 1 + 2^-8 down, 1 + 3 * 2^-8 up
  expect(pack_bf16(1.00390625f, 1.01171875f) == 0x3f823f80u, "bf16 ties to even");
  expect(bf16_low(0x3f823f80u) == 1.0f && bf16_high(0x3f823f80u) == 1.015625f, "bf16 halves");
  expect(pack_f16(1.00048828125f, 1.00146484375f) == 0x3c023c00u, "f16 ties to even");
  expect(f16_low(0x3c023c00u) == 1.0f && f16_high(0x3c023c00u) == 1.001953125f, "f16 halves");
  const uint32_t a = pack_f16(3.0f, -0.5f), b = pack_f16(-2.0f, 0.25f), c = pack_f16(1.0f, 8.0f);
  expect(add_f16x2(a, b) == pack_f16(1.0f, -0.25f), "sums");
  expect(mul_f16x2(a, b) == pack_f16(-6.0f, -0.125f), "products");
  expect(fma_f16x2(a, b, c) == pack_f16(-5.0f, 7.875f), "products and sums");
  expect(mul_f16x2(pack_f16(-1.0f, 1.0f), 0) == 0x8000u, "the sign of a zero product");
  expect(max_magnitude_f16x2(a, b) == pack_f16(3.0f, 0.5f), "magnitudes");
  expect(negate_f16x2(a) == pack_f16(-3.0f, 0.5f), "signs");
}

EMULATOR_CASE(bytes_bits_and_powers) {
  expect(permute_bytes(0x33221100u, 0x77665544u, 0x7250) == 0x77225500u, "bytes 0, 5, 2, 7");
  expect(permute_bytes(0x7f8000ffu, 0, 0xba98) == 0x00ff00ffu, "signs of bytes 0, 1, 2, 3");
  expect(as_bits(1.0f) == 0x3f800000u && as_float(0x40000000u) == 2.0f, "bits");
  expect(exp2_approx(-INFINITY) == 0.0f && exp2_approx(3.0f) == 8.0f, "powers of two");
  expect(exp2_approx(-140.0f) == 0.0f, "zero for a subnormal result");
  expect(min(1, -2) == -2 && max(2u, 3u) == 3u && max(NAN, 1.0f) == 1.0f, "limits without NaN");
  expect(__clz(0) == 32 && __clz(1) == 31 && __ffs(8) == 4 && __popc(0xf0u) == 4, "bit counts");
}

}  // namespace
}  // namespace lychee::cuda
