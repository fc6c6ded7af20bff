// SPDX-License-Identifier: Apache-2.0
// linear_ on CPU: checks, packing, registration.
#include "cpu/linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace lychee {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr const char* kOp = "linear_";

const float* floats(const Tensor& t, std::initializer_list<int64_t> sizes, const char* argument) {
  check_cpu(t, kOp, argument);
  check_shape(t, sizes, kOp, argument);
  check_dtype(t, ScalarType::Float, kOp, argument);
  check_last_dim_contiguous(t, kOp, argument);
  return static_cast<const float*>(t.const_data_ptr());
}

void set_rows(LinearParams* p, const Tensor& x) {
  if (x.dim() == 3) {
    p->x = floats(x, {-1, -1, -1}, "x");
    p->group_rows = x.size(1), p->x_group_stride = x.stride(0), p->x_row_stride = x.stride(1);
    p->rows = x.size(0) * x.size(1), p->inputs = x.size(2);
  } else {
    p->x = floats(x, {-1, -1}, "x");
    p->rows = p->group_rows = x.size(0), p->x_row_stride = x.stride(0), p->inputs = x.size(1);
  }
}

void run(LinearParams p) {
  const auto pack = LYCHEE_ISA_TABLE(LinearPackFn, linear_pack).pick();
  const auto multiply = LYCHEE_ISA_TABLE(LinearFn, linear).pick();
  const int64_t panels = panels_of(p.outputs);
  const FloatBuffer packed = allocate_floats(panels * kPanel * p.inputs, kOp);
  p.packed = packed.get();
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) pack(p, index);
  });
  for_each_item(items_of(p.rows), linear_scratch(p.inputs), kOp,
                [&](int64_t item, float* scratch) { multiply(p, item, scratch); });
}

void linear_cpu(const Tensor& out, const Tensor& x, const OptionalTensor& norm_weight, double eps,
                const Tensor& weight, const OptionalTensor& bias, bool add) {
  LinearParams p{};
  set_rows(&p, x);
  p.weight = floats(weight, {-1, p.inputs}, "weight");
  p.outputs = weight.size(0), p.weight_stride = weight.stride(0);
  if (norm_weight.has_value()) p.norm_weight = floats(*norm_weight, {p.inputs}, "norm_weight");
  if (bias.has_value()) p.bias = floats(*bias, {p.outputs}, "bias");
  p.eps = static_cast<float>(eps);
  p.add = add;
  floats(out, {p.rows, p.outputs}, "out");
  p.out = static_cast<float*>(out.mutable_data_ptr());
  p.out_stride = out.stride(0);
  if (p.rows > 0 && p.outputs > 0) run(p);
}

}  // namespace
}  // namespace lychee

STABLE_TORCH_LIBRARY_IMPL(lychee, CPU, m) { m.impl("linear_", TORCH_BOX(&lychee::linear_cpu)); }
