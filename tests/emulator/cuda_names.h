// SPDX-License-Identifier: Apache-2.0
// CUDA's own names, as device code spells them: qualifiers, indices, vector types, intrinsics.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "warp.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#define threadIdx (::lychee::emulator::current_thread->position)
#define blockIdx (::lychee::emulator::current_block->index)
#define blockDim (::lychee::emulator::current_block->threads)
#define gridDim (::lychee::emulator::current_block->grid)

struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// As in CUDA: floating-point numbers ignore a NaN, mixed integers convert as in arithmetic.
template <class A, class B>
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmin(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
  }
}

template <class A, class B>
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) {
    return std::fmax(static_cast<T>(a), static_cast<T>(b));
  } else {
    return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
  }
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T>
T __ldg(const T* address) {
  return *address;
}

// Integers only: the order of floating-point atomics would change results from run to run.
template <class T>
T atomicAdd(T* address, T value) {
  static_assert(std::is_same_v<T, int> || std::is_same_v<T, unsigned>);
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}

// All fibers share one processor: only the compiler could reorder.
inline void __threadfence() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

#define LYCHEE_EMULATOR_SITE ::lychee::emulator::Site site = ::lychee::emulator::Site::current()

inline void __syncthreads(LYCHEE_EMULATOR_SITE) { lychee::emulator::synchronise_block(site); }

inline void __syncwarp(unsigned mask = ~0u, LYCHEE_EMULATOR_SITE) {
  lychee::emulator::synchronise_warp(mask, site);
}

inline unsigned __ballot_sync(unsigned mask, int vote, LYCHEE_EMULATOR_SITE) {
  return lychee::emulator::ballot(mask, vote != 0, site);
}

inline int __any_sync(unsigned mask, int vote, LYCHEE_EMULATOR_SITE) {
  return lychee::emulator::ballot(mask, vote != 0, site) != 0;
}

inline int __all_sync(unsigned mask, int vote, LYCHEE_EMULATOR_SITE) {
  return lychee::emulator::ballot(mask, vote == 0, site) == 0;
}

// Shuffles stay inside sections of `width` lanes, a power of two; a lane whose source lies outside
// of its section keeps its value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, LYCHEE_EMULATOR_SITE) {
  const unsigned lane = lychee::emulator::lane_index(), section = lane & -width;
  return lychee::emulator::shuffle(mask, value, section | (source & (width - 1)), site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, LYCHEE_EMULATOR_SITE) {
  const unsigned lane = lychee::emulator::lane_index(), source = lane ^ lane_mask;
  // Earlier sections may be read, later ones not.
  const bool inside = source < (lane & -width) + width;
  return lychee::emulator::shuffle(mask, value, inside ? source : lane, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, LYCHEE_EMULATOR_SITE) {
  const unsigned lane = lychee::emulator::lane_index();
  const bool inside = (lane & (width - 1)) >= delta;
  return lychee::emulator::shuffle(mask, value, inside ? lane - delta : lane, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, LYCHEE_EMULATOR_SITE) {
  const unsigned lane = lychee::emulator::lane_index();
  const bool inside = (lane & (width - 1)) + delta < static_cast<unsigned>(width);
  return lychee::emulator::shuffle(mask, value, inside ? lane + delta : lane, site);
}
