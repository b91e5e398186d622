// The parameter vector of bam_scores, folded: products of its matrices, so that a token costs two
// 25 x 25 matrices and a dot product (bam.cuh, algebra).
//
// Mapping    one warp per row of a matrix or vector of biases; the four warps of a block share a
//            copy of the 4,172 numbers.
// Cost       45,000 multiply-adds per batch row, at most 90 of them one after the other.
// Numerics   float; sums over h begin at another h in every lane, always the same.
#pragma once

#include "platform.cuh"

namespace namm_ext::gpu {

constexpr int kFoldThreads = 128;
constexpr int kFoldWarps = kFoldThreads / kWarpSize;
constexpr int kFoldItems = 2 * kNumFeatures + 2;
static_assert(kFoldItems % kFoldWarps == 0, "every warp has an item");

// A folded parameter vector. Rows are padded to 28 floats so that they load as float4.
struct Folded {
  static constexpr int kRow = 28;
  float z_weight[kNumFeatures][kRow];  // z = x z_weight + z_bias
  float g_weight[kNumFeatures][kRow];
  float z_bias[kRow], g_bias[kRow];
  float c_weight[kRow];  // c = x c_weight + c_bias
  float c_bias, padding[3];
};
static_assert(sizeof(Folded) % 16 == 0 && kNumFeatures <= Folded::kRow, "float4 loads");

// An item is row e of z_weight or of g_weight, both biases, or c; lane = column d.
__global__ void __launch_bounds__(kFoldThreads)
    bam_fold_kernel(const __grid_constant__ ScoreParams p, Folded* folded) {
  NAMM_SHARED(float, w, kNumBamParams);
  const int b = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const float* source = p.params + p.param_index[b] * p.num_params;
  for (int i = thread; i < kNumBamParams; i += kFoldThreads) w[i] = source[i];
  __syncthreads();
  const float *w1 = w + kOffsetW1, *b1 = w + kOffsetB1, *w2 = w + kOffsetW2, *b2 = w + kOffsetB2,
              *w3 = w + kOffsetW3;
  constexpr int kW1 = 3 * kHidden, kW2 = 2 * kNumFeatures;
  static_assert(kHidden == kWarpSize, "a lane per hidden number");
  const float scale = kLog2E / sqrtf(static_cast<float>(kHidden));
  const int item = static_cast<int>(blockIdx.x) * kFoldWarps + thread / kWarpSize;
  const int lane = thread % kWarpSize, d = min(lane, kNumFeatures - 1);
  const bool real = lane < kNumFeatures;
  Folded& out = folded[b];

  // Sums over h begin at another h in every lane: rows of W1 all begin in the same bank.
  if (item < 2 * kNumFeatures) {
    const bool is_z = item < kNumFeatures;
    const int e = item % kNumFeatures;
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < kHidden; ++i) {
      const int h = (i + lane) % kHidden;
      sum += is_z ? w1[e * kW1 + h] * w1[d * kW1 + kHidden + h]
                  : w2[h * kW2 + kNumFeatures + e] * w1[d * kW1 + 2 * kHidden + h];
    }
    sum *= is_z ? scale : w3[e];
    if (lane < Folded::kRow) {
      (is_z ? out.z_weight : out.g_weight)[e][lane] = real ? sum : 0.0f;
    }
    return;
  }
  float residual = 0.0f;  // w3 . W2[h, :25] for h = lane, what a unit of o_h adds to the score
  for (int e = 0; e < kNumFeatures; ++e) residual += w3[e] * w2[lane * kW2 + e];
  if (item == 2 * kNumFeatures) {
    float zb = 0.0f, gb = 0.0f;
#pragma unroll 4
    for (int i = 0; i < kHidden; ++i) {
      const int h = (i + lane) % kHidden;
      zb += b1[h] * w1[d * kW1 + kHidden + h];
      gb += w1[d * kW1 + 2 * kHidden + h] * __shfl_sync(kFullMask, residual, h);
    }
    if (lane < Folded::kRow) {
      out.z_bias[lane] = real ? zb * scale : 0.0f;
      out.g_bias[lane] = real ? gb : 0.0f;
    }
  } else {
    float cw = 1.0f + b2[kNumFeatures + d];
    float cb = b1[2 * kHidden + lane] * residual + (real ? w3[d] * b2[d] : 0.0f);
    for (int h = 0; h < kHidden; ++h) cw += b1[2 * kHidden + h] * w2[h * kW2 + kNumFeatures + d];
    for (int bits = 16; bits > 0; bits /= 2) cb += __shfl_xor_sync(kFullMask, cb, bits);
    if (lane < Folded::kRow) out.c_weight[lane] = real ? w3[d] * cw : 0.0f;
    if (lane == 0) out.c_bias = cb + w[kOffsetB3];
  }
}

}  // namespace namm_ext::gpu
