// SPDX-License-Identifier: Apache-2.0
// linear over strided groups of rows, against a scalar formula in double precision.
#include "cpu/linear.h"

#include "harness.h"

namespace {

using namespace lychee;
using sanitizer_test::is_close;
using sanitizer_test::Rows;

struct Shape {
  int64_t groups, group_rows, inputs, outputs, gap;
  bool norm, bias, add;
};

// One of each; primes; a row beyond an item, in groups with a row between them; a long sum.
const Shape kShapes[] = {{1, 1, 1, 1, 0, false, false, false},
                         {1, 7, 13, 5, 3, true, true, true},
                         {17, 5, 24, 33, 5, true, false, true},
                         {1, 3, 1030, 32, 0, false, true, false}};
constexpr float kEps = 1e-3f;

float* floats(Rows& rows) { return reinterpret_cast<float*>(rows.data()); }

void check(const Shape& s, LinearPackFn pack, LinearFn multiply) {
  const auto f32 = Dtype::kFloat32;
  const int64_t rows = s.groups * s.group_rows;
  // one row behind each group belongs to somebody else
  Rows x(s.groups * (s.group_rows + 1), s.inputs, s.gap, f32), norm(1, s.inputs, 0, f32);
  Rows weight(s.outputs, s.inputs, s.gap, f32), bias(1, s.outputs, 0, f32);
  Rows out(rows, s.outputs, s.gap, f32);
  for (Rows* filled : {&x, &norm, &weight, &bias, &out}) filled->fill_random();
  // every buffer has exactly the size that the host gives it
  Rows packed(1, panels_of(s.outputs) * kPanel * s.inputs, 0, f32);
  Rows scratch(1, linear_scratch(s.inputs), 0, f32);

  LinearParams p{};
  p.rows = rows, p.inputs = s.inputs, p.outputs = s.outputs, p.eps = kEps, p.add = s.add;
  p.x = floats(x), p.group_rows = s.group_rows, p.x_row_stride = x.stride();
  p.x_group_stride = (s.group_rows + 1) * x.stride();
  p.norm_weight = s.norm ? floats(norm) : nullptr;
  p.weight = floats(weight), p.weight_stride = weight.stride();
  p.bias = s.bias ? floats(bias) : nullptr;
  p.out = floats(out), p.out_stride = out.stride(), p.packed = floats(packed);
  std::vector<double> before;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < s.outputs; ++j) before.push_back(s.add ? out.at(r, j) : 0);
  }
  for (int64_t index = 0; index < panels_of(s.outputs); ++index) pack(p, index);
  for (int64_t item = 0; item < items_of(rows); ++item) multiply(p, item, floats(scratch));

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r / s.group_rows * (s.group_rows + 1) + r % s.group_rows;
    double squares = 0;
    for (int64_t d = 0; d < s.inputs; ++d) squares += x.at(row, d) * x.at(row, d);
    const double scale = s.norm ? 1 / sqrt(squares / s.inputs + kEps) : 1;
    for (int64_t j = 0; j < s.outputs; ++j) {
      double sum = before[r * s.outputs + j] + (s.bias ? bias.at(0, j) : 0), size = fabs(sum);
      for (int64_t d = 0; d < s.inputs; ++d) {
        const double part = x.at(row, d) * scale * (s.norm ? norm.at(0, d) : 1) * weight.at(j, d);
        sum += part, size += fabs(part);
      }
      EXPECT(is_close(out.at(r, j), sum, f32, 2e-6 * size));
    }
  }
  out.check_gaps();
}

CASE(linear) {
  const auto pack = RUNNABLE(linear_pack);
  const auto multiply = RUNNABLE(linear);
  for (const Shape& shape : kShapes) {
    for (size_t i = 0; i < multiply.size(); ++i) check(shape, pack[i], multiply[i]);
  }
}

}  // namespace
