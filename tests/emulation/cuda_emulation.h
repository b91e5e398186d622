// Runs CUDA kernels on the CPU, one block at a time, every CUDA thread a fiber.
//
// What it sees: indexing, tails, barriers (a barrier from two different lines, or after some
// threads returned, is an error), shuffles, ballots, atomics, and through the wrappers of
// platform.cuh also mma.sync, ldmatrix and cp.async with PTX's fragment layouts. Shared memory is
// filled with 0xFF (NaN in every float format) before each block; the target of a cp.async is
// poisoned until the wait that completes it; shared memory ends at a protected page, and a
// segmentation fault inside a kernel becomes an error instead of the end of the process. Threads
// and blocks run forwards, backwards or in seeded random order.
//
// What it cannot see: a __syncwarp or __syncthreads missing next to a shuffle or mma (here every
// warp collective is a full rendezvous, on the GPU it orders no memory), bank conflicts, races
// between blocks, approximate instructions, speed. Blocks run one after another, so a kernel that
// waits for another block never ends here: it is reported as a dead-lock.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

#define NAMM_EMULATED_VECTOR2(name, type) \
  struct alignas(2 * sizeof(type)) name { \
    type x, y;                            \
  };                                      \
  inline name make_##name(type x, type y) { return {x, y}; }
#define NAMM_EMULATED_VECTOR4(name, type) \
  struct alignas(16) name {               \
    type x, y, z, w;                      \
  };                                      \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
NAMM_EMULATED_VECTOR2(float2, float)
NAMM_EMULATED_VECTOR2(int2, int)
NAMM_EMULATED_VECTOR2(uint2, unsigned)
NAMM_EMULATED_VECTOR2(double2, double)
NAMM_EMULATED_VECTOR4(float4, float)
NAMM_EMULATED_VECTOR4(int4, int)
NAMM_EMULATED_VECTOR4(uint4, unsigned)

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

// ---- number formats

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7FFF;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline float fp16_to_float(uint16_t bits) {
  static const std::vector<float> table = [] {
    std::vector<float> t(65536);
    for (unsigned i = 0; i < 65536; ++i) {
      const int exponent = (i >> 10) & 31, mantissa = i & 1023;
      double v =
          exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
      if (exponent == 31) v = mantissa ? NAN : INFINITY;
      t[i] = static_cast<float>(i & 0x8000 ? -v : v);
    }
    return t;
  }();
  return table[bits];
}

inline uint16_t float_to_fp16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const float magnitude = std::fabs(value);
  if (value != value) return 0x7FFF;
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  if (magnitude == 0.0f) return sign;  // frexp calls its exponent 0
  int exponent = 0;
  std::frexp(magnitude, &exponent);                // magnitude = f * 2^exponent, f in [0.5, 1)
  const int shift = std::max(exponent - 11, -24);  // weight of the last kept bit
  const float scaled = std::nearbyint(std::ldexp(magnitude, -shift));
  const int mantissa = static_cast<int>(scaled);  // up to 2048, carries fall out right
  if (shift == -24) return sign | static_cast<uint16_t>(mantissa);
  return sign | static_cast<uint16_t>(((shift + 24) << 10) + mantissa);
}

// ---- tensor-core instructions

template <class ToFloat>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* kind,
                  int line, ToFloat to_float) {
  struct Args {
    float* d;
    uint32_t a[4], b[2];
  } args{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  collective(kind, line, &args, [&](Args** all) {
    float am[16][16], bm[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, c = lane % 4;
      for (int r = 0; r < 4; ++r) {  // a0 (g, 2c) a1 (g+8, 2c) a2 (g, 2c+8) a3 (g+8, 2c+8)
        const int row = g + 8 * (r & 1), col = 2 * c + 8 * (r >> 1);
        am[row][col] = to_float(static_cast<uint16_t>(all[lane]->a[r]));
        am[row][col + 1] = to_float(static_cast<uint16_t>(all[lane]->a[r] >> 16));
      }
      for (int r = 0; r < 2; ++r) {  // b0 (k = 2c, n = g) b1 (k = 2c+8, n = g)
        bm[2 * c + 8 * r][g] = to_float(static_cast<uint16_t>(all[lane]->b[r]));
        bm[2 * c + 8 * r + 1][g] = to_float(static_cast<uint16_t>(all[lane]->b[r] >> 16));
      }
    }
    float dm[16][8] = {};
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 8; ++n) dm[m][n] += am[m][k] * bm[k][n];
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, c = lane % 4;
      all[lane]->d[0] += dm[g][2 * c];
      all[lane]->d[1] += dm[g][2 * c + 1];
      all[lane]->d[2] += dm[g + 8][2 * c];
      all[lane]->d[3] += dm[g + 8][2 * c + 1];
    }
  });
}

