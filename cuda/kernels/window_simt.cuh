// spectrogram and attention_received in plain float arithmetic: any dtype, head_dim and group size.
//
// Mapping    block = 128 threads for 32 keys of one segment. Per hop of 16 window rows, thread
//            (key = lane, 4 rows per warp) sums its probabilities over the G heads; then the same
//            thread owns bins warp, warp + 4, ... of its key.
// Cost       2 * W * D * G flop per key, K and Q staged through shared memory in slices of 32
//            dimensions; K is read once per hop and head. The path of fp32 caches and odd sizes.
// Numerics   float throughout, expf and sqrtf; no tensor cores.
// Limits     none beyond params.h.
#pragma once

#include "dft_table.cuh"
#include "platform.cuh"

namespace namm_ext::gpu {

constexpr int kSimtKeys = 32;
constexpr int kSimtThreads = 128;
constexpr int kSimtSlice = 32;  // dimensions of D in shared memory at a time

__device__ constexpr DftFloats kDftFloats = make_dft_floats();

// First hop of 16 window rows in which a key at position `pos` is visible to some row.
NAMM_DEVICE int first_hop(int pos, int pos_q) { return pos > pos_q ? (pos - pos_q) / kHop : 0; }

template <class T, bool kReceived>
__global__ void __launch_bounds__(kSimtThreads, 4)
    window_simt_kernel(const __grid_constant__ Window w, const float* state, float* out,
                       float frame_decay, float period_decay, int first_row) {
  NAMM_SHARED(float, q_slice, kHop* kSimtSlice);
  NAMM_SHARED(float, k_slice, kSimtKeys*(kSimtSlice + 1));
  NAMM_SHARED(float, probs, 2 * kHop * kSimtKeys);  // this hop and the one before it
  NAMM_SHARED(float, sums, 4 * kSimtKeys);

  const SegmentTile tile = find_tile(w.seg, kSimtKeys, blockIdx.x);
  if (tile.row >= tile.live) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int b = tile.segment / w.seg.num_kv_heads, h = tile.segment % w.seg.num_kv_heads;
  const bool live = tile.row + lane < tile.live;
  const int64_t first_key = tile.start + tile.row, key = first_key + lane;

  if (!w.active[b]) {
    if constexpr (kReceived) {
      if (warp == 0 && live) out[key] = 0.0f;
    } else {
      for (int bin = warp; live && bin < kNumBins; bin += 4) {
        out[key * kNumBins + bin] = state[key * kNumBins + bin];
      }
    }
    return;
  }

  const int pos_q = w.pos_q[b];
  const int num_hops = w.num_rows / kHop;
  int hop = first_hop(w.pos[first_key], pos_q);
  if (kReceived) hop = max(hop, first_row / kHop);
  const int key_pos = live ? w.pos[key] : 0;
  const T* k = static_cast<const T*>(w.k);
  const T* q = static_cast<const T*>(w.q) + b * w.q_strides[0];
  const float* lse = w.lse + b * w.lse_strides[0];
  const int num_keys = min(kSimtKeys, tile.live - tile.row);
  const SoftCap cap(w.softcap, w.softmax_scale);

  float ema[5] = {}, received = 0.0f;
  if constexpr (!kReceived) {  // the hop before the first visible one holds zeros
    for (int i = thread; i < kHop * kSimtKeys; i += kSimtThreads) {
      probs[((hop + 1) & 1) * kHop * kSimtKeys + i] = 0.0f;
    }
  }
  for (; hop < num_hops; ++hop) {
    float mean[4] = {};
    for (int g = 0; g < w.num_groups; ++g) {
      const int64_t head = int64_t{h} * w.num_groups + g;
      const T* q_rows = q + head * w.q_strides[1] + int64_t{hop} * kHop * w.q_strides[2];
      float dot[4] = {};
      for (int d0 = 0; d0 < w.head_dim; d0 += kSimtSlice) {
        __syncthreads();
        for (int i = thread; i < kHop * kSimtSlice; i += kSimtThreads) {
          const int row = i / kSimtSlice, d = d0 + i % kSimtSlice;
          q_slice[i] = d < w.head_dim ? to_float(q_rows[row * w.q_strides[2] + d]) : 0.0f;
        }
        for (int i = thread; i < kSimtKeys * kSimtSlice; i += kSimtThreads) {
          const int row = i / kSimtSlice, d = d0 + i % kSimtSlice;
          const bool valid = row < num_keys && d < w.head_dim;
          k_slice[row * (kSimtSlice + 1) + i % kSimtSlice] =
              valid ? to_float(k[(first_key + row) * w.head_dim + d]) : 0.0f;
        }
        __syncthreads();
        for (int d = 0; d < kSimtSlice; ++d) {
          const float key_value = k_slice[lane * (kSimtSlice + 1) + d];
          for (int r = 0; r < 4; ++r) {
            dot[r] += q_slice[(warp * 4 + r) * kSimtSlice + d] * key_value;
          }
        }
      }
      for (int r = 0; r < 4; ++r) {
        const int row = hop * kHop + warp * 4 + r;
        const float product = cap.any() ? cap(dot[r]) : dot[r];
        const float p = expf(product * w.softmax_scale - lse[head * w.lse_strides[1] + row]);
        mean[r] += key_pos <= pos_q + row ? p : 0.0f;
      }
    }
    const float share = 1.0f / static_cast<float>(w.num_groups);
    if constexpr (kReceived) {
      for (int r = 0; r < 4; ++r) {
        if (hop * kHop + warp * 4 + r >= first_row) received += mean[r] * share;
      }
    } else {
      float* now = probs + (hop & 1) * kHop * kSimtKeys;
      const float* before = probs + ((hop + 1) & 1) * kHop * kSimtKeys;
      for (int r = 0; r < 4; ++r) now[(warp * 4 + r) * kSimtKeys + lane] = mean[r] * share;
      __syncthreads();
      if (hop > 0) {
        for (int i = 0; i < 5; ++i) {
          const int bin = warp + 4 * i;
          if (bin >= kNumBins) break;
          const int column = bin == 16 ? 1 : 2 * bin;
          float re = 0.0f, im = 0.0f;
          for (int m = 0; m < kHop; ++m) {
            const float old_row = before[m * kSimtKeys + lane], row = now[m * kSimtKeys + lane];
            re += old_row * kDftFloats.value[m][column];
            re += row * kDftFloats.value[m + kHop][column];
            if (bin % 16 != 0) {
              im += old_row * kDftFloats.value[m][column + 1];
              im += row * kDftFloats.value[m + kHop][column + 1];
            }
          }
          ema[i] = ema[i] * frame_decay + sqrtf(re * re + im * im);
        }
      }
    }
  }

  if constexpr (kReceived) {
    sums[warp * kSimtKeys + lane] = received;
    __syncthreads();
    if (warp == 0 && live) {
      out[key] = (sums[lane] + sums[kSimtKeys + lane]) +
                 (sums[2 * kSimtKeys + lane] + sums[3 * kSimtKeys + lane]);
    }
  } else if (live) {
    for (int i = 0; i < 5; ++i) {
      const int bin = warp + 4 * i;
      if (bin >= kNumBins) break;
      const int64_t at = key * kNumBins + bin;
      out[at] = (1.0f - frame_decay) * ema[i] + period_decay * state[at];
    }
  }
}

}  // namespace namm_ext::gpu
