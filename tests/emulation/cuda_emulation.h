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

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulation_block.h"
#include "emulation_grid.h"
#include "emulation_tensor_cores.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

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
