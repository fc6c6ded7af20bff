// SPDX-License-Identifier: Apache-2.0
// Tensor-core tiles: 16-bit conversions, ldmatrix with its bank conflicts, mma m16n8k16.
#pragma once

#include <cmath>
#include <cstring>
#include <string>

#include "copies.h"
#include "warp.h"

namespace lychee::emulator {

inline uint32_t as_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  return bits;
}

inline float as_float(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return x;
}

inline float bf16_to_float(uint16_t bits) { return as_float(static_cast<uint32_t>(bits) << 16); }

// Nearest even; every NaN becomes the one that cvt.rn.bf16x2 gives.
inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = as_bits(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float f16_to_float(uint16_t bits) {
  _Float16 x;
  __builtin_memcpy(&x, &bits, sizeof(x));
  return static_cast<float>(x);
}

inline uint16_t double_to_f16(double x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  __builtin_memcpy(&bits, &half, sizeof(bits));
  return bits;
}

struct MmaOperands {
  uint32_t a[4], b[2];
};

// Fragments of the PTX manual: lane = 4 * group + member holds rows group and group + 8 of a,
// column group of b; products are summed in the order of k, in float.
template <class Convert>
void multiply_tiles(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    const Convert& to_float, Site site) {
  Hidden hidden;
  ++statistics.mma;
  const MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto operands = exchange(~0u, mine, kMma, site);
  const unsigned group = lane_index() / 4, member = lane_index() % 4;
  float rows[2][16], columns[2][16];
  for (unsigned quad = 0; quad < 4; ++quad) {
    const MmaOperands row = operands[group * 4 + quad];
    const MmaOperands column[2] = {operands[member * 8 + quad], operands[member * 8 + 4 + quad]};
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned half = i / 2, shift = i % 2 * 16, k = quad * 2 + i % 2 + half * 8;
      for (unsigned j = 0; j < 2; ++j) {
        rows[j][k] = to_float(static_cast<uint16_t>(row.a[half * 2 + j] >> shift));
        columns[j][k] = to_float(static_cast<uint16_t>(column[j].b[half] >> shift));
      }
    }
  }
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned k = 0; k < 16; ++k) d[i] += rows[i / 2][k] * columns[i % 2][k];
  }
}

// Rows of one 8 x 8 matrix that share the banks of an earlier row: each costs a further access.
inline uint64_t count_conflicts(const unsigned char* const* rows) {
  unsigned seen = 0;
  uint64_t conflicts = 0;
  for (int i = 0; i < 8; ++i) {
    const unsigned bank = 1u << (reinterpret_cast<uintptr_t>(rows[i]) / 16 % 8);
    conflicts += (seen & bank) != 0;
    seen |= bank;
  }
  return conflicts;
}

inline void load_matrices(uint32_t (&d)[4], const void* row, bool transposed, Site site) {
  const unsigned char* rows[32];
  const unsigned lane = lane_index();
  {
    Hidden hidden;
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("load_matrix: misaligned row, " + site.name());
    if (!in_shared_memory(row, 16)) {
      fail("load_matrix: row outside of shared memory, " + site.name());
    }
    ++statistics.matrix_loads;
    const auto addresses = exchange(~0u, row, kLoadMatrix, site);
    for (unsigned i = 0; i < 32; ++i) rows[i] = static_cast<const unsigned char*>(addresses[i]);
    for (unsigned i = 0; lane == 0 && i < 4; ++i) {
      statistics.bank_conflicts += count_conflicts(rows + i * 8);
    }
  }
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned char* const* matrix = rows + i * 8;
    if (!transposed) {
      std::memcpy(&d[i], matrix[lane / 4] + lane % 4 * 4, 4);
      continue;
    }
    uint16_t low, high;
    std::memcpy(&low, matrix[lane % 4 * 2] + lane / 4 * 2, 2);
    std::memcpy(&high, matrix[lane % 4 * 2 + 1] + lane / 4 * 2, 2);
    d[i] = low | static_cast<uint32_t>(high) << 16;
  }
}

}  // namespace lychee::emulator
