// gate_: a linear gate of the newest tokens into the last column of the state (spec 12.2).
//
// Mapping    one warp per (token, batch row, kGateHeads heads); every lane makes each 32nd input of
//            a block where it needs it and adds it to the sums of the heads at once, so that the
//            inputs are stored nowhere.
// Cost       per token H (R / 2 + 2) square roots and logarithms for each kGateHeads heads, and
//            H^2 (D + Dv + 2) multiply-adds, whose weights come from the caches.
// Numerics   float, logf and sqrtf; a token's sums have one order, whatever else is in the batch.
// Limits     numbers in index tensors are the caller's promise; still no row outside of a slot is
//            read or written. Heads are taken to hold the same tokens.
#include "platform.cuh"

namespace namm_ext::gpu {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kGateHeads = 4;

// The sums of up to kGateHeads heads, of which each lane has a part.
struct GateSums {
  const float* weight;  // [count, stride], of the first of the heads
  int64_t stride;
  int count;
  float sum[kGateHeads];

  // Input number i is x.
  NAMM_DEVICE void add(int64_t i, float x) {
#pragma unroll
    for (int h = 0; h < kGateHeads; ++h) {
      if (h < count) sum[h] += x * weight[h * stride + i];
    }
  }
};

// The sum over the lanes, in every lane.
NAMM_DEVICE float sum_lanes(float x) {
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(kFullMask, x, bits);
  return x;
}

template <class T>
__global__ __launch_bounds__(kThreads) void gate_kernel(const __grid_constant__ GateParams p) {
  const int blocks_per_row = (p.num_new - 1) / kWarps + 1, b = blockIdx.x / blocks_per_row;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int token = blockIdx.x % blocks_per_row * kWarps + warp;
  const int heads = p.seg.num_kv_heads, first_head = blockIdx.y * kGateHeads;
  const int64_t segment = int64_t{b} * heads;
  if (token >= p.num_new || !p.active[b]) return;
  const auto row_in_slot = [&](int h) { return p.seg.seqused_k[segment + h] - p.num_new + token; };
  bool missing = false;
  for (int h = lane; h < heads; h += kWarpSize) missing |= row_in_slot(h) < 0;
  if (__any_sync(kFullMask, missing)) return;

  GateSums sums{
      p.weight + first_head * p.num_inputs, p.num_inputs, min(kGateHeads, heads - first_head), {}};
  const int half = p.rotary_dim / 2, rest = p.head_dim - p.rotary_dim;
  const int64_t logs = int64_t{heads} * (half + rest), values = logs + int64_t{heads} * half;
  const int64_t norms = values + int64_t{heads} * p.head_dim_v;
  for (int h = 0; h < heads; ++h) {
    const int64_t row = int64_t{p.seg.cu_seqlens_k[segment + h]} + row_in_slot(h);
    const T* key = static_cast<const T*>(p.k) + row * p.head_dim;
    const T* value = static_cast<const T*>(p.v) + row * p.head_dim_v;
    float key_square = 0.0f, value_square = 0.0f;
    // Unrolled, these loops would spill on sm_80 and sm_90.
#pragma unroll 1
    for (int i = lane; i < half; i += kWarpSize) {
      const float first = to_float(key[p.interleaved ? 2 * i : i]);
      const float second = to_float(key[p.interleaved ? 2 * i + 1 : i + half]);
      const float square = first * first + second * second, length = sqrtf(square);
      key_square += square;
      sums.add(int64_t{h} * (half + rest) + i, length);
      sums.add(logs + int64_t{h} * half + i, logf(length + p.eps));
    }
#pragma unroll 1
    for (int i = lane; i < rest; i += kWarpSize) {
      const float x = to_float(key[p.rotary_dim + i]);
      key_square += x * x;
      sums.add(int64_t{h} * (half + rest) + half + i, x);
    }
#pragma unroll 1
    for (int i = lane; i < p.head_dim_v; i += kWarpSize) {
      const float x = to_float(value[i]);
      value_square += x * x;
      sums.add(values + int64_t{h} * p.head_dim_v + i, x);
    }
    value_square = sum_lanes(value_square);
    key_square = sum_lanes(key_square);
    if (lane == 0) {
      sums.add(norms + h, logf(sqrtf(value_square) + p.eps));
      sums.add(norms + heads + h, logf(sqrtf(key_square) + p.eps));
    }
  }
#pragma unroll
  for (int h = 0; h < kGateHeads; ++h) {
    const float sum = sum_lanes(sums.sum[h]);
    if (lane == 0 && h < sums.count) {
      const int head = first_head + h;
      const int64_t row = int64_t{p.seg.cu_seqlens_k[segment + head]} + row_in_slot(head);
      p.state[(row + 1) * p.num_state - 1] = sum + p.bias[head];
    }
  }
}

}  // namespace

Status launch_gate(const GateParams& p, const Launch& config) {
  const dim3 grid(static_cast<unsigned>(p.seg.batch_size * ceil_div(p.num_new, kWarps)),
                  static_cast<unsigned>(ceil_div(p.seg.num_kv_heads, kGateHeads)));
  auto* kernel = p.dtype == DType::kFloat32    ? gate_kernel<float>
                 : p.dtype == DType::kBFloat16 ? gate_kernel<bf16>
                                               : gate_kernel<fp16>;
  return launch(kernel, grid, dim3(kThreads), 0, config.stream, p);
}

}  // namespace namm_ext::gpu
