// What a kernel may use: CUDA's own names, and the wrappers below for everything that needs PTX.
//
// The same kernel source compiles with nvcc for the GPU and, without one, with g++ against
// tests/emulation/cuda_emulation.h, which runs it on the CPU with PTX's fragment layouts. So:
// no inline PTX, no <<<>>>, no bare `extern __shared__` and no CUDA header outside this file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <utility>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define NAMM_EMULATED 0
#else
#include "cuda_emulation.h"
#define NAMM_EMULATED 1
#endif

#include "kernels.h"
#include "namm_ext/params.h"

// Dynamic shared memory of the block, as bytes aligned to 16.
// Static shared memory: NAMM_SHARED(float, sums, 32) declares float* or float[32].
#if NAMM_EMULATED
#define NAMM_DYNAMIC_SHARED(name) unsigned char* name = emulation::block().dynamic
#define NAMM_SHARED(type, name, count) \
  static const char name##_key = 0;    \
  type* const name =                   \
      static_cast<type*>(emulation::static_shared(&name##_key, sizeof(type) * (count)))
#else
#define NAMM_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define NAMM_SHARED(type, name, count) __shared__ type name[count]
#endif

#define NAMM_DEVICE __device__ __forceinline__

namespace namm_ext::gpu {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Cache elements as bits; arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// An address in shared memory as PTX wants it: 32 bits.
using SharedAddress = uint32_t;

// ---- launching

// Host code: runs kernel(args...) on the stream. An empty grid is a success and launches nothing.
// Shared memory above 48 KB needs the attribute set once per function and device; setting it again
// is cheap.
template <class... Params, class... Args>
Status launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
              Args&&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
#if NAMM_EMULATED
  (void)stream;
  try {
    std::tuple<Params...> copies(std::forward<Args>(args)...);
    emulation::run_grid([&] { std::apply(kernel, copies); }, grid, block, shared_bytes);
  } catch (const std::exception& e) {
    emulation::last_error = e.what();
    return 1;
  }
  return 0;
#else
  if (shared_bytes > 48 * 1024) {
    const cudaError_t status = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                    static_cast<int>(shared_bytes));
    if (status != cudaSuccess) return static_cast<Status>(status);
  }
  std::tuple<Params...> copies(std::forward<Args>(args)...);
  void* pointers[sizeof...(Params) + 1];
  std::apply(
      [&](auto&... copy) {
        size_t i = 0;
        ((pointers[i++] = &copy), ...);
      },
      copies);
  return static_cast<Status>(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block,
                                              pointers, shared_bytes, stream));
#endif
}

// Host code: fills bytes of device memory on the stream.
inline Status fill_bytes(void* target, int value, size_t bytes, Stream stream) {
#if NAMM_EMULATED
  (void)stream;
  std::memset(target, value, bytes);
  return 0;
#else
  return static_cast<Status>(cudaMemsetAsync(target, value, bytes, stream));
#endif
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- number formats

NAMM_DEVICE float to_float(float x) { return x; }

#if NAMM_EMULATED

inline float to_float(bf16 x) { return emulation::bf16_to_float(x.bits); }
inline float to_float(fp16 x) { return emulation::fp16_to_float(x.bits); }
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  return {emulation::float_to_bf16(x)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  return {emulation::float_to_fp16(x)};
}
// Two numbers in one register, the first in the low half.
template <class T>
uint32_t pack2(float low, float high) {
  return uint32_t{from_float<T>(low).bits} | uint32_t{from_float<T>(high).bits} << 16;
}

inline float ex2(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}
inline float fast_sqrt(float x) { return std::sqrt(x); }
inline float fast_rcp(float x) { return 1.0f / x; }
inline float fast_log2(float x) { return std::log2(x); }

inline SharedAddress shared_address(const void* p) { return emulation::shared_address(p); }

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, NAMM_LINE);
template <>
inline void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                               int line) {
  emulation::mma_m16n8k16(d, a, b0, b1, "mma.bf16", line, emulation::bf16_to_float);
}
template <>
inline void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                               int line) {
  emulation::mma_m16n8k16(d, a, b0, b1, "mma.f16", line, emulation::fp16_to_float);
}
inline void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row, NAMM_LINE) {
  emulation::ldmatrix_x4(r, row, false, line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row, NAMM_LINE) {
  emulation::ldmatrix_x4(r, row, true, line);
}
template <int kBytes>
void cp_async(SharedAddress target, const void* source, bool valid = true, NAMM_LINE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "sizes of cp.async");
  emulation::copy_async(target, source, kBytes, valid ? kBytes : 0, line);
}
inline void cp_async_commit() { emulation::copy_async_commit(); }
template <int kPending>
void cp_async_wait() {
  emulation::copy_async_wait(kPending);
}

