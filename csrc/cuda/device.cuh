// SPDX-License-Identifier: Apache-2.0
// What device code needs beyond plain CUDA: tensor-core, copy and conversion primitives. The only
// file with PTX. Every primitive has two bodies, one for nvcc (sm_80 and newer) and one for the
// host emulator, which a test build finds through its include path. Torch-free.
#pragma once

#include <cstdint>

// Shared memory of a multiprocessor of an A100 or H100, in bytes; and what sm_89 and newer have,
// the conversion of e4m3 in one instruction.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LYCHEE_SHARED_OF_MULTIPROCESSOR (228 << 10)
#else
#define LYCHEE_SHARED_OF_MULTIPROCESSOR (164 << 10)
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define LYCHEE_CONVERTS_E4M3 1
#else
#define LYCHEE_CONVERTS_E4M3 0
#endif

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#define LYCHEE_DEVICE __device__ __forceinline__
// Dynamic shared memory as bytes; its exact size is given at the launch.
#define LYCHEE_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace lychee::cuda {

LYCHEE_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
LYCHEE_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }

LYCHEE_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The same pointer, known to lie in global memory: one chosen among several parameters is else
// taken for a generic one, with slower accesses.
template <class T>
LYCHEE_DEVICE T* in_global_memory(T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// d += a * b for one 16 x 16 by 16 x 8 tile, fragments as in the PTX manual (m16n8k16).
LYCHEE_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

LYCHEE_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 8 matrices of 16-bit elements: lane i gives the 16-byte aligned row i % 8 of matrix i
// / 8.
LYCHEE_DEVICE void load_matrix(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

LYCHEE_DEVICE void load_matrix_transposed(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// Starts a copy of 16 bytes, or of 16 zeros where !valid: `global` is then never dereferenced.
LYCHEE_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::128B [%0],[%1],16,%2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

// Closes the group of copies started since the last commit.
LYCHEE_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most N of this thread's groups are under way; a barrier must follow before another
// thread may read what was copied.
template <int N>
LYCHEE_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 2^x, relative error about 2^-22; subnormal results become zero.
LYCHEE_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
  return y;
}

// Two values rounded to nearest even; `low` goes to the lower half.
LYCHEE_DEVICE uint32_t pack_bf16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

LYCHEE_DEVICE uint32_t pack_f16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}

LYCHEE_DEVICE float f16_low(uint32_t pair) {
  float x;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(x) : "r"(pair));
  return x;
}

LYCHEE_DEVICE float f16_high(uint32_t pair) {
  float x;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}"
      : "=f"(x)
      : "r"(pair));
  return x;
}

// Arithmetic on two halves at once.
LYCHEE_DEVICE uint32_t add_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0,%1,%2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

LYCHEE_DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

LYCHEE_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// The larger magnitude, for both halves; no NaN.
LYCHEE_DEVICE uint32_t max_magnitude_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("{.reg .b32 x, y; abs.f16x2 x, %1; abs.f16x2 y, %2; max.f16x2 %0, x, y;}"
      : "=r"(d)
      : "r"(a), "r"(b));
  return d;
}

LYCHEE_DEVICE uint32_t negate_f16x2(uint32_t a) {
  uint32_t d;
  asm("neg.f16x2 %0,%1;" : "=r"(d) : "r"(a));
  return d;
}

// Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes a, b (a lowest), or with
// bit 3 set its sign in all eight bits.
LYCHEE_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// Nearest even, limited to +-127; NaN gives 0.
LYCHEE_DEVICE int round_to_int8(float x) { return min(127, max(-127, __float2int_rn(x))); }

}  // namespace lychee::cuda

#else

#include <emulator.h>

#define LYCHEE_DEVICE inline
#define LYCHEE_SHARED(name) unsigned char* const name = ::lychee::emulator::shared_memory()
// The kernel's line, for the emulator's reports.
#define LYCHEE_SITE , ::lychee::emulator::Site site = ::lychee::emulator::Site::current()

namespace lychee::cuda {

LYCHEE_DEVICE uint32_t as_bits(float x) { return emulator::as_bits(x); }
LYCHEE_DEVICE float as_float(uint32_t bits) { return emulator::as_float(bits); }

LYCHEE_DEVICE uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(shared) -
                               emulator::shared_memory());
}

template <class T>
LYCHEE_DEVICE T* in_global_memory(T* pointer) {
  return pointer;
}

