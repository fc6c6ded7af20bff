// SPDX-License-Identifier: Apache-2.0
// One case per kind of bug that the emulator, or a sanitizer watching it, must report. A line
// marked `planted: name` must stand in the report of that case.
#include "cuda/device.cuh"
#include "harness.h"
#include "pipeline_case.h"

namespace lychee::cuda {
namespace {

EMULATOR_CASE(no_barrier_before_reuse) { check_pipeline<Bug::kNoBarrierBeforeReuse>(); }
EMULATOR_CASE(no_wait) { check_pipeline<Bug::kNoWait>(); }
EMULATOR_CASE(no_barrier_after_wait) { check_pipeline<Bug::kNoBarrierAfterWait>(); }
EMULATOR_CASE(no_swizzle) { check_pipeline<Bug::kNoSwizzle>(); }

template <class Kernel>
void run(const Kernel& kernel, unsigned threads = 64, size_t shared_bytes = 1024) {
  emulator::launch({1}, {threads}, shared_bytes, kernel);
}

EMULATOR_CASE(offset_in_32_bits) {
  std::vector<uint16_t> bank(64);
  std::vector<float> out(64);
  volatile int page = 1 << 20;
  const int page_stride = 1 << 14;
  run([&] {
    const int offset = page * page_stride;  // planted: offset_in_32_bits
    out[threadIdx.x] = bank[(offset + threadIdx.x) % 64];
  });
}

EMULATOR_CASE(shared_memory_overrun) {
  run([] {
    LYCHEE_SHARED(shared);
    shared[threadIdx.x * 16 + 16] = 1;  // planted: shared_memory_overrun
  });
}

EMULATOR_CASE(misaligned_vector) {
  std::vector<unsigned> data(64 * 4 + 1);
  std::vector<unsigned> out(64);
  run([&] {
    const auto* vector = reinterpret_cast<const uint4*>(data.data() + 1) + threadIdx.x;
    out[threadIdx.x] = vector->y;  // planted: misaligned_vector
  });
}

EMULATOR_CASE(half_of_a_warp) {
  run([] {
    if (threadIdx.x < 16) __syncwarp();  // planted: half_of_a_warp
  });
}

EMULATOR_CASE(barrier_against_collective) {
  run([] {
    if (threadIdx.x % 32 < 16) {
      __syncthreads();  // planted: barrier_against_collective
    } else {
      __syncwarp();  // planted: barrier_against_collective
    }
  });
}

EMULATOR_CASE(barriers_on_different_lines) {
  run([] {
    if (threadIdx.x < 32) {
      __syncthreads();  // planted: barriers_on_different_lines
    } else {
      __syncthreads();  // planted: barriers_on_different_lines
    }
  });
}

EMULATOR_CASE(shuffle_against_ballot) {
  run([] {
    if (threadIdx.x % 32 < 16) {
      __shfl_xor_sync(~0u, 1, 1);  // planted: shuffle_against_ballot
    } else {
      __ballot_sync(~0u, 1);  // planted: shuffle_against_ballot
    }
  });
}

EMULATOR_CASE(exit_with_open_copies) {
  std::vector<uint4> data(64);
  run([&] {
    LYCHEE_SHARED(shared);
    copy_async(shared + threadIdx.x * 16, &data[threadIdx.x], true);
    copy_commit();
  });
}

EMULATOR_CASE(copy_outside_of_shared_memory) {
  std::vector<uint4> data(128);
  run([&] {
    LYCHEE_SHARED(shared);
    const uint4* source = &data[threadIdx.x];
    copy_async(shared + threadIdx.x * 32, source, true);  // planted: copy_outside_of_shared_memory
    copy_commit();
    copy_wait<0>();
  });
}

EMULATOR_CASE(misaligned_copy) {
  std::vector<uint4> data(64);
  run([&] {
    LYCHEE_SHARED(shared);
    copy_async(shared + threadIdx.x * 8, &data[0], true);  // planted: misaligned_copy
    copy_commit();
    copy_wait<0>();
  });
}

EMULATOR_CASE(misaligned_matrix_row) {
  run([&] {
    LYCHEE_SHARED(shared);
    uint32_t tile[4];
    load_matrix(tile, shared + threadIdx.x % 32 * 8);  // planted: misaligned_matrix_row
  });
}

EMULATOR_CASE(lane_outside_of_its_mask) {
  run([] {
    __shfl_sync(0xffffu, 1, 0);  // planted: lane_outside_of_its_mask
  });
}

EMULATOR_CASE(overlapping_masks) {
  run([] {
    const bool low = threadIdx.x % 32 < 16;
    __ballot_sync(low ? 0x1ffffu : 0xffff0000u, 1);  // planted: overlapping_masks
  });
}

// Within a warp too, memory is ordered by __syncwarp, not by a shuffle.
EMULATOR_CASE(no_order_in_a_warp) {
  std::vector<int> out(32);
  run(
      [&] {
        LYCHEE_SHARED(shared);
        auto* values = reinterpret_cast<int*>(shared);
        values[threadIdx.x] = threadIdx.x;
        __shfl_sync(~0u, 1, 0);
        out[threadIdx.x] = values[threadIdx.x ^ 1];  // planted: no_order_in_a_warp
      },
      32);
}

}  // namespace
}  // namespace lychee::cuda
