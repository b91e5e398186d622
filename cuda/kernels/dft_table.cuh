// The Hann-windowed DFT of spec section 2 as constants, computed by the compiler.
//
// Column 2 * bin + part of row m is hann(m) * (cos, -sin)(2 pi bin m / 32). Bins 0 and 16 are real:
// bin 16 sits in the imaginary column of bin 0, which makes 32 columns of the 17 bins.
#pragma once

#include "platform.cuh"

namespace namm_ext::gpu {

constexpr int kDftColumns = kNFft;

constexpr double cos_table(int j) {  // cos(2 pi j / 32)
  constexpr double kQuarter[9] = {1.0,
                                  0.98078528040323044913,
                                  0.92387953251128675613,
                                  0.83146961230254523708,
                                  0.70710678118654752440,
                                  0.55557023301960222474,
                                  0.38268343236508977173,
                                  0.19509032201612826785,
                                  0.0};
  j &= 31;
  if (j > 16) j = 32 - j;
  return j <= 8 ? kQuarter[j] : -kQuarter[16 - j];
}

constexpr double windowed_dft(int m, int column) {
  const double hann = 0.5 * (1.0 - cos_table(m));
  if (column == 1) return hann * cos_table(16 * m);
  const int bin = column / 2;
  return column % 2 == 0 ? hann * cos_table(bin * m) : -hann * cos_table(bin * m - 8);
}

// Distance of the neighbours of x among the halves, for |x| <= 1.
constexpr double half_spacing(double x) {
  double magnitude = x < 0 ? -x : x, spacing = 1.0 / 1024;
  while (magnitude < 1.0 && spacing > 1.0 / (1 << 24)) {
    magnitude *= 2;
    spacing /= 2;
  }
  return spacing;
}

constexpr double round_to_half(double x) {
  const double spacing = half_spacing(x), units = (x < 0 ? -x : x) / spacing;
  const double rounded = static_cast<double>(static_cast<int>(units + 0.5)) * spacing;
  return x < 0 ? -rounded : rounded;
}

constexpr uint16_t half_bits(double x) {  // x is a half with |x| <= 1
  const uint16_t sign = x < 0 ? 0x8000 : 0;
  double magnitude = x < 0 ? -x : x;
  if (magnitude == 0) return 0;
  int exponent = 15;
  while (magnitude < 1.0 && exponent > 1) {
    magnitude *= 2;
    --exponent;
  }
  const int mantissa = static_cast<int>(magnitude * 1024);
  if (mantissa < 1024) return static_cast<uint16_t>(sign | mantissa);
  return static_cast<uint16_t>(sign | ((exponent << 10) + mantissa - 1024));
}

// B fragments of mma.m16n8k16: word[half][tile][register][lane], half 0 for window rows 0..15,
// half 1 for 16..31. Columns are rounded to half so that their sums stay as exact as halves allow:
// attention is mostly constant in time, and what a column's sum is off leaks into its bin.
struct DftFragments {
  uint32_t word[2][4][2][32];
};

constexpr DftFragments make_dft_fragments() {
  double table[kNFft][kDftColumns] = {};
  for (int column = 0; column < kDftColumns; ++column) {
    double excess = 0;
    for (int m = 0; m < kNFft; ++m) {
      table[m][column] = round_to_half(windowed_dft(m, column));
      excess += table[m][column] - windowed_dft(m, column);
    }
    for (int turn = 0; turn < kNFft; ++turn) {
      // Move the entry to its other neighbour that brings the sum closest to exact.
      int best = -1;
      double best_left = excess < 0 ? -excess : excess, best_excess = excess;
      for (int m = 0; m < kNFft; ++m) {
        const double error = table[m][column] - windowed_dft(m, column);
        if (error * excess <= 0) continue;
        const double step = half_spacing(windowed_dft(m, column));
        const double after = excess - (excess > 0 ? step : -step);
        const double left = after < 0 ? -after : after;
        if (left < best_left) {
          best = m;
          best_left = left;
          best_excess = after;
        }
      }
      if (best < 0) break;
      table[best][column] += best_excess - excess;
      excess = best_excess;
    }
  }
  DftFragments out = {};
  for (int half = 0; half < 2; ++half) {
    for (int tile = 0; tile < 4; ++tile) {
      for (int r = 0; r < 2; ++r) {
        for (int lane = 0; lane < 32; ++lane) {
          const int m = 16 * half + 2 * (lane % 4) + 8 * r, column = 8 * tile + lane / 4;
          out.word[half][tile][r][lane] = uint32_t{half_bits(table[m][column])} |
                                          uint32_t{half_bits(table[m + 1][column])} << 16;
        }
      }
    }
  }
  return out;
}

struct DftFloats {
  float value[kNFft][kDftColumns];
};

constexpr DftFloats make_dft_floats() {
  DftFloats out = {};
  for (int m = 0; m < kNFft; ++m) {
    for (int column = 0; column < kDftColumns; ++column) {
      out.value[m][column] = static_cast<float>(windowed_dft(m, column));
    }
  }
  return out;
}

}  // namespace namm_ext::gpu
