// SPDX-License-Identifier: Apache-2.0
// Sizes of packed weights and of the work items that are multiplied with them. Torch-free.
#pragma once

#include <stdint.h>

namespace lychee {

// Columns of a packed weight panel: a whole number of vectors of any width.
constexpr int64_t kPanel = 32;
// Rows per work item, a multiple of every register block: their values stay in the second-level
// cache at common widths.
constexpr int64_t kItemRows = 84;

static inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
static inline int64_t items_of(int64_t rows) { return (rows + kItemRows - 1) / kItemRows; }
// Rows of work in scratch lie an odd number of cache lines apart, so that a block of them does not
// fall into one set of the first-level cache.
static inline int64_t spread_stride(int64_t columns) { return ((columns + 15) / 16 | 1) * 16; }

}  // namespace lychee
