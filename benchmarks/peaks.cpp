// SPDX-License-Identifier: Apache-2.0
// The machine's yardsticks for one thread: multiply-adds in registers, a read and a copy of memory.
#include <cstring>

namespace {

// The widest registers of the machine this is compiled on; twelve of them hide the latency of two
// multiply-add units and fit beside the operands even where there are only sixteen.
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kLanes = kBytes / sizeof(float);
constexpr int kAccumulators = 12;

typedef float Vector __attribute__((vector_size(kBytes)));

float reduce(const Vector* sums) {
  float total = 0;
  for (int i = 0; i < kAccumulators; ++i)
    for (int lane = 0; lane < kLanes; ++lane) total += sums[i][lane];
  return total;
}

}  // namespace

extern "C" {

// Floating-point operations of one iteration of multiply_add.
long flops_per_iteration() { return 2L * kLanes * kAccumulators; }

float multiply_add(long iterations, float factor, float term) {
  Vector sums[kAccumulators];
  // different values, or a compiler may see that one sum does for all
  for (int j = 0; j < kAccumulators; ++j) sums[j] = Vector{} + (term + j);
  for (long i = 0; i < iterations; ++i)
    for (int j = 0; j < kAccumulators; ++j) sums[j] = sums[j] * factor + term;
  return reduce(sums);
}

// count is a multiple of a few hundred floats; the rest would not show.
float read(const float* source, long count) {
  Vector sums[kAccumulators] = {};
  for (long i = 0; i + kLanes * kAccumulators <= count; i += kLanes * kAccumulators) {
    for (int j = 0; j < kAccumulators; ++j) {
      Vector value;
      std::memcpy(&value, source + i + j * kLanes, sizeof value);
      sums[j] += value;
    }
  }
  return reduce(sums);
}

void copy(float* target, const float* source, long count) {
  std::memcpy(target, source, count * sizeof(float));
}

}  // extern "C"
