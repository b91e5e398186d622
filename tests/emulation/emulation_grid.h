// Part of cuda_emulation.h: runs a grid, block by block.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "emulation_block.h"

namespace emulation {

inline void fiber_main() {
  Block& b = block();
  try {
    (*b.body)();
  } catch (const std::exception& e) {
    if (b.fault.empty()) b.fault = e.what();
  }
  b.fibers[b.current]->wait = Wait::kDone;
  ++b.returned;
  _longjmp(b.scheduler, 1);
}

inline void on_crash(int) { siglongjmp(block().crashed, 1); }

inline void prepare_memory() {
  Block& b = block();
  if (b.stacks) return;
  auto map = [](size_t bytes) {
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw Fault("mmap failed");
    return static_cast<unsigned char*>(p);
  };
  b.stacks = map(kMaxThreads * kStackBytes);
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  b.arena = map(kSharedArena + page);
  mprotect(b.arena + kSharedArena, page, PROT_NONE);
  b.static_arena = map(kStaticShared);
  for (int t = 0; t < kMaxThreads; ++t) b.fibers.push_back(std::make_unique<Fiber>());
}

inline void set_thread_index(int t) {
  threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
}

inline void run_block(std::mt19937& random) {
  Block& b = block();
  std::memset(b.arena, kPoison, kSharedArena);
  std::memset(b.static_arena, kPoison, kStaticShared);
  b.warps.assign(b.num_threads / kWarp, Warp{});
  b.barrier_arrived = b.returned = 0;
  for (int t = 0; t < b.num_threads; ++t) {
    Fiber& f = *b.fibers[t];
    f.started = false;
    f.wait = Wait::kNone;
    f.copy_groups.assign(1, {});
  }
  std::vector<int> turn(b.num_threads);
  std::iota(turn.begin(), turn.end(), 0);
  if (order.threads == 1) std::reverse(turn.begin(), turn.end());
  // Volatile: written between _setjmp and its second return.
  volatile bool progress = true;
  while (b.returned < b.num_threads) {
    if (!progress) {
      std::string text = "dead-lock:";
      for (int t = 0; t < b.num_threads; ++t) {
        const Fiber& f = *b.fibers[t];
        if (t > 0 && f.wait == b.fibers[t - 1]->wait && f.line == b.fibers[t - 1]->line) continue;
        text += " thread " + std::to_string(t) +
                (f.wait == Wait::kDone ? std::string(" returned;")
                                       : std::string(" waits in ") + f.kind + " line " +
                                             std::to_string(f.line) + ";");
      }
      throw Fault(text);
    }
    progress = false;
    if (order.threads > 1) std::shuffle(turn.begin(), turn.end(), random);
    for (volatile int i = 0; i < b.num_threads; i = i + 1) {
      const int t = turn[i];
      Fiber& f = *b.fibers[t];
      if (f.wait != Wait::kNone) continue;
      progress = true;
      b.current = t;
      set_thread_index(t);
      if (_setjmp(b.scheduler) == 0) {
        if (f.started) _longjmp(f.resume, 1);
        f.started = true;
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = b.stacks + t * kStackBytes;
        f.start.uc_stack.ss_size = kStackBytes;
        f.start.uc_link = nullptr;
        makecontext(&f.start, fiber_main, 0);
        setcontext(&f.start);
      }
      if (!b.fault.empty()) throw Fault(b.fault);
    }
  }
}

inline void run_grid(const std::function<void()>& body, dim3 grid, dim3 threads, size_t shared) {
  prepare_memory();
  Block& b = block();
  const int num_threads = static_cast<int>(threads.x * threads.y * threads.z);
  if (num_threads < 1 || num_threads > kMaxThreads || num_threads % kWarp != 0) {
    throw Fault("a block must have a multiple of 32 threads, at most 1024");
  }
  if (shared > kMaxShared) throw Fault("too much dynamic shared memory");
  b.body = &body;
  b.num_threads = num_threads;
  b.dynamic_bytes = (shared + 127) / 128 * 128;
  b.dynamic = b.arena + kSharedArena - b.dynamic_bytes;
  b.static_offsets.clear();
  b.static_used = 0;
  b.fault.clear();
  gridDim = grid;
  blockDim = threads;
  const unsigned total = grid.x * grid.y * grid.z;
  std::vector<unsigned> turn(total);
  std::iota(turn.begin(), turn.end(), 0u);
  std::mt19937 random(order.threads * 7919u + order.blocks);
  if (order.blocks == 1) std::reverse(turn.begin(), turn.end());
  if (order.blocks > 1) std::shuffle(turn.begin(), turn.end(), random);

  static std::vector<unsigned char> alternate_stack(64 * 1024);
  stack_t stack{}, old_stack{};
  stack.ss_sp = alternate_stack.data();
  stack.ss_size = alternate_stack.size();
  sigaltstack(&stack, &old_stack);
  struct sigaction action{}, old_segv{}, old_bus{};
  action.sa_handler = on_crash;
  action.sa_flags = SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  std::string failure;
  if (sigsetjmp(b.crashed, 1) == 0) {
    try {
      for (unsigned i = 0; i < total; ++i) {
        blockIdx = dim3(turn[i] % grid.x, turn[i] / grid.x % grid.y, turn[i] / (grid.x * grid.y));
        run_block(random);
      }
    } catch (const std::exception& e) {
      failure = e.what();
    }
  } else {
    failure = where("access outside a buffer", 0);
  }
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaltstack(&old_stack, nullptr);
  if (!failure.empty()) throw Fault(failure);
}

}  // namespace emulation
