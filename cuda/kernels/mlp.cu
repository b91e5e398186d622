// mlp_scores: a small ReLU network per token (spec 6.2).
//
// Mapping    one thread per token, 128 threads per block; features in shared memory, one column
//            per thread, because hidden unit i adds feature i when residual_first is set.
// Cost       25 * hidden multiply-adds per token.
// Numerics   float.
// Limits     none. Layers 2 .. depth - 1 are h + relu(h) element by element, as in the original,
//            so hidden units never mix before the last layer and one unit at a time suffices.
#include "features.cuh"

namespace namm_ext::gpu {
namespace {

constexpr int kMlpThreads = 128;

__global__ void __launch_bounds__(kMlpThreads) mlp_kernel(const __grid_constant__ ScoreParams p) {
  NAMM_SHARED(Normalisation, normalisation, 1);
  NAMM_SHARED(float, columns, kNumFeatures* kMlpThreads);
  const SegmentTile tile = find_tile(p.seg, kMlpThreads, blockIdx.x);
  if (tile.row >= tile.live) return;
  const int row = tile.row + static_cast<int>(threadIdx.x);
  const int64_t token = tile.start + row;
  const int b = tile.segment / p.seg.num_kv_heads;
  if (!p.active[b]) {
    if (row < tile.live) p.scores[token] = 0.0f;
    return;
  }
  load_normalisation(p, normalisation);
  __syncthreads();
  if (row >= tile.live) return;

  float x[kNumFeatures];
  const int age = p.pos[tile.start + tile.live - 1] - p.pos[token];
  token_features(p, *normalisation, p.state + token * kNumBins, age, x);
  const float* w = p.params + p.param_index[b] * p.num_params;

  float score = 0.0f;
  if (p.depth == 1) {
#pragma unroll
    for (int d = 0; d < kNumFeatures; ++d) score += x[d] * w[d];
    if (p.bias) score += w[kNumFeatures];
  } else {
    float* column = columns + threadIdx.x;  // this thread's alone: no barrier
#pragma unroll
    for (int d = 0; d < kNumFeatures; ++d) column[d * kMlpThreads] = x[d];
    const int64_t hidden = p.hidden, biased = p.bias ? hidden : 0;
    const float* bias = w + kNumFeatures * hidden;
    const float* last = bias + biased + (p.depth - 2) * (hidden * hidden + biased);
    for (int64_t i = 0; i < hidden; ++i) {
      float unit = p.bias ? bias[i] : 0.0f;
#pragma unroll
      for (int d = 0; d < kNumFeatures; ++d) unit += x[d] * w[d * hidden + i];
      unit = unit > 0.0f || unit != unit ? unit : 0.0f;
      if (p.residual_first) unit += column[i * kMlpThreads];
      for (int layer = 2; layer < p.depth; ++layer) unit += fmaxf(unit, 0.0f);
      score += unit * last[i];
    }
    if (p.bias) score += last[hidden];
  }
  p.scores[token] = score;
}

}  // namespace

Status launch_mlp_scores(const ScoreParams& params, const Launch& launch) {
  return gpu::launch(mlp_kernel, num_tiles(params.seg, launch.capacity, kMlpThreads), kMlpThreads,
                     0, launch.stream, params);
}

}  // namespace namm_ext::gpu
