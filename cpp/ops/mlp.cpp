#include "scores.h"

namespace namm_ext {

Prepared<ScoreParams, Tensor> prepare_mlp_scores(const Tensor& state, const Tensor& pos,
                                                 const Tensor& cu_seqlens_k,
                                                 const Tensor& seqused_k, const Tensor& params,
                                                 const Tensor& param_index, const Tensor& mean,
                                                 const Tensor& var, const Tensor& active,
                                                 bool log_transform, double log_eps, int64_t hidden,
                                                 int64_t depth, bool bias, bool residual_first) {
  constexpr int64_t kMax = 1 << 16;  // keeps the number of parameters inside 64 bits
  STD_TORCH_CHECK(hidden >= 1 && hidden <= kMax, "mlp_scores: hidden must be in [1, ", kMax,
                  "], got ", hidden);
  STD_TORCH_CHECK(depth >= 1 && depth <= kMax, "mlp_scores: depth must be in [1, ", kMax, "], got ",
                  depth);
  STD_TORCH_CHECK(!residual_first || depth == 1 || hidden == kNumFeatures,
                  "mlp_scores: hidden must be ", kNumFeatures, " with residual_first, got ",
                  hidden);
  const int64_t b = bias ? 1 : 0;
  const int64_t num_params =
      depth == 1 ? kNumFeatures + b
                 : hidden * (kNumFeatures + b) + (depth - 2) * hidden * (hidden + b) + hidden + b;
  Prepared<ScoreParams, Tensor> prepared =
      prepare_scores("mlp_scores", state, pos, cu_seqlens_k, seqused_k, params, param_index, mean,
                     var, active, log_transform, log_eps, num_params);
  ScoreParams& p = prepared.params;
  p.hidden = static_cast<int32_t>(hidden);
  p.depth = static_cast<int32_t>(depth);
  p.bias = bias;
  p.residual_first = residual_first;
  return prepared;
}

}  // namespace namm_ext