LYCHEE_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4],
                            const uint32_t (&b)[2] LYCHEE_SITE) {
  emulator::multiply_tiles(d, a, b, emulator::bf16_to_float, site);
}

LYCHEE_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4],
                           const uint32_t (&b)[2] LYCHEE_SITE) {
  emulator::multiply_tiles(d, a, b, emulator::f16_to_float, site);
}

LYCHEE_DEVICE void load_matrix(uint32_t (&d)[4], const void* row LYCHEE_SITE) {
  emulator::load_matrices(d, row, false, site);
}

LYCHEE_DEVICE void load_matrix_transposed(uint32_t (&d)[4], const void* row LYCHEE_SITE) {
  emulator::load_matrices(d, row, true, site);
}

LYCHEE_DEVICE void copy_async(void* shared, const void* global, bool valid LYCHEE_SITE) {
  emulator::start_copy(shared, global, 16, valid, site);
}

LYCHEE_DEVICE void copy_commit() { emulator::commit_copies(); }

template <int N>
LYCHEE_DEVICE void copy_wait() {
  emulator::wait_for_copies(N);
}

LYCHEE_DEVICE float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

LYCHEE_DEVICE uint32_t pack_bf16(float low, float high) {
  return emulator::float_to_bf16(low) | static_cast<uint32_t>(emulator::float_to_bf16(high)) << 16;
}

LYCHEE_DEVICE uint32_t pack_f16(float low, float high) {
  return emulator::double_to_f16(low) | static_cast<uint32_t>(emulator::double_to_f16(high)) << 16;
}

LYCHEE_DEVICE float f16_low(uint32_t pair) { return emulator::f16_to_float(pair & 0xffff); }
LYCHEE_DEVICE float f16_high(uint32_t pair) { return emulator::f16_to_float(pair >> 16); }

LYCHEE_DEVICE uint32_t fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  const double low = static_cast<double>(f16_low(a)) * f16_low(b) + f16_low(c);
  const double high = static_cast<double>(f16_high(a)) * f16_high(b) + f16_high(c);
  return emulator::double_to_f16(low) | static_cast<uint32_t>(emulator::double_to_f16(high)) << 16;
}

LYCHEE_DEVICE uint32_t add_f16x2(uint32_t a, uint32_t b) { return fma_f16x2(a, 0x3c003c00u, b); }
// Adding -0 keeps the sign of a product that is zero.
LYCHEE_DEVICE uint32_t mul_f16x2(uint32_t a, uint32_t b) { return fma_f16x2(a, b, 0x80008000u); }

LYCHEE_DEVICE uint32_t max_magnitude_f16x2(uint32_t a, uint32_t b) {
  a &= 0x7fff7fffu, b &= 0x7fff7fffu;
  return std::max(a & 0xffffu, b & 0xffffu) | std::max(a >> 16, b >> 16) << 16;
}

LYCHEE_DEVICE uint32_t negate_f16x2(uint32_t a) { return a ^ 0x80008000u; }

LYCHEE_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> (4 * i);
    uint32_t byte = static_cast<uint32_t>(bytes >> ((choice & 7) * 8)) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

LYCHEE_DEVICE int round_to_int8(float x) {
  if (x != x) return 0;
  const float limited = x > 127.0f ? 127.0f : x < -127.0f ? -127.0f : x;
  return static_cast<int>(std::nearbyint(limited));
}

}  // namespace lychee::cuda

#endif

