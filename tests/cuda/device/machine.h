// A few multiprocessors on the CPU: every CUDA thread is a fiber, run in random order; barriers,
// TMA loads and wgmmas are those of the PTX ISA, loads arriving and products reading late or early.
// With the headers beside this in place of their namesakes in csrc/cuda/hopper, the kernel's own
// code compiles and runs.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "shared_memory.h"

struct CUtensorMap {  // what cuTensorMapEncodeTiled is told, but for strides
  const emulation::Tensor* tensor;
  int box_t;
};

namespace machine {

struct Index {
  int x;
};

// Threads that meet. Also a named barrier, where some only arrive.
struct Meeting {
  int arrived = 0;
  int64_t times = 0;
};

// PTX ISA, mbarrier: a phase is over when no arrival and no byte is pending; the next one begins.
struct MBarrier {
  int expected, pending, bytes = 0;
  int64_t phase = 0;
  bool fenced = false;  // since it was made: seen by the copy engine and by other blocks
};

struct Product {
  float* acc;
  int count;
  uint64_t a, b;
  bool accumulate;
};

struct Block {
  std::vector<uint8_t> memory;  // for addresses; the elements are in `shared`
  emulation::SharedMemory shared;
  std::map<uint32_t, MBarrier> barriers;
  Meeting named[16], all;
  explicit Block(size_t bytes) : memory(bytes), shared(bytes) {}
};

struct Warp {
  Meeting meeting;
  uint32_t slots[32];
};

struct Load {
  CUtensorMap map;
  int block;
  uint32_t address, barrier;
  int column, t, sample;
};

struct Thread {
  Index thread_index, block_index;
  int rank;
  Warp* warp;
  bool done = false;
  std::vector<Product> open;
  std::deque<std::vector<Product>> groups;  // of wgmmas under way
  ucontext_t context;
  std::unique_ptr<char[]> stack;
};

constexpr size_t kStack = 64 * 1024;
constexpr uint32_t kBase = 16 * 77;  // of dynamic shared memory: not aligned to 1024

inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline std::vector<std::unique_ptr<Block>> blocks;
inline std::vector<std::unique_ptr<Warp>> warps;
inline std::vector<std::unique_ptr<Thread>> threads;
inline std::vector<Load> loads;
inline Meeting cluster;
inline Random choice(1);
inline bool read_late = false;
inline int64_t progress = 0;
inline std::function<void()> kernel;

inline void yield() { swapcontext(&current->context, &scheduler); }
inline void wait_until(const std::function<bool()>& over) {
  while (!over()) yield();
  ++progress;
}
inline Block& here() { return *blocks[current->rank]; }

inline void arrive(Meeting& meeting, int of) {
  CHECK(meeting.arrived < of, "more threads arrive than the barrier takes");
  if (++meeting.arrived == of) {
    meeting.arrived = 0;
    ++meeting.times;
  }
  ++progress;
}
inline void meet(Meeting& meeting, int of) {
  const int64_t before = meeting.times;
  arrive(meeting, of);
  wait_until([&] { return meeting.times != before; });
}

template <typename T>
T exchange(T value, int from) {
  static_assert(sizeof(T) == 4);
  Warp& warp = *current->warp;
  std::memcpy(&warp.slots[current->thread_index.x % 32], &value, 4);
  meet(warp.meeting, 32);
  std::memcpy(&value, &warp.slots[from], 4);
  meet(warp.meeting, 32);
  return value;
}

inline void settle(MBarrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    ++barrier.phase;
    barrier.pending = barrier.expected;
  }
  ++progress;
}
inline MBarrier& barrier_at(int rank, uint32_t address) {
  const auto found = blocks[rank]->barriers.find(address);
  CHECK(found != blocks[rank]->barriers.end(), "no barrier at %u", address);
  return found->second;
}

inline void deliver(const Load& load) {
  Block& to = *blocks[load.block];
  emulation::tma_load(to.shared, load.address, *load.map.tensor, load.column, load.t, load.sample,
                      load.map.box_t, /*once=*/false);
  MBarrier& barrier = barrier_at(load.block, load.barrier);
  CHECK(barrier.fenced, "the copy engine may not see this barrier yet");
  barrier.bytes -= load.map.box_t * 128;
  settle(barrier);
}

inline void start() {
  kernel();
  current->done = true;
  ++progress;
  yield();
}

inline std::unique_ptr<Thread> make_thread(int index, int block, int rank) {
  auto thread = std::make_unique<Thread>();
  thread->thread_index = {index};
  thread->block_index = {block};
  thread->rank = rank;
  thread->warp = warps.back().get();
  thread->stack = std::make_unique<char[]>(kStack);
  getcontext(&thread->context);
  thread->context.uc_stack.ss_sp = thread->stack.get();
  thread->context.uc_stack.ss_size = kStack;
  thread->context.uc_link = &scheduler;
  makecontext(&thread->context, start, 0);
  return thread;
}

// Runs `body` in every thread of a cluster.
inline void run(int cluster_blocks, int first_block, int size, size_t shared_bytes, uint64_t seed,
                const std::function<void()>& body) {
  blocks.clear(), warps.clear(), threads.clear(), loads.clear();
  cluster = {};
  choice = Random(seed);
  read_late = seed % 2 == 1;
  kernel = body;
  for (int rank = 0; rank < cluster_blocks; ++rank) {
    blocks.push_back(std::make_unique<Block>(kBase + shared_bytes));
    for (int t = 0; t < size; ++t) {
      if (t % 32 == 0) warps.push_back(std::make_unique<Warp>());
      threads.push_back(make_thread(t, first_block + rank, rank));
    }
  }
  int64_t seen = -1;
  for (int idle = 0; idle < 100; ++idle) {
    if (progress != seen) idle = 0;
    seen = progress;
    const bool all_done =
        std::all_of(threads.begin(), threads.end(), [](auto& t) { return t->done; });
    if (all_done) {
      CHECK(loads.empty(), "a load outlives its block");
      for (auto& block : blocks)
        for (Meeting& m : block->named) CHECK(m.arrived == 0, "arrivals are left over");
      return;
    }
    for (size_t k = 0; k < loads.size();) {
      if (choice.below(3) == 0) {
        const Load load = loads[k];
        loads.erase(loads.begin() + k);
        deliver(load);
      } else {
        ++k;
      }
    }
    const size_t slow = choice.below(2 * static_cast<int>(warps.size()));  // a warp, or none
    const Warp* held_back = slow < warps.size() ? warps[slow].get() : nullptr;
    for (auto& thread : threads) {
      if (thread->done || thread->warp == held_back) continue;
      current = thread.get();
      swapcontext(&scheduler, &thread->context);
    }
  }
  CHECK(false, "nobody can go on");
}

}  // namespace machine
