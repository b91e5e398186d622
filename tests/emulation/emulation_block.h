// Part of cuda_emulation.h: one block. Fibers, barriers, warp collectives, shared memory and
// cp.async.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kMaxShared = 163 * 1024;  // what a block of sm_80 may ask for
constexpr size_t kStaticShared = 48 * 1024;
constexpr size_t kSharedArena = 256 * 1024;
constexpr int kPoison = 0xFF;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// 0 forwards, 1 backwards, otherwise the seed of a new permutation at every turn.
struct Order {
  unsigned threads = 0, blocks = 0;
};
inline Order order;
inline std::string last_error;

struct AsyncCopy {
  unsigned char* target;
  const unsigned char* source;
  int bytes, valid_bytes;
};

enum class Wait { kNone, kBarrier, kCollective, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started;
  Wait wait;
  int line;  // where it waits
  const char* kind;
  std::vector<std::vector<AsyncCopy>> copy_groups;  // the last one is still open
};

struct Warp {
  const char* kind;
  int line, arrived;
  void* args[kWarp];
};

struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  unsigned char* stacks = nullptr;
  unsigned char* arena = nullptr;  // dynamic shared memory ends where the protected page begins
  unsigned char* dynamic = nullptr;
  size_t dynamic_bytes = 0;
  std::unordered_map<const void*, size_t> static_offsets;
  unsigned char* static_arena = nullptr;
  size_t static_used = 0;
  const std::function<void()>* body = nullptr;
  int num_threads = 0, current = 0, barrier_arrived = 0, barrier_line = 0, returned = 0;
  jmp_buf scheduler;
  sigjmp_buf crashed;
  std::string fault;
};

inline Block& block() {
  static Block instance;
  return instance;
}

inline void yield_to_scheduler() {
  Block& b = block();
  Fiber& f = *b.fibers[b.current];
  if (_setjmp(f.resume) == 0) _longjmp(b.scheduler, 1);
}

inline std::string where(const char* what, int line) {
  char text[160];
  std::snprintf(text, sizeof text, "%s (line %d, thread %d, block %u)", what, line, block().current,
                blockIdx.x);
  return text;
}

inline void sync_block(int line) {
  Block& b = block();
  if (b.returned > 0) throw Fault(where("__syncthreads after some threads returned", line));
  if (b.barrier_arrived > 0 && b.barrier_line != line) {
    throw Fault(where("__syncthreads reached from two different lines", line));
  }
  b.barrier_line = line;
  if (++b.barrier_arrived == b.num_threads) {
    b.barrier_arrived = 0;
    for (int t = 0; t < b.num_threads; ++t) b.fibers[t]->wait = Wait::kNone;
    return;
  }
  Fiber& f = *b.fibers[b.current];
  f.wait = Wait::kBarrier;
  f.line = line;
  f.kind = "__syncthreads";
  yield_to_scheduler();
}

// All 32 lanes meet; the last one to arrive runs `work` on everybody's arguments.
template <class Args, class Work>
void collective(const char* kind, int line, Args* mine, Work work) {
  Block& b = block();
  Warp& warp = b.warps[b.current / kWarp];
  const int lane = b.current % kWarp;
  if (warp.arrived > 0 && (warp.line != line || std::strcmp(warp.kind, kind) != 0)) {
    throw Fault(where(kind, line) + ": other lanes are in " + warp.kind + ", line " +
                std::to_string(warp.line));
  }
  warp.kind = kind;
  warp.line = line;
  warp.args[lane] = mine;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    Args* all[kWarp];
    for (int i = 0; i < kWarp; ++i) all[i] = static_cast<Args*>(warp.args[i]);
    work(all);
    const int first = b.current - lane;
    for (int i = 0; i < kWarp; ++i) b.fibers[first + i]->wait = Wait::kNone;
    return;
  }
  Fiber& f = *b.fibers[b.current];
  f.wait = Wait::kCollective;
  f.line = line;
  f.kind = kind;
  yield_to_scheduler();
}

inline int lane_of(int thread) { return thread % kWarp; }

inline void require_full_mask(unsigned mask, int line) {
  if (mask != 0xffffffffu) throw Fault(where("only full warp masks are emulated", line));
}

template <class T, class Source>
T shuffle(const char* kind, unsigned mask, T value, int line, Source source) {
  require_full_mask(mask, line);
  struct Args {
    T in, out;
  } args{value, value};
  collective(kind, line, &args, [&](Args** all) {
    for (int i = 0; i < kWarp; ++i) {
      const int from = source(i);
      all[i]->out = from >= 0 && from < kWarp ? all[from]->in : all[i]->in;
    }
  });
  return args.out;
}

inline unsigned ballot(unsigned mask, bool predicate, int line) {
  require_full_mask(mask, line);
  struct Args {
    bool in;
    unsigned out;
  } args{predicate, 0};
  collective("__ballot_sync", line, &args, [](Args** all) {
    unsigned bits = 0;
    for (int i = 0; i < kWarp; ++i) bits |= unsigned{all[i]->in} << i;
    for (int i = 0; i < kWarp; ++i) all[i]->out = bits;
  });
  return args.out;
}

inline void sync_warp(unsigned mask, int line) {
  require_full_mask(mask, line);
  int nothing = 0;
  collective("__syncwarp", line, &nothing, [](int**) {});
}

// Shared memory. An address is an offset into the block's dynamic shared memory, as in PTX.
inline uint32_t shared_address(const void* p) {
  Block& b = block();
  const auto offset = static_cast<const unsigned char*>(p) - b.dynamic;
  if (offset < 0 || static_cast<size_t>(offset) > b.dynamic_bytes) {
    throw Fault(where("address outside dynamic shared memory", 0));
  }
  return static_cast<uint32_t>(offset);
}

inline unsigned char* shared_pointer(uint32_t address, int bytes, int line) {
  Block& b = block();
  if (address % bytes != 0) throw Fault(where("misaligned shared address", line));
  if (address + size_t(bytes) > b.dynamic_bytes) {
    throw Fault(where("shared address out of bounds", line));
  }
  return b.dynamic + address;
}

inline void* static_shared(const void* key, size_t bytes) {
  Block& b = block();
  auto found = b.static_offsets.find(key);
  if (found == b.static_offsets.end()) {
    const size_t offset = (b.static_used + 127) / 128 * 128;
    if (offset + bytes > kStaticShared) throw Fault(where("too much static shared memory", 0));
    b.static_used = offset + bytes;
    found = b.static_offsets.emplace(key, offset).first;
  }
  return b.static_arena + found->second;
}

inline void copy_async(uint32_t target, const void* source, int bytes, int valid_bytes, int line) {
  unsigned char* to = shared_pointer(target, bytes, line);
  if (valid_bytes > 0 && reinterpret_cast<uintptr_t>(source) % bytes != 0) {
    throw Fault(where("cp.async from a misaligned address", line));
  }
  std::memset(to, kPoison, bytes);
  auto& groups = block().fibers[block().current]->copy_groups;
  groups.back().push_back({to, static_cast<const unsigned char*>(source), bytes, valid_bytes});
}

inline void copy_async_commit() { block().fibers[block().current]->copy_groups.emplace_back(); }

inline void copy_async_wait(int pending) {
  auto& groups = block().fibers[block().current]->copy_groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const AsyncCopy& c : groups.front()) {
      std::memset(c.target, 0, c.bytes);
      if (c.valid_bytes > 0) std::memcpy(c.target, c.source, c.valid_bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace emulation