namespace lychee::cuda {

LYCHEE_DEVICE float bf16_low(uint32_t pair) { return as_float(pair << 16); }
LYCHEE_DEVICE float bf16_high(uint32_t pair) { return as_float(pair & 0xffff0000u); }

// Exact: each byte, plus 128, becomes the last mantissa bits of 2^23.
LYCHEE_DEVICE void int8x4_to_float(uint32_t packed, float (&x)[4]) {
  constexpr uint32_t kTwoTo23 = 0x4b000000u;
  constexpr float kBias = 8388736.0f;  // 2^23 + 128
  const uint32_t biased = packed ^ 0x80808080u;
  x[0] = as_float(permute_bytes(biased, kTwoTo23, 0x7650)) - kBias;
  x[1] = as_float(permute_bytes(biased, kTwoTo23, 0x7651)) - kBias;
  x[2] = as_float(permute_bytes(biased, kTwoTo23, 0x7652)) - kBias;
  x[3] = as_float(permute_bytes(biased, kTwoTo23, 0x7653)) - kBias;
}

// Exact: two bytes each, plus 128, become the last mantissa bits of 1024. The selectors name them
// in places 0 and 2, and 4, the other half of 1024, in places 1 and 3.
template <uint32_t kLow, uint32_t kHigh>
LYCHEE_DEVICE void int8x4_to_f16x2(uint32_t packed, uint32_t& low, uint32_t& high) {
  constexpr uint32_t k1024 = 0x64646464u, kMinus1152 = 0xe480e480u;
  const uint32_t biased = packed ^ 0x80808080u;
  low = add_f16x2(permute_bytes(biased, k1024, kLow), kMinus1152);
  high = add_f16x2(permute_bytes(biased, k1024, kHigh), kMinus1152);
}

// Four values as signed bytes, x[0] lowest; symmetric: -128 is never produced.
LYCHEE_DEVICE uint32_t pack_int8x4(const float (&x)[4]) {
  const uint32_t low = permute_bytes(round_to_int8(x[0]), round_to_int8(x[1]), 0x0040);
  const uint32_t high = permute_bytes(round_to_int8(x[2]), round_to_int8(x[3]), 0x0040);
  return permute_bytes(low, high, 0x5410);
}

// The bits of two e4m3 bytes shifted into halves: 2^-8 of the values, exactly; NaN is as if its
// code stood for 480. The selector names each byte and then its sign.
template <uint32_t kSelector>
LYCHEE_DEVICE uint32_t shift_e4m3x2(uint32_t packed) {
  return permute_bytes(packed, 0, kSelector) << 7 & 0xbf80bf80u;
}

// Exact, NaN included.
LYCHEE_DEVICE void e4m3x4_to_f16x2(uint32_t packed, uint32_t& low, uint32_t& high) {
#if LYCHEE_CONVERTS_E4M3
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}"
      : "=r"(low), "=r"(high)
      : "r"(packed));
#else
  constexpr uint32_t k256 = 0x5c005c00u;
  uint32_t halves[2] = {shift_e4m3x2<0x9180>(packed), shift_e4m3x2<0xb3a2>(packed)};
  for (uint32_t& pair : halves) {
    // only both NaN codes carry into bit 14
    const uint32_t is_nan = ((pair & 0x7fff7fffu) + 0x00800080u) >> 14 & 0x00010001u;
    pair = mul_f16x2(pair, k256) | is_nan * 0x7fff;
  }
  low = halves[0];
  high = halves[1];
#endif
}

LYCHEE_DEVICE void e4m3x4_to_float(uint32_t packed, float (&x)[4]) {
  uint32_t low, high;
  e4m3x4_to_f16x2(packed, low, high);
  x[0] = f16_low(low);
  x[1] = f16_high(low);
  x[2] = f16_low(high);
  x[3] = f16_high(high);
}

// Nearest even, limited to +-448; NaN stays NaN.
LYCHEE_DEVICE uint32_t round_to_e4m3(float x) {
  constexpr uint32_t kSmallestNormal = 0x3c800000u, k448 = 0x43e00000u, kInfinity = 0x7f800000u;
  constexpr uint32_t k16384 = 0x46800000u;  // its last mantissa bit is 2^-9, the subnormal step
  const uint32_t bits = as_bits(x), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > kInfinity) return sign | 0x7fu;
  if (magnitude >= k448) return sign | 0x7eu;
  if (magnitude < kSmallestNormal) {
    return sign | (as_bits(as_float(magnitude) + as_float(k16384)) - k16384);
  }
  const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
  return sign | ((rounded >> 20) - (120u << 3));  // exponent bias 127 becomes 7
}

// Four values as e4m3 bytes, x[0] lowest.
LYCHEE_DEVICE uint32_t pack_e4m3x4(const float (&x)[4]) {
#if LYCHEE_CONVERTS_E4M3
  uint32_t packed;
  asm("{.reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, %2, %1; "
      "cvt.rn.satfinite.e4m3x2.f32 b, %4, %3; mov.b32 %0, {a, b};}"
      : "=r"(packed)
      : "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]));
  return packed;
#else
  return round_to_e4m3(x[0]) | round_to_e4m3(x[1]) << 8 | round_to_e4m3(x[2]) << 16 |
         round_to_e4m3(x[3]) << 24;
#endif
}

}  // namespace lychee::cuda
