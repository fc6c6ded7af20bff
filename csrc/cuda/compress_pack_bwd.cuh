// SPDX-License-Identifier: Apache-2.0
// The backward of compress_pack on a GPU: rotates gradients back, returns rows to segment order and
// adds the memory rows' second gradient. Torch-free; strides are in elements.
#pragma once

#include "cuda/compress_pack.cuh"

namespace lychee::cuda {

struct CompressPackBwdParams {
  lychee::CompressPackBwdParams rows;
  PackPlan plan;
};

// The gradient of one head of one row: R(-position) grad + mem_grad, rounded once.
template <class T, bool kFast>
LYCHEE_DEVICE void unpack_head(const lychee::CompressPackBwdParams& p, const RowPlace& place,
                               const Angles<kRunWidth<T, kFast>>& angles, int head, int64_t d) {
  constexpr int kWidth = kRunWidth<T, kFast>;
  const int64_t half = p.head_dim / 2;
  float sum1[kWidth] = {}, sum2[kWidth] = {};
  if (p.grad != nullptr) {
    const int64_t from = p.memory_only ? place.memory : place.index;
    const T* grad = static_cast<const T*>(p.grad) + place.batch * p.grad_batch_stride +
                    head * p.grad_head_stride + from * p.grad_row_stride + d;
    to_float(load_run<kFast, kWidth>(grad), sum1);
    to_float(load_run<kFast, kWidth>(grad + half), sum2);
    if (p.order.cos != nullptr) rotate_back(angles, sum1, sum2);
  }
  if (p.mem_grad != nullptr && place.memory >= 0) {
    const T* grad = static_cast<const T*>(p.mem_grad) + place.batch * p.mem_batch_stride +
                    head * p.mem_head_stride + place.memory * p.mem_row_stride + d;
    float x1[kWidth], x2[kWidth];
    to_float(load_run<kFast, kWidth>(grad), x1);
    to_float(load_run<kFast, kWidth>(grad + half), x2);
    for (int i = 0; i < kWidth; ++i) sum1[i] += x1[i], sum2[i] += x2[i];
  }
  const int64_t to = p.memory_only ? place.segment - p.order.batch * p.order.window : place.segment;
  T* out = static_cast<T*>(p.out) + (to * p.num_heads + head) * p.head_dim + d;
  store_run<kFast>(out, from_float<T>(sum1));
  store_run<kFast>(out + half, from_float<T>(sum2));
}

template <class T, bool kFast>
__global__ void __launch_bounds__(kPackThreads)
    compress_pack_bwd_kernel(const CompressPackBwdParams p) {
  constexpr int kWidth = kRunWidth<T, kFast>;
  const RowOrder& order = p.rows.order;
  const int64_t rows = p.rows.memory_only ? order.memory : order.window + order.memory;
  const int64_t row = int64_t{blockIdx.x} * kPackWarps + threadIdx.x / kLanesPerWarp;
  const int lane = threadIdx.x % kLanesPerWarp, groups = kLanesPerWarp / p.plan.lanes;
  const int64_t d = lane % p.plan.lanes * kWidth;
  if (row >= order.batch * rows || d >= order.half) return;
  const RowPlace place =
      p.rows.memory_only ? place_of_memory_row(order, row) : place_of_row(order, row);
  Angles<kWidth> angles{};
  if (p.rows.grad != nullptr && order.cos != nullptr) {
    angles = load_row_angles<kFast, kWidth>(order, place, d);
  }
  const int first = static_cast<int>(blockIdx.y) * p.plan.steps * groups + lane / p.plan.lanes;
  for (int step = 0; step < p.plan.steps; ++step) {
    const int head = first + step * groups;
    if (head < p.rows.num_heads) unpack_head<T, kFast>(p.rows, place, angles, head, d);
  }
}

}  // namespace lychee::cuda
