#include <torch/csrc/stable/ops.h>

#include "check.h"
#include "prepare.h"

namespace namm_ext {

Prepared<SelectParams, std::tuple<Tensor, Tensor>> prepare_select(
    const Tensor& scores, const Tensor& pos, const Tensor& cu_seqlens_k, const Tensor& seqused_k,
    const Tensor& active, double threshold, int64_t cache_size, const std::string& budget,
    bool fill, bool protect_newest, int64_t sink_tokens, int64_t recent_tokens) {
  const Check check("select", scores, "scores");
  SelectParams p{};
  check.dense(scores, "scores", ScalarType::Float, {-1});
  check.dense(pos, "pos", ScalarType::Int, {scores.size(0)});
  check.dense(active, "active", ScalarType::Bool, {-1});
  p.seg = check.segments(cu_seqlens_k, seqused_k, active.size(0), scores.size(0));
  STD_TORCH_CHECK(!std::isnan(threshold), "select: threshold must not be NaN, got ", threshold);
  STD_TORCH_CHECK(cache_size == -1 || (cache_size >= 1 && cache_size <= INT32_MAX),
                  "select: cache_size must be -1 (none) or in [1, ", INT32_MAX, "], got ",
                  cache_size);
  STD_TORCH_CHECK(budget == "per_head" || budget == "per_layer",
                  "select: budget must be 'per_head' or 'per_layer', got '", budget, "'");
  STD_TORCH_CHECK(!fill || budget == "per_head",
                  "select: fill must be False with budget 'per_layer', got True");
  STD_TORCH_CHECK(sink_tokens >= 0 && sink_tokens <= INT32_MAX,
                  "select: sink_tokens must be in [0, ", INT32_MAX, "], got ", sink_tokens);
  STD_TORCH_CHECK(recent_tokens >= 0 && recent_tokens <= INT32_MAX,
                  "select: recent_tokens must be in [0, ", INT32_MAX, "], got ", recent_tokens);

  p.scores = input<float>(scores);
  p.pos = input<int32_t>(pos);
  p.active = input<uint8_t>(active);
  p.threshold = static_cast<float>(threshold);
  p.cache_size = static_cast<int32_t>(cache_size);
  p.budget = budget == "per_head" ? Budget::kPerHead : Budget::kPerLayer;
  p.fill = fill;
  p.protect_newest = protect_newest;
  p.sink_tokens = static_cast<int32_t>(sink_tokens);
  p.recent_tokens = static_cast<int32_t>(recent_tokens);

  const Tensor keep = torch::stable::new_empty(scores, scores.sizes(), ScalarType::Byte);
  const Tensor num_kept = torch::stable::new_empty(seqused_k, seqused_k.sizes());
  p.keep = output<uint8_t>(keep);
  p.num_kept = output<int32_t>(num_kept);
  return {check.op(), scores.size(0), p, {keep, num_kept}};
}

}  // namespace namm_ext
