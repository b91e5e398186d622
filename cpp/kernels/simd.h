// Vectors for the kernels: one source, compiled once per instruction set.
//
// Include this only from an .inc that is compiled as its own translation unit per instruction set.
// Everything lies in a namespace named after that set and is always inlined, so that the linker can
// never hand AVX-512 code to a machine without it. No std header is included for the same reason.
//
// Numerics  exp2 has a relative error of at most 2e-7 for results above 2^-126, and returns 2^-126
//           for smaller ones; log is within 2 ulp; NaN stays NaN. fp16 and bf16 stores round to
//           nearest even.
// Limits    GCC 12 or Clang 15 (vector extensions, __builtin_shufflevector); little endian.
#pragma once

#include <cstdint>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__)
#define NAMM_ISA_NAMESPACE amx
#elif defined(__AVX512BF16__)
#define NAMM_ISA_NAMESPACE avx512bf16
#elif defined(__AVX512F__)
#define NAMM_ISA_NAMESPACE avx512
#elif defined(__AVX2__)
#define NAMM_ISA_NAMESPACE avx2
#else
#define NAMM_ISA_NAMESPACE base
#endif

#define NAMM_INLINE static inline __attribute__((always_inline))

namespace namm_ext {
namespace NAMM_ISA_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Storage formats. Arithmetic is always float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

typedef float VecF __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecU16 __attribute__((vector_size(2 * kLanes)));

// The same without alignment: what memory is accessed through.
typedef float VecFMem __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t VecIMem __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef uint16_t VecU16Mem __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

NAMM_INLINE VecF splat(float x) { return x - VecF{}; }
NAMM_INLINE VecI splat(int32_t x) { return x - VecI{}; }
NAMM_INLINE VecF select(VecI mask, VecF a, VecF b) { return mask ? a : b; }
// b if either is NaN.
NAMM_INLINE VecF max(VecF a, VecF b) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecF>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// 0, 1, 2, ...
NAMM_INLINE VecI iota() {
#if defined(__AVX512F__)
  return VecI{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(__AVX2__)
  return VecI{0, 1, 2, 3, 4, 5, 6, 7};
#else
  return VecI{0, 1, 2, 3};
#endif
}

// -------- fp16 and bf16 bits

NAMM_INLINE VecF bf16_to_float(VecU16 x) {
  return reinterpret_cast<VecF>(__builtin_convertvector(x, VecU) << 16);
}

NAMM_INLINE VecU16 float_to_bf16(VecF x) {
  const VecU u = reinterpret_cast<VecU>(x);
  const VecU rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (u >> 16) | 0x40, VecU16);
}

NAMM_INLINE VecF half_to_float(VecU16 x) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(x)));
#elif defined(__F16C__)
  return reinterpret_cast<VecF>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(x)));
#else
  const VecU u = __builtin_convertvector(x, VecU);
  // The exponent is rebased by a multiplication, which also makes subnormal numbers come out right.
  const VecF magnitude = reinterpret_cast<VecF>((u & 0x7fff) << 13) * 0x1p112f;
  const VecU special = reinterpret_cast<VecU>((u & 0x7c00) == 0x7c00) & 0x7f800000;
  return reinterpret_cast<VecF>(reinterpret_cast<VecU>(magnitude) | special | ((u & 0x8000) << 16));
#endif
}

