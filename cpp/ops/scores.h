// What the two scorers share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "prepare.h"

namespace namm_ext {

inline Prepared<ScoreParams, Tensor> prepare_scores(const char* op, const Tensor& state,
                                                    const Tensor& pos, const Tensor& cu_seqlens_k,
                                                    const Tensor& seqused_k, const Tensor& params,
                                                    const Tensor& param_index, const Tensor& mean,
                                                    const Tensor& var, const Tensor& active,
                                                    bool log_transform, double log_eps,
                                                    int64_t num_params) {
  const Check check(op, state, "state");
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
  STD_TORCH_CHECK(std::isfinite(log_eps) && log_eps >= 0.0, op,
                  ": log_eps must be finite and not negative, got ", log_eps);

  p.state = input<float>(state);
  p.pos = input<int32_t>(pos);
  p.params = input<float>(params);
  p.param_index = input<int32_t>(param_index);
  p.mean = input<float>(mean);
  p.var = input<float>(var);
  p.active = input<uint8_t>(active);
  p.num_params = num_params;
  p.num_candidates = check.size(params.size(0), "number of parameter vectors");
  p.log_transform = log_transform;
  p.log_eps = static_cast<float>(log_eps);

  const Tensor scores = torch::stable::new_empty(state, {capacity});
  p.scores = output<float>(scores);
  return {op, capacity, p, scores};
}

}  // namespace namm_ext
