// SPDX-License-Identifier: Apache-2.0
// compress_pack without Torch, so that the sanitizers can watch it: strides and a bank past 2^31
// elements, rows of exactly the size they need. And its plan.
#include <emulator.h>

#include <vector>

#include "cuda/compress_pack_bwd.cuh"
#include "sparse_memory.h"

namespace lychee::cuda {
namespace {

using emulator::expect;
using emulator::SparseMemory;

constexpr int64_t kFar = (int64_t{1} << 31) + 64;  // elements

// A window of four raw and two memory rows, one head for q, k and v, and a bank whose last page
// lies past 2^31 elements.
struct Window {
  explicit Window(int64_t dim) : dim(dim), half(dim / 2), rows(6 * dim), angles(6 * half, 0.0f) {
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>(i % 17) - 8.0f;
    cos.assign(6 * half, 1.0f);
    p.order = {1, 2, 4, 2, cos.data(), angles.data(), 6, half, nullptr, 0};
    p.num_heads = p.num_kv_heads = 1, p.head_dim = dim;
    p.dtype = Dtype::kFloat32;
    p.q = p.k = p.v = rows.data();
    p.q_row_stride = p.k_row_stride = p.v_row_stride = dim;
    for (auto* out : {&q_rot, &k_rot, &v_out}) out->assign(6 * dim, -99.0f);
    p.q_rot = q_rot.data(), p.k_rot = k_rot.data(), p.v_out = v_out.data();
  }

  int64_t dim, half;
  std::vector<float> rows, cos, angles, q_rot, k_rot, v_out;
  lychee::CompressPackParams p{};
};

// Where row s of the interleaved window comes from, in segment order.
constexpr int64_t kSource[] = {0, 1, 4, 2, 3, 5};

template <bool kFast>
void check_window(int64_t dim) {
  Window w(dim);
  constexpr int64_t kPages = 3;
  const SparseMemory data(kPages * kFar), scale(kPages * kFar * sizeof(float));
  const int32_t table[] = {-7, kPages - 1, 1 << 30}, first = 3;  // slots 3 and 4, two of a page
  const bool valid[] = {true, true};
  w.p.bank = {data.as<int8_t>(), scale.as<float>(), Dtype::kInt8, 2, kFar, 0,
              4 * dim,           2 * dim,           kFar,         0, 16,   nullptr};
  const SlotTable slots{table, &first, valid, 3, kPages};
  const PackPlan plan = plan_pack(6, 3, w.half, kRunWidth<float, kFast>, 4);
  emulator::launch(dim3{static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.splits), 1},
                   dim3{kPackThreads, 1, 1}, 0,
                   [&] { compress_pack_kernel<float, kFast>({w.p, slots, plan}); });
  for (int64_t s = 0; s < 6; ++s) {
    for (int64_t d = 0; d < dim; ++d) {
      const float expected = w.rows[kSource[s] * dim + d];
      expect(w.q_rot[s * dim + d] == expected && w.k_rot[s * dim + d] == expected &&
                 w.v_out[s * dim + d] == expected,
             "rows in interleaved order");
    }
  }
  // slot 3 is the second of page table[1]; slot 4 belongs to a page outside of the bank
  const int8_t* key = data.as<int8_t>() + (kPages - 1) * kFar + 2 * dim;
  const float* key_scale = scale.as<float>() + (kPages - 1) * kFar + 1;
  expect(key_scale[0] == 8.0f / 127 && key_scale[16] == 8.0f / 127, "scales past 2^31 elements");
  for (int64_t d = 0; d < dim; ++d) {
    const int expected = static_cast<int>(std::nearbyint(w.rows[4 * dim + d] * (127.0f / 8)));
    expect(key[d] == expected && key[4 * dim + d] == expected, "values past 2^31 elements");
  }
}

EMULATOR_CASE(compress_pack_in_runs) { check_window<true>(64); }
EMULATOR_CASE(compress_pack_by_elements) { check_window<false>(40); }

EMULATOR_CASE(compress_pack_bwd_strides) {
  constexpr int64_t kDim = 16;
  const SparseMemory grad((kFar * 5 + kDim) * sizeof(float));
  std::vector<float> out(6 * kDim, -99.0f), ones(6 * kDim / 2, 1.0f), zeros(6 * kDim / 2, 0.0f);
  for (int64_t s = 0; s < 6; ++s) grad.as<float>()[s * kFar + 3] = static_cast<float>(s + 1);
  lychee::CompressPackBwdParams p{};
  p.order = {1, 2, 4, 2, ones.data(), zeros.data(), 6, kDim / 2, nullptr, 0};
  p.num_heads = 1, p.head_dim = kDim, p.dtype = Dtype::kFloat32;
  p.grad = grad.as<float>(), p.grad_row_stride = kFar, p.out = out.data();
  const PackPlan plan = plan_pack(6, 1, kDim / 2, 4, 4);
  emulator::launch(dim3{static_cast<unsigned>(plan.blocks), 1, 1}, dim3{kPackThreads, 1, 1}, 0,
                   [&] { compress_pack_bwd_kernel<float, true>({p, plan}); });
  for (int64_t s = 0; s < 6; ++s) {
    for (int64_t d = 0; d < kDim; ++d) {
      expect(out[kSource[s] * kDim + d] == (d == 3 ? s + 1 : 0), "rows in segment order");
    }
  }
}

EMULATOR_CASE(pack_plan_covers_every_head) {
  for (int64_t half = 4; half <= 128; half += 4) {
    for (int width : {4, 8}) {
      for (int64_t rows : {1, 3, 640, 5120, 100000}) {
        for (int64_t heads : {1, 5, 18, 36, 200}) {
          const PackPlan plan = plan_pack(rows, heads, half, width, 132);
          const int64_t groups = kLanesPerWarp / plan.lanes, step = plan.steps * groups;
          expect(kLanesPerWarp % plan.lanes == 0 && plan.lanes * width >= half, "lanes of a row");
          expect(plan.blocks * kPackWarps >= rows && (plan.blocks - 1) * kPackWarps < rows, "rows");
          expect(plan.splits * step >= heads && (plan.splits - 1) * step < heads, "heads");
          expect(plan.steps % kPackUnroll == 0 && plan.splits < 65536, "whole steps");
        }
      }
    }
  }
}

EMULATOR_CASE(pack_plan_fills_the_machine) {
  expect(plan_pack(5120, 36, 64, 8, 132).splits == 1, "one pass over many rows");
  expect(plan_pack(640, 36, 64, 8, 132).splits == 5, "few rows to be split by heads");
  expect(plan_pack(0, 36, 64, 8, 132).blocks == 0, "no block without rows");
  expect(plan_pack(9, 0, 64, 8, 132).splits == 0, "no block without heads");
}

EMULATOR_CASE(alignment_of_runs) {
  const auto at = [](uintptr_t address) { return reinterpret_cast<const void*>(address); };
  expect(Alignment(8, 64).rows(at(32), 2, {128, 8}).holds(), "runs of 16 bytes");
  expect(!Alignment(8, 64).rows(at(40), 2, {128}).holds(), "an address that is refused");
  expect(!Alignment(8, 64).rows(at(32), 2, {128, 12}).holds(), "a stride that is refused");
  expect(!Alignment(8, 12).holds(), "halves of 12 elements to be refused");
  expect(Alignment(8, 64).rows(at(8), 1, {128}).holds(), "runs of 8 bytes of int8");
  expect(Alignment(8, 64).rows(nullptr, 2, {3}).holds(), "what is absent to be ignored");
}

}  // namespace
}  // namespace lychee::cuda