NAMM_INLINE VecU16 float_to_half(VecF x) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecU16>(_mm512_maskz_cvtps_ph(
      0xffff, reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return reinterpret_cast<VecU16>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  const VecU u = reinterpret_cast<VecU>(x);
  const VecU sign = (u >> 16) & 0x8000;
  const VecU a = u & 0x7fffffff;
  const VecU normal = (a - (112u << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  // Adding 0.5 moves the bits of a number below 2^-14 to the right place, rounded by the adder.
  const VecU small = reinterpret_cast<VecU>(reinterpret_cast<VecF>(a) + 0.5f) - 0x3f000000;
  VecU h = reinterpret_cast<VecU>(a < 0x38800000u) ? small : normal;
  h = a >= 0x477ff000u ? 0x7c00u - VecU{} : h;
  h = a > 0x7f800000u ? 0x7e00u - VecU{} : h;
  return __builtin_convertvector(h | sign, VecU16);
#endif
}

// -------- memory

NAMM_INLINE VecF load(const float* p) { return *reinterpret_cast<const VecFMem*>(p); }
NAMM_INLINE VecI load(const int32_t* p) { return *reinterpret_cast<const VecIMem*>(p); }
NAMM_INLINE VecF load(const BFloat16* p) {
  return bf16_to_float(*reinterpret_cast<const VecU16Mem*>(p));
}
NAMM_INLINE VecF load(const Half* p) {
  return half_to_float(*reinterpret_cast<const VecU16Mem*>(p));
}

NAMM_INLINE void store(float* p, VecF x) { *reinterpret_cast<VecFMem*>(p) = x; }
NAMM_INLINE void store(int32_t* p, VecI x) { *reinterpret_cast<VecIMem*>(p) = x; }
NAMM_INLINE void store(BFloat16* p, VecF x) { *reinterpret_cast<VecU16Mem*>(p) = float_to_bf16(x); }
NAMM_INLINE void store(Half* p, VecF x) { *reinterpret_cast<VecU16Mem*>(p) = float_to_half(x); }

NAMM_INLINE bool any(VecI mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return !_mm256_testz_si256(reinterpret_cast<__m256i>(mask), reinterpret_cast<__m256i>(mask));
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

// The first n < kLanes elements; the others are zero and their memory is not touched.
template <typename T>
NAMM_INLINE VecF load_first(const T* p, int n) {
  T part[kLanes] = {};
  __builtin_memcpy(part, p, n * sizeof(T));
  return load(part);
}
template <typename T>
NAMM_INLINE void store_first(T* p, VecF x, int n) {
  T part[kLanes];
  store(part, x);
  __builtin_memcpy(p, part, n * sizeof(T));
}

// The same for any n >= 0, whole vectors included.
template <typename T>
NAMM_INLINE VecF load_upto(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_first(p, static_cast<int>(n));
}
template <typename T>
NAMM_INLINE void store_upto(T* p, VecF x, int64_t n) {
  if (n >= kLanes) {
    store(p, x);
  } else {
    store_first(p, x, static_cast<int>(n));
  }
}

NAMM_INLINE float to_float(float x) { return x; }
NAMM_INLINE float to_float(BFloat16 x) {
  const uint32_t u = uint32_t{x.bits} << 16;
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
NAMM_INLINE float to_float(Half x) { return load_first(&x, 1)[0]; }

// -------- across lanes, in a fixed order

// x = op over all lanes, in every lane.
#if defined(__AVX512F__)
#define NAMM_FOLD(x, op)                                                                         \
  do {                                                                                           \
    x = op(x,                                                                                    \
           __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)); \
    x = op(x,                                                                                    \
           __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)); \
    x = op(x,                                                                                    \
           __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)); \
    x = op(x,                                                                                    \
           __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)); \
  } while (false)
#elif defined(__AVX2__)
#define NAMM_FOLD(x, op)                                              \
  do {                                                                \
    x = op(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3)); \
    x = op(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5)); \
    x = op(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6)); \
  } while (false)
#else
#define NAMM_FOLD(x, op)                                  \
  do {                                                    \
    x = op(x, __builtin_shufflevector(x, x, 2, 3, 0, 1)); \
    x = op(x, __builtin_shufflevector(x, x, 1, 0, 3, 2)); \
  } while (false)
#endif

NAMM_INLINE VecF add(VecF a, VecF b) { return a + b; }
NAMM_INLINE float sum_lanes(VecF x) {
  NAMM_FOLD(x, add);
  return x[0];
}
NAMM_INLINE float max_lanes(VecF x) {
  NAMM_FOLD(x, max);
  return x[0];
}
#undef NAMM_FOLD