// Lane i gives the address of row i % 8 of matrix i / 8.
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address, bool transposed, int line) {
  struct Args {
    uint32_t* r;
    const unsigned char* row;
  } args{r, shared_pointer(address, 16, line)};
  collective(transposed ? "ldmatrix.trans" : "ldmatrix", line, &args, [&](Args** all) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t value[8][8];
      for (int row = 0; row < 8; ++row) std::memcpy(value[row], all[8 * matrix + row]->row, 16);
      for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, c = lane % 4;
        const uint32_t low = transposed ? value[2 * c][g] : value[g][2 * c];
        const uint32_t high = transposed ? value[2 * c + 1][g] : value[g][2 * c + 1];
        all[lane]->r[matrix] = low | high << 16;
      }
    }
  });
}

// ---- running a grid

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

// ---- the names CUDA gives to these things

#define NAMM_LINE int line = __builtin_LINE()

#define __syncthreads() emulation::sync_block(__LINE__)

inline void __syncwarp(unsigned mask = 0xffffffffu, NAMM_LINE) { emulation::sync_warp(mask, line); }
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int = 32, NAMM_LINE) {
  struct Pair {
    T value;
    int lane;
  };
  // Every lane names its own source.
  emulation::require_full_mask(mask, line);
  struct Args {
    T in, out;
    int from;
  } args{value, value, lane & 31};
  emulation::collective("__shfl_sync", line, &args, [](Args** all) {
    for (int i = 0; i < 32; ++i) all[i]->out = all[all[i]->from]->in;
  });
  return args.out;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int = 32, NAMM_LINE) {
  return emulation::shuffle("__shfl_xor_sync", mask, value, line, [=](int i) { return i ^ bits; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int = 32, NAMM_LINE) {
  return emulation::shuffle("__shfl_up_sync", mask, value, line,
                            [=](int i) { return i - static_cast<int>(delta); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int = 32, NAMM_LINE) {
  return emulation::shuffle("__shfl_down_sync", mask, value, line,
                            [=](int i) { return i + static_cast<int>(delta); });
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, NAMM_LINE) {
  return emulation::ballot(mask, predicate, line);
}
inline bool __any_sync(unsigned mask, bool predicate, NAMM_LINE) {
  return emulation::ballot(mask, predicate, line) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, NAMM_LINE) {
  return emulation::ballot(mask, predicate, line) == 0xffffffffu;
}

template <class T, class U>
T atomicAdd(T* p, U value) {
  const T old = *p;
  *p = static_cast<T>(old + value);
  return old;
}
template <class T, class U>
T atomicMax(T* p, U value) {
  const T old = *p;
  if (static_cast<T>(value) > old) *p = static_cast<T>(value);
  return old;
}
template <class T, class U>
T atomicMin(T* p, U value) {
  const T old = *p;
  if (static_cast<T>(value) < old) *p = static_cast<T>(value);
  return old;
}
template <class T, class U>
T atomicOr(T* p, U value) {
  const T old = *p;
  *p = static_cast<T>(old | value);
  return old;
}
template <class T, class U>
T atomicExch(T* p, U value) {
  const T old = *p;
  *p = static_cast<T>(value);
  return old;
}
template <class T, class U, class V>
T atomicCAS(T* p, U compare, V value) {
  const T old = *p;
  if (old == static_cast<T>(compare)) *p = static_cast<T>(value);
  return old;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}

template <class To, class From>
To emulated_bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline int __float_as_int(float x) { return emulated_bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return emulated_bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return emulated_bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bit_cast<float>(x); }

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::max;
using std::min;
inline int64_t min(int a, int64_t b) { return std::min<int64_t>(a, b); }
inline int64_t min(int64_t a, int b) { return std::min<int64_t>(a, b); }
inline int64_t max(int a, int64_t b) { return std::max<int64_t>(a, b); }
inline int64_t max(int64_t a, int b) { return std::max<int64_t>(a, b); }
