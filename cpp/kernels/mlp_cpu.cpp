// Multilayer perceptron: tasks for mlp_isa.inc.
//
// Mapping   one task per segment.
// Cost      see mlp_isa.inc.
// Numerics  see mlp_isa.inc.
// Limits    none.
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "mlp_isa.h"

namespace namm_ext::cpu {
namespace {

FeatureScale feature_scale(const ScoreParams& p) {
  FeatureScale scale;
  for (int i = 0; i < kNumBins; ++i) {
    const float std = std::sqrt(p.var[i]);
    scale.mean[i] = p.mean[i];
    scale.inverse_std[i] = 1.0f / (std < kMinStd ? kMinStd : std);
  }
  for (int j = 0; j < kNumRecency / 2; ++j) {
    scale.frequency[j] = std::pow(kRecencyMaxFreq, -j / (kNumRecency / 2.0));
  }
  return scale;
}

// By Isa.
constexpr const MlpScore* kVersions[] = {
    &base::kMlpScore,
#if defined(__x86_64__)
    &avx2::kMlpScore,
    &avx512::kMlpScore,
#endif
};

}  // namespace

void mlp_scores(const ScoreParams& p, Parallel parallel) {
  const FeatureScale scale = feature_scale(p);
  const MlpScore score = *version_in_force(kVersions);
  const int64_t num_segments = int64_t{p.seg.batch_size} * p.seg.num_kv_heads;
  parallel.each(num_segments, [&](int64_t s) {
    const int64_t b = s / p.seg.num_kv_heads;
    const int64_t begin = p.seg.cu_seqlens_k[s], length = p.seg.seqused_k[s];
    if (!p.active[b]) {
      for (int64_t t = 0; t < length; ++t) p.scores[begin + t] = 0.0f;
    } else if (length > 0) {
      std::vector<float> scratch(static_cast<size_t>(p.hidden) * kMlpMaxLanes);
      score(p, scale, begin, length, p.params + p.param_index[b] * p.num_params, scratch.data());
    }
  });
}

}  // namespace namm_ext::cpu
