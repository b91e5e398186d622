// Between the tasks of mlp_scores (mlp_cpu.cpp) and its arithmetic (mlp_isa.inc).
#pragma once

#include <cstdint>

#include "namm_ext/params.h"

namespace namm_ext {

constexpr int kMlpMaxLanes = 16;

struct FeatureScale {
  float mean[kNumBins], inverse_std[kNumBins];
  double frequency[kNumRecency / 2];
};

// Scores of the rows [begin, begin + length) with the parameter vector w; scratch holds
// hidden * kMlpMaxLanes floats.
using MlpScore = void (*)(const ScoreParams& params, const FeatureScale& scale, int64_t begin,
                          int64_t length, const float* w, float* scratch);

namespace base {
extern const MlpScore kMlpScore;
}
namespace avx2 {
extern const MlpScore kMlpScore;
}
namespace avx512 {
extern const MlpScore kMlpScore;
}

}  // namespace namm_ext
