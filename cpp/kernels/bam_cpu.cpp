// Backward attention memory: one score per live token, the plain version.
//
// Mapping   one task per segment; projections for all tokens, then each token over newer ones.
// Cost      K^2 / 2 * 64 multiply-adds per segment; K * 121 floats of scratch.
// Numerics  float; the maximum is subtracted before exp.
// Limits    none.
#include <cmath>
#include <vector>

#include "kernels.h"
#include "token_features.h"

namespace namm_ext::cpu {
namespace {

void score_segment(const ScoreParams& p, const FeatureScale& scale, int64_t begin, int64_t length,
                   const float* w) {
  constexpr int kQkv = 3 * kHidden;
  std::vector<float> features(static_cast<size_t>(length * kNumFeatures));
  std::vector<float> qkv(static_cast<size_t>(length * kQkv));
  std::vector<float> probs(static_cast<size_t>(length));
  for (int64_t t = 0; t < length; ++t) {
    float* x = &features[t * kNumFeatures];
    token_features(p, scale, begin + t, p.pos[begin + length - 1], x, 1);
    for (int j = 0; j < kQkv; ++j) {
      float sum = w[kOffsetB1 + j];
      for (int i = 0; i < kNumFeatures; ++i) sum += x[i] * w[kOffsetW1 + i * kQkv + j];
      qkv[t * kQkv + j] = sum;
    }
  }
  const float softmax_scale = 1.0f / std::sqrt(static_cast<float>(kHidden));
  for (int64_t t = 0; t < length; ++t) {
    const float* q = &qkv[t * kQkv];
    float max = -INFINITY;
    for (int64_t j = t; j < length; ++j) {
      const float* k = &qkv[j * kQkv + kHidden];
      float dot = 0.0f;
      for (int d = 0; d < kHidden; ++d) dot += q[d] * k[d];
      probs[j] = dot * softmax_scale;
      if (!(probs[j] <= max)) max = probs[j];  // keeps a NaN, so that it reaches the score
    }
    float out[kHidden] = {}, sum = 0.0f;
    for (int64_t j = t; j < length; ++j) {
      const float e = std::exp(probs[j] - max);
      const float* v = &qkv[j * kQkv + 2 * kHidden];
      sum += e;
      for (int d = 0; d < kHidden; ++d) out[d] += e * v[d];
    }
    float y[2 * kNumFeatures];
    for (int j = 0; j < 2 * kNumFeatures; ++j) {
      y[j] = w[kOffsetB2 + j];
      for (int d = 0; d < kHidden; ++d) {
        y[j] += out[d] / sum * w[kOffsetW2 + d * 2 * kNumFeatures + j];
      }
    }
    const float* x = &features[t * kNumFeatures];
    float score = w[kOffsetB3];
    for (int i = 0; i < kNumFeatures; ++i) {
      score += (x[i] * (1.0f + y[kNumFeatures + i]) + y[i]) * w[kOffsetW3 + i];
    }
    p.scores[begin + t] = score;
  }
}

}  // namespace

void bam_scores(const ScoreParams& p, Parallel parallel) {
  const FeatureScale scale(p);
  const int64_t num_segments = int64_t{p.seg.batch_size} * p.seg.num_kv_heads;
  parallel.each(num_segments, [&](int64_t s) {
    const int64_t b = s / p.seg.num_kv_heads;
    const int64_t begin = p.seg.cu_seqlens_k[s], length = p.seg.seqused_k[s];
    if (p.active[b]) {
      score_segment(p, scale, begin, length, p.params + p.param_index[b] * p.num_params);
    } else {
      for (int64_t t = 0; t < length; ++t) p.scores[begin + t] = 0.0f;
    }
  });
}

}  // namespace namm_ext::cpu
