#include "scores.h"

namespace namm_ext {

Prepared<ScoreParams, Tensor> prepare_bam_scores(const Tensor& state, const Tensor& pos,
                                                 const Tensor& cu_seqlens_k,
                                                 const Tensor& seqused_k, const Tensor& params,
                                                 const Tensor& param_index, const Tensor& mean,
                                                 const Tensor& var, const Tensor& active,
                                                 bool log_transform, double log_eps) {
  return prepare_scores("bam_scores", state, pos, cu_seqlens_k, seqused_k, params, param_index,
                        mean, var, active, log_transform, log_eps, kNumBamParams);
}

}  // namespace namm_ext
