// Part of cuda_emulation.h: number formats, mma.sync and ldmatrix.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "emulation_block.h"

namespace emulation {

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

}  // namespace emulation
