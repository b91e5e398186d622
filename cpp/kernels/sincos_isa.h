// Sine and cosine of many angles, for files compiled once per instruction set.
//
// Numerics  range reduction in double by pi / 2 in three parts, exact for angles below 2^31; then
//           polynomials in float: absolute error at most 1e-7.
// Limits    |angle| < 2^31.
#pragma once

#include "simd.h"

namespace namm_ext {
namespace NAMM_ISA_NAMESPACE {

// sine[i], cosine[i] of angle[i] for i < kLanes; plain loops, which the compiler vectorises.
NAMM_INLINE void sincos(const double* angle, float* sine, float* cosine) {
  constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
  constexpr double kPart1 = 0x1.921fbp+0, kPart2 = 0x1.5110bp-22, kPart3 = 0x1.18469898cc517p-44;
  constexpr double kRound = 0x1.8p52;  // adding it rounds to an integer, found in the low bits
  for (int i = 0; i < kLanes; ++i) {
    const double shifted = angle[i] * kTwoOverPi + kRound;
    const double n = shifted - kRound;
    union {
      double value;
      uint64_t bits;
    } number = {shifted};
    const uint32_t quadrant = static_cast<uint32_t>(number.bits) & 3;
    const float r = static_cast<float>(((angle[i] - n * kPart1) - n * kPart2) - n * kPart3);
    const float r2 = r * r;
    const float s =
        r + r * r2 * (-1.6666654611e-1f + r2 * (8.3321608736e-3f - r2 * 1.9515295891e-4f));
    const float c =
        1.0f - 0.5f * r2 +
        r2 * r2 *
            (4.166664568298827e-2f + r2 * (-1.388731625493765e-3f + r2 * 2.443315711809948e-5f));
    const bool swap = quadrant & 1;
    const float a = swap ? c : s, b = swap ? s : c;
    sine[i] = quadrant & 2 ? -a : a;
    cosine[i] = (quadrant + 1) & 2 ? -b : b;
  }
}

}  // namespace NAMM_ISA_NAMESPACE
}  // namespace namm_ext