#else  // the GPU

NAMM_DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
NAMM_DEVICE float to_float(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <class T>
NAMM_DEVICE T from_float(float x);
template <>
NAMM_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
NAMM_DEVICE bf16 from_float<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
NAMM_DEVICE fp16 from_float<fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
// Two numbers in one register, the first in the low half.
template <class T>
NAMM_DEVICE uint32_t pack2(float low, float high);
template <>
NAMM_DEVICE uint32_t pack2<bf16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
template <>
NAMM_DEVICE uint32_t pack2<fp16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

// 2^x; ex2.approx is within 2 ulp, ex2(-inf) = 0.
NAMM_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
NAMM_DEVICE float fast_sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
NAMM_DEVICE float fast_rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
NAMM_DEVICE float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

NAMM_DEVICE SharedAddress shared_address(const void* p) {
  return static_cast<SharedAddress>(__cvta_generic_to_shared(p));
}

// D += A B, A 16 x 16 row-major, B 16 x 8, in the fragment layouts of the PTX manual: with
// g = lane / 4 and c = lane % 4, a0 (g, 2c), a1 (g + 8, 2c), a2 (g, 2c + 8), a3 (g + 8, 2c + 8),
// b0 (k = 2c, n = g), b1 (k = 2c + 8, n = g), d0 d1 (g, 2c), d2 d3 (g + 8, 2c); every register
// holds two neighbours along the second index (along k for b).
template <class T>
NAMM_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
NAMM_DEVICE void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
NAMM_DEVICE void mma_m16n8k16<fp16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8
// and receives in r[m] elements (lane / 4, 2 * (lane % 4)) and the next of matrix m.
NAMM_DEVICE void ldmatrix_x4(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
NAMM_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// Asynchronous copy of kBytes to shared memory; zeros arrive if not valid, and then the source is
// not read. Visible to the issuing thread after cp_async_wait, to the others after a barrier.
template <int kBytes>
NAMM_DEVICE void cp_async(SharedAddress target, const void* source, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "sizes of cp.async");
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
                 "r"(bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(target), "l"(source),
                 "n"(kBytes), "r"(bytes)
                 : "memory");
  }
}
NAMM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's committed groups are still under way.
template <int kPending>
NAMM_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#endif

// ---- where a block works

// A block's share of a segment: rows [row, min(row + tile_rows, live)).
struct SegmentTile {
  int32_t segment;
  int32_t row;    // first row of the tile inside the segment; may lie at or behind `live`
  int32_t live;   // live rows of the segment
  int64_t start;  // store row of the segment's row 0
};

// The flat work list. Tile number t of the grid belongs to the last segment s with
// cu_seqlens_k[s] / tile_rows + s * extra <= t. With one extra tile that leaves every segment at
// least as many as its slot needs, and the whole grid needs no list and no host copy of the
// lengths.
NAMM_DEVICE SegmentTile find_tile(const Segments& seg, uint32_t tile_rows, int tile,
                                  int extra = 1) {
  // Unsigned, so that a division by a power of two is a shift.
  const auto first_tile = [&](int s) {
    return static_cast<int>(static_cast<uint32_t>(seg.cu_seqlens_k[s]) / tile_rows) + s * extra;
  };
  int low = 0, high = seg.batch_size * seg.num_kv_heads;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (first_tile(middle) <= tile) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return {low, (tile - first_tile(low)) * static_cast<int>(tile_rows), seg.seqused_k[low],
          seg.cu_seqlens_k[low]};
}

// Tiles of a grid over a store of `capacity` rows, for find_tile.
inline unsigned num_tiles(const Segments& seg, int64_t capacity, int tile_rows, int extra = 1) {
  return static_cast<unsigned>(capacity / tile_rows +
                               int64_t{seg.batch_size} * seg.num_kv_heads * extra);
}

// ---- bounded logits

// Products x of queries and keys become limit * tanh(x / limit), to within 3e-7 of the limit.
struct SoftCap {
  float limit;  // of the products, or 0 for none
  float rate;   // 2 log2(e) / limit

  NAMM_DEVICE SoftCap(float softcap, float softmax_scale)
      : limit(softmax_scale == 0.0f ? 0.0f : softcap / fabsf(softmax_scale)),
        rate(2.0f * kLog2E / limit) {}
  NAMM_DEVICE bool any() const { return limit > 0.0f; }
  // tanh(y) = 1 - 2 / (1 + exp(2 y)), also where the exponential is infinite.
  NAMM_DEVICE float operator()(float x) const {
    return limit - 2.0f * limit * fast_rcp(1.0f + ex2(x * rate));
  }
};

}  // namespace namm_ext::gpu
