// Storage formats one value at a time: what the simple kernels use. Arithmetic is always float.
#pragma once

#include <cstdint>
#include <cstring>

#include "namm_ext/params.h"

namespace namm_ext::cpu {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t float_to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float load(float x) { return x; }
inline float load(BFloat16 x) { return bits_to_float(uint32_t{x.bits} << 16); }
inline float load(Half x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent is rebiased by a product, which also makes subnormals right.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline void store(float* p, float x) { *p = x; }

// Both round to nearest, ties to even.
inline void store(BFloat16* p, float x) {
  const uint32_t bits = float_to_bits(x);
  p->bits =
      x != x ? uint16_t{0x7fc0} : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline void store(Half* p, float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000u;
  const float magnitude = bits_to_float(bits & 0x7fffffffu);
  uint32_t half;
  if (x != x) {
    half = 0x7e00u;
  } else if (magnitude >= 65520.0f) {
    half = 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    half = float_to_bits(magnitude + 0.5f) - float_to_bits(0.5f);  // rounds at 2^-24
  } else {
    const uint32_t m = bits & 0x7fffffffu;
    half = (m - (112u << 23) + 0xfffu + (m >> 13 & 1)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}

// Calls f with a null pointer of the storage type.
template <class F>
void with_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Half*>(nullptr));
  }
}

}  // namespace namm_ext::cpu
