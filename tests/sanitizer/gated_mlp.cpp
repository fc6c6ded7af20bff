// SPDX-License-Identifier: Apache-2.0
// gated_mlp in slices of the inner dimension, against a scalar formula in double precision.
#include "cpu/gated_mlp.h"

#include "harness.h"

namespace {

using namespace lychee;
using sanitizer_test::is_close;
using sanitizer_test::Rows;

struct Shape {
  int64_t rows, hidden, inner, slice, gap;
};

// One of each; primes; a row beyond an item; whole vectors; a last slice of one column.
const Shape kShapes[] = {
    {1, 1, 1, 64, 0}, {7, 13, 5, 64, 3}, {kItemRows + 1, 24, 40, 64, 5}, {3, 64, 129, 128, 0}};
constexpr float kEps = 1e-3f;

struct Kernels {
  GatedMlpStepFn norm, pack;
  GatedMlpFn multiply;
};

float* floats(Rows& rows) { return reinterpret_cast<float*>(rows.data()); }

// The row's result, and the size of what it is summed from.
struct Wanted {
  std::vector<double> out, size;
};

Wanted expected_row(Rows& x, int64_t r, Rows& norm, Rows& gate, Rows& up, Rows& down,
                    const Shape& s) {
  double squares = 0;
  for (int64_t d = 0; d < s.hidden; ++d) squares += x.at(r, d) * x.at(r, d);
  const double scale = 1 / sqrt(squares / s.hidden + kEps);
  std::vector<double> out(s.hidden), size(s.hidden);
  for (int64_t d = 0; d < s.hidden; ++d) out[d] = x.at(r, d), size[d] = fabs(out[d]);
  for (int64_t i = 0; i < s.inner; ++i) {
    double g = 0, u = 0;
    for (int64_t d = 0; d < s.hidden; ++d) {
      const double normed = x.at(r, d) * scale * norm.at(0, d);
      g += normed * gate.at(i, d);
      u += normed * up.at(i, d);
    }
    for (int64_t d = 0; d < s.hidden; ++d) {
      const double part = g / (1 + exp(-g)) * u * down.at(d, i);
      out[d] += part;
      size[d] += fabs(part);
    }
  }
  return {out, size};
}

void check(const Shape& s, const Kernels& kernels) {
  const auto f32 = Dtype::kFloat32;
  const int64_t items = items_of(s.rows);
  Rows x(s.rows, s.hidden, s.gap, f32), norm(1, s.hidden, 0, f32);
  Rows gate(s.inner, s.hidden, s.gap, f32), up(s.inner, s.hidden, s.gap, f32);
  Rows down(s.hidden, s.inner, s.gap, f32);
  for (Rows* rows : {&x, &norm, &gate, &up}) rows->fill_random();
  // gates far beyond the range of exp, up and down
  gate.fill_random(s.hidden == 13 ? 1e4 : 1);
  down.fill_random(0.1);
  // every buffer has exactly the size that the host gives it
  Rows normed(1, items * kItemRows * spread_stride(s.hidden), 0, f32);
  Rows packed_gate(1, s.slice * s.hidden, 0, f32), packed_up(1, s.slice * s.hidden, 0, f32);
  Rows packed_down(1, panels_of(s.hidden) * kPanel * s.slice, 0, f32);
  Rows scratch(1, gated_mlp_scratch(s.slice), 0, f32);
  std::vector<Wanted> wanted;
  for (int64_t r = 0; r < s.rows; ++r) {
    wanted.push_back(expected_row(x, r, norm, gate, up, down, s));
  }

  GatedMlpParams p{};
  p.rows = s.rows, p.hidden = s.hidden, p.inner = s.inner, p.eps = kEps;
  p.x = floats(x), p.x_stride = x.stride(), p.norm_weight = floats(norm);
  p.gate = floats(gate), p.up = floats(up), p.down = floats(down);
  p.gate_stride = gate.stride(), p.up_stride = up.stride(), p.down_stride = down.stride();
  p.normed = floats(normed), p.packed_gate = floats(packed_gate);
  p.packed_up = floats(packed_up), p.packed_down = floats(packed_down);
  for (int64_t item = 0; item < items; ++item) kernels.norm(p, item);
  for (p.first = 0; p.first < s.inner; p.first += s.slice) {
    p.count = s.inner - p.first < s.slice ? s.inner - p.first : s.slice;
    const int64_t panels = 2 * panels_of(p.count) + panels_of(s.hidden);
    for (int64_t index = 0; index < panels; ++index) kernels.pack(p, index);
    for (int64_t item = 0; item < items; ++item) kernels.multiply(p, item, floats(scratch));
  }
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t d = 0; d < s.hidden; ++d) {
      EXPECT(is_close(x.at(r, d), wanted[r].out[d], f32, 2e-6 * wanted[r].size[d]));
    }
  }
  x.check_gaps();
}

CASE(gated_mlp) {
  const auto norm = RUNNABLE(gated_mlp_norm), pack = RUNNABLE(gated_mlp_pack);
  const auto multiply = RUNNABLE(gated_mlp);
  for (const Shape& shape : kShapes) {
    for (size_t i = 0; i < multiply.size(); ++i) check(shape, {norm[i], pack[i], multiply[i]});
  }
}

}  // namespace
