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

// Blocks of outputs that a thread takes at once, at least: fewer bytes are not worth a thread.
constexpr int64_t kHalfBytes = 1 << 17;

struct Checked {
  ScalarType dtype;

  const void* operator()(const Tensor& t, std::initializer_list<int64_t> sizes,
                         const char* argument) const {
    check_cpu(t, kOp, argument);
    check_shape(t, sizes, kOp, argument);
    check_dtype(t, dtype, kOp, argument);
    check_last_dim_contiguous(t, kOp, argument);
    return t.const_data_ptr();
  }
};

void set_rows(LinearParams* p, const Tensor& x, const Checked& checked) {
  if (x.dim() == 3) {
    p->x = checked(x, {-1, -1, -1}, "x");
    p->group_rows = x.size(1), p->x_group_stride = x.stride(0), p->x_row_stride = x.stride(1);
    p->rows = x.size(0) * x.size(1), p->inputs = x.size(2);
  } else {
    p->x = checked(x, {-1, -1}, "x");
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

void run_half(const LinearParams& p) {
  const auto load = LYCHEE_ISA_TABLE(LinearHalfRowsFn, linear_half_rows).pick();
  const auto multiply = LYCHEE_ISA_TABLE(LinearHalfFn, linear_half).pick();
  const int64_t most = p.rows < kItemRows ? p.rows : kItemRows;
  const FloatBuffer rows = allocate_floats(most * spread_stride(p.inputs), kOp);
  const int64_t grain = kHalfBytes / (2 * kHalfOutputs * (p.inputs + 1)) + 1;
  for (int64_t item = 0; item < items_of(p.rows); ++item) {
    load(p, item, rows.get());
    torch::stable::parallel_for(0, half_blocks_of(p.outputs), grain,
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t block = begin; block < end; ++block)
                                    multiply(p, item, rows.get(), block);
                                });
  }
}

void linear_cpu(const Tensor& out, const Tensor& x, const OptionalTensor& norm_weight, double eps,
                const Tensor& weight, const OptionalTensor& bias, bool add) {
  LinearParams p{};
  p.dtype = io_dtype(weight, kOp, "weight");
  const Checked checked{weight.scalar_type()};
  set_rows(&p, x, checked);
  p.weight = checked(weight, {-1, p.inputs}, "weight");
  p.outputs = weight.size(0), p.weight_stride = weight.stride(0);
  if (norm_weight.has_value()) p.norm_weight = checked(*norm_weight, {p.inputs}, "norm_weight");
  if (bias.has_value()) p.bias = checked(*bias, {p.outputs}, "bias");
  p.eps = static_cast<float>(eps);
  p.add = add;
  checked(out, {p.rows, p.outputs}, "out");
  p.out = out.mutable_data_ptr();
  p.out_stride = out.stride(0);
  if (p.rows == 0 || p.outputs == 0) return;
  p.dtype == Dtype::kFloat32 ? run(p) : run_half(p);
}

}  // namespace
}  // namespace lychee

STABLE_TORCH_LIBRARY_IMPL(lychee, CPU, m) { m.impl("linear_", TORCH_BOX(&lychee::linear_cpu)); }
