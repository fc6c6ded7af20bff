// SPDX-License-Identifier: Apache-2.0
// One block of threads: its state, the scheduler, __syncthreads, and what ends a launch with a
// report.
#pragma once

#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace lychee::emulator {

// A line of a kernel.
struct Site {
  const char* file = "";
  unsigned line = 0;

  static Site current(std::source_location location = std::source_location::current()) {
    return {location.file_name(), location.line()};
  }
  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
  std::string name() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

struct Statistics {
  uint64_t blocks, switches, barriers, collectives, mma, matrix_loads, bank_conflicts, copies;
};

struct Options {
  uint64_t seed = 1;   // of the schedule; 0 runs threads and blocks in order
  bool poison = true;  // NaN in shared memory at a block's start, and in targets of open copies
};

inline thread_local Options options;
inline thread_local Statistics statistics{};

struct Copy {
  void* target;
  const void* source;
  size_t bytes;
  bool valid;
};

enum class State { kReady, kAtBarrier, kAtCollective, kDone };

struct Thread {
  explicit Thread(void (*entry)()) : stack(entry) {}

  Stack stack;
  unsigned index = 0;
  dim3 position;
  State state = State::kDone;
  Site waits_at;
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> copy_groups;
};

struct Barrier {
  unsigned arrived = 0;
  uint32_t generation = 0;
  Site site;
};

// Where the lanes of one mask meet. Two buffers, so that a lane may arrive at the next collective
// while another still reads the last.
struct Rendezvous {
  static constexpr size_t kBytes = 64;

  uint32_t mask = 0, arrived = 0, generation = 0;
  Site site;
  int kind = 0;
  alignas(16) unsigned char slots[2][32][kBytes];
};

struct Warp {
  Rendezvous rendezvous[4];
};

struct Block {
  dim3 index, threads, grid;
  unsigned count = 0, alive = 0;
  std::vector<std::unique_ptr<Thread>> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned> ready;
  Barrier barrier;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  Context scheduler;
  const std::function<void()>* kernel = nullptr;
  uint64_t random_state = 1;
  std::string error;
  char order = 0;  // an address: blocks release and acquire it one after the other

  uint64_t random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
  }
};

inline thread_local Block* current_block = nullptr;
inline thread_local Thread* current_thread = nullptr;

// Read by device code at every threadIdx and blockIdx.
LYCHEE_EMULATOR_HIDDEN inline void set_current(Block* block, Thread* thread) {
  current_block = block;
  current_thread = thread;
}

inline unsigned char* shared_memory() { return current_block->shared; }

LYCHEE_EMULATOR_HIDDEN inline void leave_thread() {
  switch_context(current_thread->stack.context, current_block->scheduler);
}

// Ends the launch with this report.
[[noreturn]] inline void fail(const std::string& report) {
  current_block->error = report;
  current_thread->state = State::kDone;
  for (;;) leave_thread();
}

inline void wait_as(State state, Site site) {
  current_thread->state = state;
  current_thread->waits_at = site;
  leave_thread();
}

inline void wake(unsigned index) {
  current_block->fibers[index]->state = State::kReady;
  current_block->ready.push_back(index);
}

inline void open_barrier() {
  Block& block = *current_block;
  block.barrier.arrived = 0;
  ++block.barrier.generation;
  for (unsigned i = 0; i < block.count; ++i) {
    if (block.fibers[i]->state == State::kAtBarrier) wake(i);
  }
}

// Threads that have exited count as arrived, as on sm_70 and newer.
inline void synchronise_block(Site site) {
  Block& block = *current_block;
  release(&block.barrier);
  {
    Hidden hidden;
    Barrier& barrier = block.barrier;
    ++statistics.barriers;
    if (barrier.arrived && !(barrier.site == site)) {
      fail("divergent barrier: " + barrier.site.name() + " and " + site.name());
    }
    barrier.site = site;
    const uint32_t generation = barrier.generation;
    if (++barrier.arrived == block.alive) {
      open_barrier();
      // The last to arrive must not always run first.
      wake(current_thread->index);
      leave_thread();
    } else {
      while (barrier.generation == generation) wait_as(State::kAtBarrier, site);
    }
  }
  acquire(&block.barrier);
}

// Runs the kernel as this thread; an exception, thrown by a test, ends the launch like a report.
inline void run_kernel() {
  std::string thrown;
  try {
    (*current_block->kernel)();
  } catch (const std::exception& error) {
    Hidden hidden;
    thrown = error.what();
  }
  if (!thrown.empty()) fail(thrown);
}

inline void end_thread() {
  Hidden hidden;
  Block& block = *current_block;
  Thread& thread = *current_thread;
  if (!thread.open_copies.empty() || !thread.copy_groups.empty()) {
    fail("thread " + std::to_string(thread.index) + " exits with copies not waited for");
  }
  thread.state = State::kDone;
  --block.alive;
  if (block.barrier.arrived && block.barrier.arrived == block.alive) open_barrier();
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &current_block->scheduler.bottom,
                                  &current_block->scheduler.size);
#endif
  for (;;) {
    acquire(&current_block->order);
    run_kernel();
    release(&current_block->order);
    end_thread();
    leave_thread();
  }
}

// Which lines the threads wait at, and how many of them.
inline std::string deadlock_report(const Block& block) {
  std::map<std::string, int> waiting;
  for (unsigned i = 0; i < block.count; ++i) {
    const Thread& thread = *block.fibers[i];
    if (thread.state == State::kAtBarrier) ++waiting["a barrier, " + thread.waits_at.name()];
    if (thread.state == State::kAtCollective) {
      ++waiting["a warp collective, " + thread.waits_at.name()];
    }
  }
  std::string report = "deadlock:";
  for (const auto& [where, count] : waiting) {
    report += (report.back() == ':' ? " " : "; ") + std::to_string(count) + " at " + where;
  }
  return report;
}

inline void start_block(Block& block) {
  while (block.fibers.size() < block.count) {
    block.fibers.push_back(std::make_unique<Thread>(run_thread));
  }
  block.ready.clear();
  for (unsigned i = block.count; i-- > 0;) {
    Thread& thread = *block.fibers[i];
    thread.index = i;
    thread.position = {i % block.threads.x, i / block.threads.x % block.threads.y,
                       i / (block.threads.x * block.threads.y)};
    thread.state = State::kReady;
    block.ready.push_back(i);
  }
  block.alive = block.count;
  block.barrier = Barrier{};
  for (Warp& warp : block.warps) {
    for (Rendezvous& rendezvous : warp.rendezvous) rendezvous.mask = rendezvous.arrived = 0;
  }
  if (options.poison) std::memset(block.shared, 0xff, block.shared_bytes);
}

inline void run_block(Block& block) {
  start_block(block);
  release(&block.order);
  while (block.alive && block.error.empty()) {
    if (block.ready.empty()) {
      block.error = deadlock_report(block);
      break;
    }
    if (options.seed)
      std::swap(block.ready[block.random() % block.ready.size()], block.ready.back());
    Thread& next = *block.fibers[block.ready.back()];
    block.ready.pop_back();
    set_current(&block, &next);
    ++statistics.switches;
    switch_context(block.scheduler, next.stack.context);
  }
  acquire(&block.order);
  ++statistics.blocks;
}

}  // namespace lychee::emulator
