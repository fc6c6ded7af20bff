// SPDX-License-Identifier: Apache-2.0
// Scratch memory of the kernels, and the loop of threads that each own a part of it.
#pragma once

#include <stdint.h>

#include <cstdlib>
#include <functional>
#include <memory>

namespace lychee {

// 64-byte aligned, whole cache lines, and not initialised; an error of `op` where memory is out.
using FloatBuffer = std::unique_ptr<float, decltype(&std::free)>;
FloatBuffer allocate_floats(int64_t count, const char* op);

// Calls fn(item, scratch) for every item. Threads draw items one by one, last first: the last
// blocks of a causal segment are the longest.
void for_each_item(int64_t items, int64_t scratch_floats, const char* op,
                   const std::function<void(int64_t, float*)>& fn);

}  // namespace lychee
