// Multilayer perceptron: one score per live token.
//
// Mapping   one task per segment, 16 tokens at a time; the inner loop runs over the 16 tokens.
// Cost      25 * hidden multiply-adds per token (25 at depth 1), and 8 sines and cosines.
// Numerics  float, sums in the order of the parameter vector; sines and cosines in double.
// Limits    depth > 2 repeats the original: h + relu(h), whose parameters are dead (spec 6.2).
#include <vector>

#include "kernels.h"
#include "token_features.h"

namespace namm_ext::cpu {
namespace {

constexpr int kBlock = 16;

// y[j] = sum_i x[i] * w[i * outputs + j] (+ bias[j]), for kBlock tokens side by side.
void linear(const float* x, int inputs, const float* w, const float* bias, float* y, int outputs) {
  for (int j = 0; j < outputs; ++j) {
    float sum[kBlock];
    for (int t = 0; t < kBlock; ++t) sum[t] = bias ? bias[j] : 0.0f;
    for (int i = 0; i < inputs; ++i) {
      const float weight = w[i * outputs + j];
      for (int t = 0; t < kBlock; ++t) sum[t] += x[i * kBlock + t] * weight;
    }
    for (int t = 0; t < kBlock; ++t) y[j * kBlock + t] = sum[t];
  }
}

void score_block(const ScoreParams& p, const float* w, const float* x, float* h, float* score) {
  if (p.depth == 1) {
    linear(x, kNumFeatures, w, p.bias ? w + kNumFeatures : nullptr, score, 1);
    return;
  }
  const float* bias = w + kNumFeatures * p.hidden;
  linear(x, kNumFeatures, w, p.bias ? bias : nullptr, h, p.hidden);
  w = bias + (p.bias ? p.hidden : 0);
  for (int i = 0; i < p.hidden * kBlock; ++i) {
    // Not a maximum: NaN must stay NaN.
    h[i] = (h[i] < 0.0f ? 0.0f : h[i]) + (p.residual_first ? x[i] : 0.0f);
  }
  for (int layer = 2; layer < p.depth; ++layer) {
    w += p.hidden * (p.hidden + (p.bias ? 1 : 0));
    for (int i = 0; i < p.hidden * kBlock; ++i) h[i] += h[i] < 0.0f ? 0.0f : h[i];
  }
  linear(h, p.hidden, w, p.bias ? w + p.hidden : nullptr, score, 1);
}

}  // namespace

void mlp_scores(const ScoreParams& p, Parallel parallel) {
  const FeatureScale scale(p);
  const int64_t num_segments = int64_t{p.seg.batch_size} * p.seg.num_kv_heads;
  parallel.each(num_segments, [&](int64_t s) {
    const int64_t b = s / p.seg.num_kv_heads;
    const int64_t begin = p.seg.cu_seqlens_k[s], length = p.seg.seqused_k[s];
    float x[kNumFeatures * kBlock] = {}, score[kBlock];
    std::vector<float> h(static_cast<size_t>(p.hidden) * kBlock);
    for (int64_t first = 0; first < length; first += kBlock) {
      const int64_t rows = length - first < kBlock ? length - first : kBlock;
      if (!p.active[b]) {
        for (int64_t t = 0; t < rows; ++t) p.scores[begin + first + t] = 0.0f;
        continue;
      }
      for (int64_t t = 0; t < rows; ++t) {
        token_features(p, scale, begin + first + t, p.pos[begin + length - 1], x + t, kBlock);
      }
      score_block(p, p.params + p.param_index[b] * p.num_params, x, h.data(), score);
      for (int64_t t = 0; t < rows; ++t) p.scores[begin + first + t] = score[t];
    }
  });
}

}  // namespace namm_ext::cpu
