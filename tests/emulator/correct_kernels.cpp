// SPDX-License-Identifier: Apache-2.0
// Kernels without a bug: the emulator must compute what CUDA defines, and report nothing.
#include "cuda/device.cuh"
#include "harness.h"
#include "pipeline_case.h"

namespace lychee::cuda {
namespace {

using emulator::expect;

EMULATOR_CASE(correct_pipeline) { check_pipeline<Bug::kNone>(); }

// The barrier of one branch is complete once the threads of the other have exited.
EMULATOR_CASE(exited_threads_count_at_barriers) {
  emulator::launch({2}, {64}, 0, [] {
    if (threadIdx.x < 32) return;
    __syncthreads();
  });
}

EMULATOR_CASE(shuffles_and_votes) {
  emulator::launch({1}, {64}, 0, [] {
    const int lane = threadIdx.x % 32;
    expect(__shfl_sync(~0u, lane, lane + 33) == (lane + 1) % 32, "the lane beside");
    expect(__shfl_sync(~0u, lane, 3, 8) == lane / 8 * 8 + 3, "the third of eight lanes");
    expect(__shfl_xor_sync(~0u, lane, 5) == (lane ^ 5), "the partner");
    expect(__shfl_xor_sync(~0u, lane, 12, 8) == (lane < 8 ? lane : (lane ^ 12)) ||
               (lane ^ 12) >= lane / 8 * 8 + 8,
           "a partner in an earlier section");
    expect(__shfl_up_sync(~0u, lane, 2, 16) == (lane % 16 < 2 ? lane : lane - 2), "two below");
    expect(__shfl_down_sync(~0u, lane, 3) == (lane > 28 ? lane : lane + 3), "three above");
    expect(__ballot_sync(~0u, lane % 3 == 0) == 0x49249249u, "every third bit");
    expect(__any_sync(~0u, lane == 7) && !__any_sync(~0u, 0), "any");
    expect(__all_sync(~0u, 1) && !__all_sync(~0u, lane != 7), "all");
    if (lane < 4) expect(__shfl_sync(0xfu, lane, 3) == 3, "the last of four lanes");
  });
}

EMULATOR_CASE(atomics_count_every_thread) {
  std::vector<int> counts(7);
  unsigned tickets = 0;
  emulator::launch({3, 2}, {40}, 0, [&] {
    atomicAdd(&counts[threadIdx.x % 7], 1);
    if (threadIdx.x == 0) atomicAdd(&tickets, 1u);
  });
  expect(counts == std::vector<int>({36, 36, 36, 36, 36, 30, 30}),
         "40 threads in each of 6 blocks");
  expect(tickets == 6, "6 blocks");
}

EMULATOR_CASE(indices_cover_the_grid) {
  std::vector<int> seen(2 * 3 * 2 * 4 * 2 * 3);
  emulator::launch({2, 3, 2}, {4, 2, 3}, 0, [&] {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    ++seen[block * 24 + thread];
  });
  expect(seen == std::vector<int>(seen.size(), 1), "every index once");
}

EMULATOR_CASE(shared_memory_starts_as_nan) {
  emulator::launch({2}, {64}, 256, [] {
    LYCHEE_SHARED(shared);
    auto* values = reinterpret_cast<float*>(shared);
    expect(values[threadIdx.x] != values[threadIdx.x], "NaN at the start of each block");
    values[threadIdx.x] = 0;
  });
}

EMULATOR_CASE(copies_land_at_the_wait) {
  const std::vector<float> data(4, 1.0f);
  emulator::launch({1}, {1}, 32, [&] {
    LYCHEE_SHARED(shared);
    auto* values = reinterpret_cast<float*>(shared);
    copy_async(values, data.data(), true);
    copy_commit();
    copy_async(values + 4, nullptr, false);
    copy_commit();
    expect(values[0] != values[0] && values[4] != values[4], "NaN before the wait");
    copy_wait<1>();
    expect(values[3] == 1.0f && values[4] != values[4], "the first group only");
    copy_wait<0>();
    expect(values[4] == 0.0f && values[7] == 0.0f, "zeros where not valid");
  });
}

// The order in which threads run: the same for a seed, another for another.
std::vector<unsigned> order_of_threads(uint64_t seed) {
  const auto before = emulator::options;
  emulator::options.seed = seed;
  std::vector<unsigned> order;
  emulator::launch({2}, {64}, 0, [&] {
    emulator::Hidden hidden;
    order.push_back(blockIdx.x * 64 + threadIdx.x);
  });
  emulator::options = before;
  return order;
}

EMULATOR_CASE(a_seed_is_a_schedule) {
  expect(order_of_threads(3) == order_of_threads(3), "the same order for a seed");
  expect(order_of_threads(3) != order_of_threads(4), "another order for another seed");
  const std::vector<unsigned> in_order = order_of_threads(0);
  for (unsigned i = 0; i < in_order.size(); ++i) expect(in_order[i] == i, "seed 0 in order");
}

// d = a * b with whole numbers; b comes from rows of k by a transposed load.
template <bool kHalf>
void check_tile_product() {
  uint16_t a[16][16], b[16][8 * 2];
  float expected[16][8] = {}, out[16][8];
  const auto bits = [](int value) {
    return kHalf ? emulator::double_to_f16(value) : emulator::float_to_bf16(value);
  };
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) a[i][k] = bits(i * 5 % 7 - k % 3), b[i][k] = bits(i % 4 - k % 5);
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < 16; ++k) {
        expected[i][j] += static_cast<float>((i * 5 % 7 - k % 3) * (k % 4 - j % 5));
      }
    }
  }
  emulator::launch({1}, {32}, sizeof(a) + sizeof(b), [&] {
    LYCHEE_SHARED(shared);
    const int lane = threadIdx.x;
    if (lane == 0) {
      std::memcpy(shared, a, sizeof(a));
      std::memcpy(shared + sizeof(a), b, sizeof(b));
    }
    __syncwarp();
    uint32_t rows[4], columns[4];
    load_matrix(rows, shared + (lane % 16) * 32 + lane / 16 * 16);
    load_matrix_transposed(columns, shared + sizeof(a) + (lane % 16) * 32 + lane / 16 * 16);
    const uint32_t first[2] = {columns[0], columns[1]};
    float d[4] = {};
    kHalf ? mma_f16(d, rows, first) : mma_bf16(d, rows, first);
    for (int i = 0; i < 4; ++i) out[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = d[i];
  });
  for (int i = 0; i < 128; ++i) expect(out[i / 8][i % 8] == expected[i / 8][i % 8], "the product");
}

EMULATOR_CASE(tile_products) {
  check_tile_product<false>();
  check_tile_product<true>();
}

}  // namespace
}  // namespace lychee::cuda
