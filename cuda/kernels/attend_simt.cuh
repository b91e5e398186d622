// attend_ without tensor cores: float32, and every head_dim, stride and alignment.
//
// Mapping   block = 8 packed query rows of one segment and, if split, one part of its keys.
//           A thread has one of 128 keys in Q K^T and some of the value columns in P V;
//           probabilities pass through shared memory.
// Cost      rows * keys * (D + Dv) multiply-adds; K and V are read once per 8 rows.
// Numerics  float throughout; sums over D and over keys run in order.
// Limits    8 * (D + Dv) floats of shared memory.
#pragma once

#include "attend.cuh"

namespace namm_ext::gpu {

struct SimtShape {
  static constexpr int kThreads = 128;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kBlocks = 4;  // per SM; leaves 128 registers, so that nothing spills
  static constexpr int kRows = 8;
  static constexpr int kKeys = kThreads;
  static_assert(kRows % kWarps == 0, "every warp has the same number of rows in the softmax");

  static size_t shared_bytes(int head_dim, int head_dim_v) {
    return sizeof(float) * kRows * (head_dim + head_dim_v + kKeys + 3);
  }
};

template <class T, bool kSplit>
__global__ __launch_bounds__(SimtShape::kThreads, SimtShape::kBlocks) void attend_simt_kernel(
    const __grid_constant__ AttendParams p, const Partials partials, int row_tiles) {
  constexpr int kThreads = SimtShape::kThreads, kWarps = SimtShape::kWarps;
  constexpr int kRows = SimtShape::kRows, kKeys = SimtShape::kKeys;
  NAMM_DYNAMIC_SHARED(shared);
  const int dim = p.head_dim, dim_v = p.head_dim_v;
  auto* q = reinterpret_cast<float*>(shared);  // [kRows][D]
  float* out = q + kRows * dim;                // [kRows][Dv], each column belongs to one thread
  float* probs = out + kRows * dim_v;          // [kRows][kKeys]
  float* row_max = probs + kRows * kKeys;      // [kRows]
  float* row_sum = row_max + kRows;
  float* shrink = row_sum + kRows;

  Chunk chunk{};
  int32_t row_first = 0;
  if constexpr (kSplit) {
    chunk = find_chunk(p.seg, partials.places, blockIdx.x);
    row_first = blockIdx.y * kRows;
    if (!chunk.exists) return;
  } else {
    const int segment = blockIdx.x / row_tiles;
    const int32_t live = p.seg.seqused_k[segment];
    chunk = {segment, live, 0, live, p.seg.cu_seqlens_k[segment], true, true};
    row_first = static_cast<int32_t>(blockIdx.x % row_tiles) * kRows;
  }
  const QueryRows rows = query_rows(p, chunk.segment);
  if (row_first >= rows.count) return;
  const int num_rows = min(kRows, rows.count - row_first);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int32_t* pos = p.pos + chunk.start;
  const T* k = static_cast<const T*>(p.k) + chunk.start * dim;
  const T* v = static_cast<const T*>(p.v) + chunk.start * dim_v;

  for (int i = threadIdx.x; i < kRows * dim; i += kThreads) {
    const int row = i / dim;
    q[i] = row < num_rows ? to_float(query_row<T>(p, rows, row_first + row)[i - row * dim]) : 0.0f;
  }
  for (int i = threadIdx.x; i < kRows * dim_v; i += kThreads) out[i] = 0.0f;
  if (threadIdx.x < kRows) {
    row_max[threadIdx.x] = -INFINITY;
    row_sum[threadIdx.x] = 0.0f;
  }
  const int32_t row_last = row_first + num_rows - 1;
  const int32_t end =
      min(chunk.end, count_visible(pos, chunk.live, rows.pos_first + row_last / p.num_groups));
  const float scale_log2 = p.softmax_scale * kLog2E;
  const SoftCap cap(p.softcap, p.softmax_scale);
  __syncthreads();

  for (int32_t first = chunk.begin; first < end; first += kKeys) {
    const int32_t key = first + threadIdx.x;
    float dot[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) dot[r] = 0.0f;
    if (key < end) {
      const T* row = k + int64_t{key} * dim;
      for (int d = 0; d < dim; ++d) {
        const float x = to_float(row[d]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) dot[r] += q[r * dim + d] * x;
      }
    }
    if (cap.any()) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) dot[r] = cap(dot[r]);
    }
    const int32_t key_pos = key < end ? pos[key] : 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const bool visible = key < end && key_pos <= rows.pos_first + (row_first + r) / p.num_groups;
      probs[r * kKeys + threadIdx.x] = visible ? dot[r] * scale_log2 : -INFINITY;
    }
    __syncthreads();  // the logits are there

    for (int r = warp; r < kRows; r += kWarps) {
      float logit[kKeys / kWarpSize], max = row_max[r];
#pragma unroll
      for (int j = 0; j < kKeys / kWarpSize; ++j) {
        logit[j] = probs[r * kKeys + j * kWarpSize + lane];
        max = fmaxf(max, logit[j]);
      }
      for (int bits = 16; bits > 0; bits /= 2) {
        max = fmaxf(max, __shfl_xor_sync(kFullMask, max, bits));
      }
      const float base = safe_max(max);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeys / kWarpSize; ++j) {
        const float prob = ex2(logit[j] - base);
        probs[r * kKeys + j * kWarpSize + lane] = prob;
        sum += prob;
      }
      for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kFullMask, sum, bits);
      const float factor = ex2(row_max[r] - base);
      __syncwarp();  // every lane has read row_max
      if (lane == 0) {
        shrink[r] = factor;
        row_sum[r] = row_sum[r] * factor + sum;
        row_max[r] = max;
      }
    }
    __syncthreads();  // the probabilities are there

    const int num_keys = min(kKeys, end - first);
    for (int d = threadIdx.x; d < dim_v; d += kThreads) {
      float sum[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) sum[r] = out[r * dim_v + d] * shrink[r];
      for (int j = 0; j < num_keys; ++j) {
        const float x = to_float(v[int64_t{first + j} * dim_v + d]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r] += probs[r * kKeys + j] * x;
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) out[r * dim_v + d] = sum[r];
    }
    __syncthreads();  // the next keys may overwrite probs
  }

  for (int r = 0; r < num_rows; ++r) {
    const int32_t row = row_first + r;
    const float sum = row_sum[r];
    const int64_t part = int64_t{blockIdx.x} * partials.rows_per_part + row;
    for (int d = threadIdx.x; d < dim_v; d += kThreads) {
      if (chunk.whole) {
        out_row<T>(p, rows, row)[d] = from_float<T>(out[r * dim_v + d] * normaliser(sum));
      } else {
        partials.out[part * dim_v + d] = out[r * dim_v + d];
      }
    }
    if (threadIdx.x == 0) {
      if (chunk.whole) {
        *lse_of_row(p, rows, row) = natural_lse(row_max[r], sum);
      } else {
        partials.max_sum[part] = make_float2(row_max[r], sum);
      }
    }
  }
}

}  // namespace namm_ext::gpu
