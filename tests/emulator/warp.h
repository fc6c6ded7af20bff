// SPDX-License-Identifier: Apache-2.0
// Warp collectives: lanes of a mask meet and exchange values; a shuffle orders no memory.
#pragma once

#include <cstring>
#include <string>

#include "block.h"

namespace lychee::emulator {

enum Kind { kSyncwarp, kShuffle, kBallot, kMma, kLoadMatrix };

inline Rendezvous& find_rendezvous(Warp& warp, uint32_t mask, Site site) {
  for (Rendezvous& place : warp.rendezvous) {
    if (place.arrived && place.mask == mask) return place;
    if (place.arrived && (place.mask & mask)) {
      fail("overlapping masks of warp collectives: " + place.site.name() + " and " + site.name());
    }
  }
  for (Rendezvous& place : warp.rendezvous) {
    if (place.mask == mask) return place;
  }
  for (Rendezvous& place : warp.rendezvous) {
    if (place.arrived) continue;
    place.mask = mask;
    return place;
  }
  fail("more than four masks of warp collectives at once, " + site.name());
}

// Values of all lanes of a mask, as they stood when the last of them arrived.
template <class Value>
class Exchanged {
 public:
  explicit Exchanged(const unsigned char (*slots)[Rendezvous::kBytes]) : slots_(slots) {}

  Value operator[](unsigned lane) const {
    Value value;
    __builtin_memcpy(&value, slots_[lane], sizeof(Value));
    return value;
  }

 private:
  const unsigned char (*slots_)[Rendezvous::kBytes];
};

inline unsigned lane_index() { return current_thread->index & 31; }

// Publishes `mine` and waits for the other lanes; the caller holds a Hidden.
template <class Value>
Exchanged<Value> exchange(uint32_t mask, const Value& mine, Kind kind, Site site) {
  static_assert(sizeof(Value) <= Rendezvous::kBytes);
  ++statistics.collectives;
  Block& block = *current_block;
  const unsigned lane = lane_index(), first = current_thread->index - lane;
  if (!(mask >> lane & 1)) fail("warp collective: caller not in its own mask, " + site.name());
  Rendezvous& place = find_rendezvous(block.warps[first / 32], mask, site);
  if (place.arrived && !(place.site == site && place.kind == kind)) {
    fail("divergent warp collective: " + place.site.name() + " and " + site.name());
  }
  place.site = site;
  place.kind = kind;
  const uint32_t generation = place.generation;
  __builtin_memcpy(place.slots[generation & 1][lane], &mine, sizeof(Value));
  place.arrived |= 1u << lane;
  if (place.arrived == mask) {
    place.arrived = 0;
    ++place.generation;
    for (unsigned other = 0; other < 32 && first + other < block.count; ++other) {
      if ((mask >> other & 1) && other != lane) wake(first + other);
    }
  } else {
    while (place.generation == generation) wait_as(State::kAtCollective, site);
  }
  return Exchanged<Value>(place.slots[generation & 1]);
}

inline void synchronise_warp(uint32_t mask, Site site) {
  Warp* warp = &current_block->warps[current_thread->index / 32];
  release(warp);
  {
    Hidden hidden;
    exchange(mask, 0, kSyncwarp, site);
  }
  acquire(warp);
}

// A lane outside of the mask has no value to give: the caller keeps its own.
template <class Value>
Value shuffle(uint32_t mask, Value mine, unsigned source, Site site) {
  Hidden hidden;
  const auto values = exchange(mask, mine, kShuffle, site);
  return mask >> (source & 31) & 1 ? values[source & 31] : mine;
}

inline uint32_t ballot(uint32_t mask, bool vote, Site site) {
  Hidden hidden;
  const auto votes = exchange(mask, vote, kBallot, site);
  uint32_t result = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1) && votes[lane]) result |= 1u << lane;
  }
  return result;
}

}  // namespace lychee::emulator
