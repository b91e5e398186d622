// The 25 numbers a scorer sees of a token: recency and normalised spectrum (spec 4 and 5).
#pragma once

#include "platform.cuh"

namespace namm_ext::gpu {

// 50000^(-j / 4): angle per token of age.
__device__ constexpr double kRecencyFreq[4] = {1.0, 0.0668740304976422, 0.00447213595499958,
                                               0.0002990697562442441};
static_assert(kRecencyMaxFreq == 50000.0, "the table above belongs to this constant");

// What a block shares: mean and standard deviation of every bin.
struct Normalisation {
  float mean[kNumBins], std[kNumBins];
};

// All threads of the block; a barrier must follow.
NAMM_DEVICE void load_normalisation(const ScoreParams& p, Normalisation* n) {
  if (threadIdx.x < kNumBins) {
    n->mean[threadIdx.x] = p.mean[threadIdx.x];
    n->std[threadIdx.x] = fmaxf(sqrtf(p.var[threadIdx.x]), kMinStd);
  }
}

// sin and cos of age * f for the four frequencies. The product is reduced to [-pi, pi] in double:
// in float an age of 10^5 would be off by 0.004 rad.
NAMM_DEVICE void recency(int age, float (&x)[kNumFeatures]) {
  constexpr double kTwoPi = 6.283185307179586476925, kInvTwoPi = 0.159154943091895335769;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const double angle = age * kRecencyFreq[j];
    const float reduced = static_cast<float>(angle - rint(angle * kInvTwoPi) * kTwoPi);
    sincosf(reduced, &x[j], &x[j + 4]);
  }
}

NAMM_DEVICE void token_features(const ScoreParams& p, const Normalisation& n, const float* state,
                                int age, float (&x)[kNumFeatures]) {
  recency(age, x);
#pragma unroll
  for (int bin = 0; bin < kNumBins; ++bin) {
    const float value = p.log_transform ? logf(state[bin] + p.log_eps) : state[bin];
    const float z = (value - n.mean[bin]) / n.std[bin];
    // fmaxf and fminf drop a NaN, and a NaN score must be seen.
    const bool clamp = p.log_transform && z == z;
    x[kNumRecency + bin] = clamp ? fminf(fmaxf(z, -kLogClamp), kLogClamp) : z;
  }
}

}  // namespace namm_ext::gpu