// Lane i of the result is the sum over the lanes of x[i]; x is destroyed.
NAMM_INLINE VecF sum_each(VecF (&x)[kLanes]) {
#if defined(__AVX512F__)
  for (int i = 0; i < 8; ++i) {
    const VecF a = x[2 * i], b = x[2 * i + 1];
    x[i] =
        __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
        __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 4; ++i) {
    const VecF a = x[2 * i], b = x[2 * i + 1];
    x[i] =
        __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
        __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    const VecF a = x[2 * i], b = x[2 * i + 1];
    x[i] =
        __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
        __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  return __builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22,
                                 23) +
         __builtin_shufflevector(x[0], x[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29,
                                 30, 31);
#elif defined(__AVX2__)
  for (int i = 0; i < 4; ++i) {
    const VecF a = x[2 * i], b = x[2 * i + 1];
    x[i] = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
           __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 2; ++i) {
    const VecF a = x[2 * i], b = x[2 * i + 1];
    x[i] = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 8, 9, 10, 11) +
         __builtin_shufflevector(x[0], x[1], 4, 5, 6, 7, 12, 13, 14, 15);
#else
  for (int i = 0; i < 2; ++i) {
    const VecF a = x[2 * i], b = x[2 * i + 1];
    x[i] = __builtin_shufflevector(a, b, 0, 4, 2, 6) + __builtin_shufflevector(a, b, 1, 5, 3, 7);
  }
  return __builtin_shufflevector(x[0], x[1], 0, 1, 4, 5) +
         __builtin_shufflevector(x[0], x[1], 2, 3, 6, 7);
#endif
}

// row[i][j] <-> row[j][i] for a kLanes x kLanes tile in registers.
NAMM_INLINE void transpose(VecF (&row)[kLanes]) {
#if defined(__AVX512F__)
  VecF t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = __builtin_shufflevector(row[i], row[i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26,
                                   12, 28, 14, 30);
    t[i + 1] = __builtin_shufflevector(row[i], row[i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11,
                                       27, 13, 29, 15, 31);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = i; j < i + 2; ++j) {
      row[j] = __builtin_shufflevector(t[j], t[j + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12,
                                       13, 28, 29);
      row[j + 2] = __builtin_shufflevector(t[j], t[j + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26,
                                           27, 14, 15, 30, 31);
    }
  }
  for (int i = 0; i < 16; i += 8) {
    for (int j = i; j < i + 4; ++j) {
      t[j] = __builtin_shufflevector(row[j], row[j + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11,
                                     24, 25, 26, 27);
      t[j + 4] = __builtin_shufflevector(row[j], row[j + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14,
                                         15, 28, 29, 30, 31);
    }
  }
  for (int j = 0; j < 8; ++j) {
    row[j] = __builtin_shufflevector(t[j], t[j + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21,
                                     22, 23);
    row[j + 8] = __builtin_shufflevector(t[j], t[j + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26,
                                         27, 28, 29, 30, 31);
  }
#elif defined(__AVX2__)
  VecF t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = __builtin_shufflevector(row[i], row[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    t[i + 1] = __builtin_shufflevector(row[i], row[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = i; j < i + 2; ++j) {
      row[j] = __builtin_shufflevector(t[j], t[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      row[j + 2] = __builtin_shufflevector(t[j], t[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int j = 0; j < 4; ++j) {
    t[j] = __builtin_shufflevector(row[j], row[j + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    t[j + 4] = __builtin_shufflevector(row[j], row[j + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int j = 0; j < 8; ++j) row[j] = t[j];
#else
  const VecF a = __builtin_shufflevector(row[0], row[1], 0, 4, 2, 6);
  const VecF b = __builtin_shufflevector(row[0], row[1], 1, 5, 3, 7);
  const VecF c = __builtin_shufflevector(row[2], row[3], 0, 4, 2, 6);
  const VecF d = __builtin_shufflevector(row[2], row[3], 1, 5, 3, 7);
  row[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  row[1] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  row[2] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  row[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
#endif
}

// -------- sqrt and log

NAMM_INLINE VecF sqrt(VecF x) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_maskz_sqrt_ps(0xffff, reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecF>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// log(x) for x > 0 (subnormal numbers included); -inf for 0, NaN below.
NAMM_INLINE VecF log(VecF x) {
  const VecI subnormal = x < 0x1p-126f;
  const VecF y = select(subnormal, x * 0x1p64f, x);
  const VecI bits = reinterpret_cast<VecI>(y);
  // y = 2^e m with m in [sqrt(1/2), sqrt(2)).
  const VecI shifted = bits - 0x3f3504f3;
  const VecI e = (shifted >> 23) - (subnormal & 64);
  const VecF f = reinterpret_cast<VecF>((shifted & 0x007fffff) + 0x3f3504f3) - 1.0f;
  VecF p = splat(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const VecF exponent = __builtin_convertvector(e, VecF), f2 = f * f;
  VecF result = f * f2 * p + exponent * -2.12194440e-4f - 0.5f * f2;
  result = f + result + exponent * 0.693359375f;
  result = select(x == __builtin_inff(), x, result);
  result = select(x == 0.0f, splat(-__builtin_inff()), result);
  return select(x >= 0.0f, result, splat(__builtin_nanf("")));
}

// -------- exp2

// 2^x for x <= 126. The polynomial is 2^f on [-1/2, 1/2].
NAMM_INLINE VecF exp2(VecF x) {
  x = max(splat(-126.0f), x);
  const float kRound = 0x1.8p23f;  // adding it rounds to an integer, left in the low bits
  const VecF shifted = x + kRound;
  const VecF f = x - (shifted - kRound);
  VecF p = splat(1.326472739e-3f);
  p = p * f + 9.671512917e-3f;
  p = p * f + 5.550733745e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
  return reinterpret_cast<VecF>(reinterpret_cast<VecI>(p) +
                                (reinterpret_cast<VecI>(shifted) << 23));
}

// -------- tanh

// By the rational function that Eigen and XLA use: 1 to within a rounding at the bounds. NaN stays.
NAMM_INLINE VecF tanh(VecF x) {
  const float kBound = 7.90531110763549805f;
  x = select(x > kBound, splat(kBound), max(splat(-kBound), x));
  const VecF y = x * x;
  VecF p = splat(-2.76076847742355e-16f);
  p = p * y + 2.00018790482477e-13f;
  p = p * y - 8.60467152213735e-11f;
  p = p * y + 5.12229709037114e-08f;
  p = p * y + 1.48572235717979e-05f;
  p = p * y + 6.37261928875436e-04f;
  p = p * y + 4.89352455891786e-03f;
  VecF q = splat(1.19825839466702e-06f);
  q = q * y + 1.18534705686654e-04f;
  q = q * y + 2.26843463243900e-03f;
  q = q * y + 4.89352518554385e-03f;
  return x * p / q;
}

// n numbers x become limit * tanh(x / limit), n a multiple of kLanes.
NAMM_INLINE void soft_cap(float* x, int64_t n, float limit) {
  const float inverse = 1.0f / limit;
  for (int64_t i = 0; i < n; i += kLanes) store(x + i, limit * tanh(load(x + i) * inverse));
}

}  // namespace NAMM_ISA_NAMESPACE
}  // namespace namm_ext
