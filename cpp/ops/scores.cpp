#include "check.h"
#include "checks.h"

namespace namm_ext {
namespace {

ScoreParams check_scores(const Check& check, const Tensor& state, const Tensor& pos,
                         const Tensor& cu_seqlens_k, const Tensor& seqused_k, const Tensor& params,
                         const Tensor& param_index, const Tensor& mean, const Tensor& var,
                         const Tensor& active, bool log_transform, double log_eps,
                         int64_t num_params) {
  ScoreParams p{};
  check.dense(state, "state", ScalarType::Float, {-1, kNumBins});
  const int64_t capacity = state.size(0);
  check.dense(pos, "pos", ScalarType::Int, {capacity});
  check.dense(active, "active", ScalarType::Bool, {-1});
  const int64_t batch_size = active.size(0);
  p.seg = check.segments(cu_seqlens_k, seqused_k, batch_size, capacity);
  check.dense(params, "params", ScalarType::Float, {-1, num_params});
  check.dense(param_index, "param_index", ScalarType::Int, {batch_size});
  check.dense(mean, "mean", ScalarType::Float, {kNumBins});
  check.dense(var, "var", ScalarType::Float, {kNumBins});
  STD_TORCH_CHECK(std::isfinite(log_eps) && log_eps >= 0.0, check.op(),
                  ": log_eps must be finite and not negative, got ", log_eps);

  p.state = input<float>(state);
  p.pos = input<int32_t>(pos);
  p.params = input<float>(params);
  p.param_index = input<int32_t>(param_index);
  p.mean = input<float>(mean);
  p.var = input<float>(var);
  p.active = static_cast<const uint8_t*>(active.const_data_ptr());
  p.num_params = num_params;
  p.num_candidates = check.size(params.size(0), "number of parameter vectors");
  p.log_transform = log_transform;
  p.log_eps = static_cast<float>(log_eps);
  return p;
}

}  // namespace

ScoreParams check_bam_scores(const Tensor& state, const Tensor& pos, const Tensor& cu_seqlens_k,
                             const Tensor& seqused_k, const Tensor& params,
                             const Tensor& param_index, const Tensor& mean, const Tensor& var,
                             const Tensor& active, bool log_transform, double log_eps) {
  return check_scores(Check("bam_scores", state, "state"), state, pos, cu_seqlens_k, seqused_k,
                      params, param_index, mean, var, active, log_transform, log_eps,
                      kNumBamParams);
}

ScoreParams check_mlp_scores(const Tensor& state, const Tensor& pos, const Tensor& cu_seqlens_k,
                             const Tensor& seqused_k, const Tensor& params,
                             const Tensor& param_index, const Tensor& mean, const Tensor& var,
                             const Tensor& active, bool log_transform, double log_eps,
                             int64_t hidden, int64_t depth, bool bias, bool residual_first) {
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
  ScoreParams p =
      check_scores(Check("mlp_scores", state, "state"), state, pos, cu_seqlens_k, seqused_k, params,
                   param_index, mean, var, active, log_transform, log_eps, num_params);
  p.hidden = static_cast<int32_t>(hidden);
  p.depth = static_cast<int32_t>(depth);
  p.bias = bias;
  p.residual_first = residual_first;
  return p;
}

}  // namespace namm_ext
