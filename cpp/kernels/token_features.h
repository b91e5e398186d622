// Scorer input of one token: 8 numbers of age, 17 normalised spectral bins (spec 4 and 5).
#pragma once

#include <cmath>

#include "namm_ext/params.h"

namespace namm_ext::cpu {

struct FeatureScale {
  float mean[kNumBins], inverse_std[kNumBins];
  double frequency[kNumRecency / 2];

  explicit FeatureScale(const ScoreParams& p) {
    for (int i = 0; i < kNumBins; ++i) {
      const float std = std::sqrt(p.var[i]);
      mean[i] = p.mean[i];
      inverse_std[i] = 1.0f / (std < kMinStd ? kMinStd : std);
    }
    for (int j = 0; j < kNumRecency / 2; ++j) {
      frequency[j] = std::pow(kRecencyMaxFreq, -j / (kNumRecency / 2.0));
    }
  }
};

// x[i * stride] for i < kNumFeatures.
inline void token_features(const ScoreParams& p, const FeatureScale& scale, int64_t row,
                           int32_t newest_pos, float* x, int64_t stride) {
  // int64: the difference of two int32 positions may not fit.
  const double age = static_cast<double>(int64_t{newest_pos} - p.pos[row]);
  for (int j = 0; j < kNumRecency / 2; ++j) {
    const double angle = age * scale.frequency[j];
    x[j * stride] = static_cast<float>(std::sin(angle));
    x[(j + kNumRecency / 2) * stride] = static_cast<float>(std::cos(angle));
  }
  const float* state = p.state + row * kNumBins;
  for (int i = 0; i < kNumBins; ++i) {
    float z;
    if (p.log_transform) {
      z = (std::log(state[i] + p.log_eps) - scale.mean[i]) * scale.inverse_std[i];
      z = z < -kLogClamp ? -kLogClamp : z > kLogClamp ? kLogClamp : z;
    } else {
      z = (state[i] - scale.mean[i]) * scale.inverse_std[i];
    }
    x[(kNumRecency + i) * stride] = z;
  }
}

}  // namespace namm_ext::cpu
