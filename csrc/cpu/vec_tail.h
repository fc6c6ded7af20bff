// SPDX-License-Identifier: Apache-2.0
// Loads and stores of fewer elements than a vector has, over whichever vec_*.h came before it.
#pragma once

namespace lychee {
namespace {

// The first `count` elements; the rest of the vector is zero.
template <class T>
inline Vec load_first(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  T buffer[kLanes];
  memset(buffer, 0, sizeof buffer);
  memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

template <class T>
inline void store_first(T* p, Vec x, int64_t count) {
  if (count >= kLanes) return store(p, x);
  T buffer[kLanes];
  store(buffer, x);
  memcpy(p, buffer, count * sizeof(T));
}

}  // namespace
}  // namespace lychee
