// SPDX-License-Identifier: Apache-2.0
// gated_mlp_ on CPU: checks, slices of the inner dimension, registration.
#include "cpu/gated_mlp.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"
#include "stable.h"

namespace lychee {
namespace {

constexpr const char* kOp = "gated_mlp_";

const float* weight(const Tensor& t, std::initializer_list<int64_t> sizes, const char* argument) {
  check_cpu(t, kOp, argument);
  check_shape(t, sizes, kOp, argument);
  check_dtype(t, ScalarType::Float, kOp, argument);
  check_last_dim_contiguous(t, kOp, argument);
  return static_cast<const float*>(t.const_data_ptr());
}

void run_slices(GatedMlpParams p) {
  const auto norm = LYCHEE_ISA_TABLE(GatedMlpStepFn, gated_mlp_norm).pick();
  const auto pack = LYCHEE_ISA_TABLE(GatedMlpStepFn, gated_mlp_pack).pick();
  const auto multiply = LYCHEE_ISA_TABLE(GatedMlpFn, gated_mlp).pick();
  const int64_t items = items_of(p.rows), inner = p.inner;
  const int64_t per_panel = 3 * kPanel * p.hidden * static_cast<int64_t>(sizeof(float));
  const int64_t fit = kPackedBytes / per_panel > 1 ? kPackedBytes / per_panel : 1;
  const int64_t slice = (fit < panels_of(inner) ? fit : panels_of(inner)) * kPanel;

  const FloatBuffer normed = allocate_floats(items * kItemRows * spread_stride(p.hidden), kOp);
  p.normed = normed.get();
  torch::stable::parallel_for(0, items, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) norm(p, item);
  });
  const int64_t half = slice * p.hidden;
  const FloatBuffer packed = allocate_floats(2 * half + panels_of(p.hidden) * kPanel * slice, kOp);
  p.packed_gate = packed.get();
  p.packed_up = p.packed_gate + half;
  p.packed_down = p.packed_up + half;
  for (p.first = 0; p.first < inner; p.first += slice) {
    p.count = inner - p.first < slice ? inner - p.first : slice;
    const int64_t panels = 2 * panels_of(p.count) + panels_of(p.hidden);
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) pack(p, index);
    });
    for_each_item(items, gated_mlp_scratch(slice), kOp,
                  [&](int64_t item, float* scratch) { multiply(p, item, scratch); });
  }
}

void gated_mlp_cpu(const Tensor& x, const Tensor& norm_weight, double eps, const Tensor& gate,
                   const Tensor& up, const Tensor& down) {
  weight(x, {-1, -1}, "x");
  GatedMlpParams p{};
  p.rows = x.size(0), p.hidden = x.size(1);
  p.x = static_cast<float*>(x.mutable_data_ptr());
  p.x_stride = x.stride(0);
  p.norm_weight = weight(norm_weight, {p.hidden}, "norm_weight");
  p.eps = static_cast<float>(eps);
  p.gate = weight(gate, {-1, p.hidden}, "gate");
  p.inner = gate.size(0);
  p.up = weight(up, {p.inner, p.hidden}, "up");
  p.down = weight(down, {p.hidden, p.inner}, "down");
  p.gate_stride = gate.stride(0), p.up_stride = up.stride(0), p.down_stride = down.stride(0);
  if (p.rows > 0 && p.hidden > 0 && p.inner > 0) run_slices(p);
}

}  // namespace
}  // namespace lychee

STABLE_TORCH_LIBRARY_IMPL(lychee, CPU, m) {
  m.impl("gated_mlp_", TORCH_BOX(&lychee::gated_mlp_cpu));
}
