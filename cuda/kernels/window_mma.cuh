// spectrogram and attention_received on tensor cores: bf16 / fp16, head_dim any multiple of 8 up to
// 256, any number of query heads per KV head.
//
// Mapping    block = 4 warps for 4 * kKeys keys of one segment, kKeys = 32 (16 above head_dim 128).
//            A warp keeps its keys as A fragments in registers for the whole kernel. Queries
//            stream by in stages of 16 window rows (one hop) x up to 4 heads through a ring of
//            three cp.async buffers, 16-byte chunks XOR-swizzled by row & 7. A head_dim between
//            64, 96, 128, 192 and 256 is padded with zeros to the next of them.
//            S^T = K Q^T by mma.m16n8k16; exp, group mean and visibility in registers; the
//            accumulator of S^T, packed to fp16, is the A operand of the DFT product; magnitudes
//            and EMA stay in registers. Bin b sits in DFT tile b / 4 of lanes with lane % 4 = b
//            % 4.
// Cost       2 * W * D * G flop per key for S, 1/8 of that at D = 128, G = 4 for the DFT; W * G
//            exponentials and 17 square roots per frame per key. Q is read once per block.
// Numerics   S in float from exact products. P is scaled by 2^15 / G inside the exponent and
//            rounded to fp16 for the DFT (2^-11 relative, values below 2^-39 vanish); sums, EMA
//            and attention_received in float. A key's result does not depend on its neighbours.
// Limits     P <= 1.99 for the spectrogram: lse must be the log-sum-exp of the row's own logits.
//            q aligned to 16 bytes in every stride, lse too; k aligned to 4. Others: window_simt.
#pragma once

#include <climits>

#include "dft_table.cuh"
#include "platform.cuh"
#include "window_simt.cuh"

namespace namm_ext::gpu {

constexpr int kMmaWarps = 4;
constexpr int kMmaThreads = kMmaWarps * kWarpSize;
constexpr int kStages = 3;
constexpr int kStageHeads = 4;
constexpr float kScaleLog2 = 15.0f;

__device__ constexpr DftFragments kDftFragments = make_dft_fragments();

template <int kHeadDim>  // padded
struct WindowTile {
  static constexpr int kMTiles = kHeadDim <= 128 ? 2 : 1;  // 16 keys each
  static constexpr int kKeys = kMmaWarps * kMTiles * 16;
  static constexpr int kKSteps = kHeadDim / 16;
  static constexpr int kChunks = kHeadDim / 8;  // of 16 bytes in a query row
  // The swizzle permutes chunks inside groups of 8, so a row of 12 chunks takes the room of 16.
  static constexpr int kRowBytes = (kChunks + 7) / 8 * 8 * 16;
  static constexpr int kHeadBytes = kHop * kRowBytes;
  static constexpr int kLseOffset = kStageHeads * kHeadBytes;
  static constexpr int kStageBytes = kLseOffset + kStageHeads * kHop * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Chunks of a head that one thread copies.
  static constexpr int kCopies = (kHop * kChunks + kMmaThreads - 1) / kMmaThreads;
  static_assert(kHeadDim % 16 == 0, "whole k-steps");
  static_assert(kSharedBytes <= 99 * 1024, "what a block may have on every architecture");
};

// One hop of up to kStageHeads heads: its first window row, which part of the heads, where in the
// ring. Counted on, because two divisions per stage would be a tenth of its instructions.
struct Stage {
  int row0, part, slot;
};

NAMM_DEVICE void next_stage(Stage& stage, int num_parts) {
  stage.slot = stage.slot + 1 < kStages ? stage.slot + 1 : 0;
  stage.part += 1;
  if (stage.part == num_parts) {
    stage.part = 0;
    stage.row0 += kHop;
  }
}

template <class T, int kHeadDim, bool kReceived, bool kCapped>
__global__ void __launch_bounds__(kMmaThreads, 2)
    window_mma_kernel(const __grid_constant__ Window w, const float* state, float* out,
                      float frame_decay, float period_decay, int first_row) {
  using Tile = WindowTile<kHeadDim>;
  constexpr int kMTiles = Tile::kMTiles, kKSteps = Tile::kKSteps;
  NAMM_DYNAMIC_SHARED(shared);

  const SegmentTile tile = find_tile(w.seg, Tile::kKeys, blockIdx.x);
  if (tile.row >= tile.live) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int g = lane / 4, c = lane % 4;  // fragment row and column of this lane
  const int b = tile.segment / w.seg.num_kv_heads, h = tile.segment % w.seg.num_kv_heads;
  const int warp_row = tile.row + warp * kMTiles * 16;

  if (!w.active[b]) {
    const int num_keys = min(Tile::kKeys, tile.live - tile.row);
    const int64_t first = tile.start + tile.row;
    if constexpr (kReceived) {
      for (int i = thread; i < num_keys; i += kMmaThreads) out[first + i] = 0.0f;
    } else {
      for (int i = thread; i < num_keys * kNumBins; i += kMmaThreads) {
        out[first * kNumBins + i] = state[first * kNumBins + i];
      }
    }
    return;
  }

  // Keys of this warp: A fragments and positions. Rows behind the live ones are zeros and, at
  // position INT_MAX, invisible.
  uint32_t k_frag[kMTiles][kKSteps][4];
  int key_pos[kMTiles][2];
  {
    const T* k = static_cast<const T*>(w.k) + (tile.start + warp_row) * w.head_dim;
    const int num_words = w.head_dim / 2;
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = mt * 16 + half * 8 + g;
        const bool live = warp_row + row < tile.live;
        key_pos[mt][half] = live ? w.pos[tile.start + warp_row + row] : INT_MAX;
        const uint32_t* words = reinterpret_cast<const uint32_t*>(k + int64_t{row} * w.head_dim);
#pragma unroll
        for (int step = 0; step < kKSteps; ++step) {
          const int first = step * 8 + c, second = first + 4;
          k_frag[mt][step][half] = live && first < num_words ? words[first] : 0u;
          k_frag[mt][step][half + 2] = live && second < num_words ? words[second] : 0u;
        }
      }
    }
  }

  const int pos_q = w.pos_q[b];
  int begin_hop = first_hop(w.pos[tile.start + tile.row], pos_q);
  if (kReceived) begin_hop = max(begin_hop, first_row / kHop);
  const bool warp_live = warp_row < tile.live;
  const int warp_first_pos = warp_live ? w.pos[tile.start + warp_row] : INT_MAX;
  const int warp_last_pos =
      warp_live ? w.pos[tile.start + min(warp_row + kMTiles * 16, tile.live) - 1] : INT_MAX;

  const int num_parts = (w.num_groups + kStageHeads - 1) / kStageHeads;
  const int part_heads = (w.num_groups + num_parts - 1) / num_parts;
  const Stage first_stage = {begin_hop * kHop, 0, 0};
  const T* q =
      static_cast<const T*>(w.q) + b * w.q_strides[0] + int64_t{h} * w.num_groups * w.q_strides[1];
  const float* lse = w.lse + b * w.lse_strides[0] + int64_t{h} * w.num_groups * w.lse_strides[1];
  const SharedAddress ring = shared_address(shared);

  // What this thread copies of every head: where from, where to, and whether it is padding.
  int64_t source_offset[Tile::kCopies];
  SharedAddress target_offset[Tile::kCopies];
  bool copies[Tile::kCopies], real[Tile::kCopies];
#pragma unroll
  for (int j = 0; j < Tile::kCopies; ++j) {
    const int i = thread + j * kMmaThreads, chunk = i % Tile::kChunks, row = i / Tile::kChunks;
    copies[j] = row < kHop;
    real[j] = chunk * 8 < w.head_dim;
    source_offset[j] = real[j] ? row * w.q_strides[2] + chunk * 8 : 0;
    target_offset[j] = row * Tile::kRowBytes + ((chunk ^ (row & 7)) << 4);
  }

  Stage issued = first_stage;
  auto issue = [&] {
    if (issued.row0 < w.num_rows) {
      const int row0 = issued.row0, head0 = issued.part * part_heads;
      const int num_heads = min(part_heads, w.num_groups - head0);
      const SharedAddress target = ring + issued.slot * Tile::kStageBytes;
      const T* source = q + head0 * w.q_strides[1] + row0 * w.q_strides[2];
      for (int head = 0; head < num_heads; ++head, source += w.q_strides[1]) {
#pragma unroll
        for (int j = 0; j < Tile::kCopies; ++j) {
          if (!copies[j]) continue;
          cp_async<16>(target + head * Tile::kHeadBytes + target_offset[j],
                       source + source_offset[j], real[j]);
        }
      }
      if (thread < num_heads * 4) {
        const int head = thread / 4, quarter = thread % 4;
        cp_async<16>(target + Tile::kLseOffset + (head * kHop + quarter * 4) * 4,
                     lse + (head0 + head) * w.lse_strides[1] + row0 + quarter * 4);
      }
    }
    cp_async_commit();  // possibly empty: the count of groups is the count of stages
    next_stage(issued, num_parts);
  };

  uint32_t dft[2][4][2];
  if constexpr (!kReceived) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        dft[half][t][0] = kDftFragments.word[half][t][0][lane];
        dft[half][t][1] = kDftFragments.word[half][t][1][lane];
      }
    }
  }

  const float scale = w.softmax_scale * kLog2E;
  const SoftCap cap(w.softcap, w.softmax_scale);
  const float shift = log2f(static_cast<float>(w.num_groups)) - (kReceived ? 0.0f : kScaleLog2);
  // ldmatrix: lane i points at query row i % 8 (+ 8 for i >= 16) and, for odd i / 8, at the second
  // half of the k-step.
  const int q_row = (lane & 7) + (lane >= 16 ? 8 : 0), q_half = (lane >> 3) & 1;

  float spectrum[kMTiles][4][4] = {};  // W1 A of the last hop: the frame under way
  float ema[kMTiles][4][2] = {}, ema16[kMTiles][2] = {};
  float received[kMTiles][2] = {};
  float mean[kMTiles][2][4] = {};  // [key tile][query tile][fragment]

  issue();
  issue();
  for (Stage stage = first_stage; stage.row0 < w.num_rows; next_stage(stage, num_parts)) {
    cp_async_wait<1>();
    __syncthreads();
    issue();
    const int row0 = stage.row0;
    const int num_heads = min(part_heads, w.num_groups - stage.part * part_heads);
    const unsigned char* buffer = shared + stage.slot * Tile::kStageBytes;
    const SharedAddress q_base = ring + stage.slot * Tile::kStageBytes + q_row * Tile::kRowBytes;
    if (!warp_live) continue;

    if (warp_first_pos <= pos_q + row0 + kHop - 1) {
#pragma unroll 1
      for (int head = 0; head < num_heads; ++head) {
        float s[kMTiles][2][4] = {};
        const SharedAddress q_head = q_base + head * Tile::kHeadBytes;
#pragma unroll
        for (int step = 0; step < kKSteps; ++step) {
          uint32_t frag[4];
          ldmatrix_x4(frag, q_head + (((2 * step + q_half) ^ (q_row & 7)) << 4));
#pragma unroll
          for (int mt = 0; mt < kMTiles; ++mt) {
            mma_m16n8k16<T>(s[mt][0], k_frag[mt][step], frag[0], frag[1]);
            mma_m16n8k16<T>(s[mt][1], k_frag[mt][step], frag[2], frag[3]);
          }
        }
        if constexpr (kCapped) {
#pragma unroll
          for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
            for (int nt = 0; nt < 2; ++nt) {
#pragma unroll
              for (int j = 0; j < 4; ++j) s[mt][nt][j] = cap(s[mt][nt][j]);
            }
          }
        }
        const float* head_lse =
            reinterpret_cast<const float*>(buffer + Tile::kLseOffset) + head * kHop;
#pragma unroll
        for (int nt = 0; nt < 2; ++nt) {
          const float2 l = *reinterpret_cast<const float2*>(head_lse + nt * 8 + 2 * c);
          const float l0 = l.x * kLog2E + shift, l1 = l.y * kLog2E + shift;
#pragma unroll
          for (int mt = 0; mt < kMTiles; ++mt) {
            mean[mt][nt][0] += ex2(s[mt][nt][0] * scale - l0);
            mean[mt][nt][1] += ex2(s[mt][nt][1] * scale - l1);
            mean[mt][nt][2] += ex2(s[mt][nt][2] * scale - l0);
            mean[mt][nt][3] += ex2(s[mt][nt][3] * scale - l1);
          }
        }
      }
    }
    if (stage.part + 1 < num_parts) continue;

    // The hop is complete. A select, so that what must not count never reaches a sum.
    const bool partly = warp_last_pos > pos_q + row0 || (kReceived && row0 < first_row);
    if (partly) {
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
        for (int nt = 0; nt < 2; ++nt) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int row = row0 + nt * 8 + 2 * c + (i & 1);
            const bool counts =
                key_pos[mt][i >> 1] <= pos_q + row && !(kReceived && row < first_row);
            mean[mt][nt][i] = counts ? mean[mt][nt][i] : 0.0f;
          }
        }
      }
    }

#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt) {
      if constexpr (kReceived) {
        received[mt][0] += (mean[mt][0][0] + mean[mt][0][1]) + (mean[mt][1][0] + mean[mt][1][1]);
        received[mt][1] += (mean[mt][0][2] + mean[mt][0][3]) + (mean[mt][1][2] + mean[mt][1][3]);
      } else {
        const uint32_t a[4] = {pack2<fp16>(mean[mt][0][0], mean[mt][0][1]),
                               pack2<fp16>(mean[mt][0][2], mean[mt][0][3]),
                               pack2<fp16>(mean[mt][1][0], mean[mt][1][1]),
                               pack2<fp16>(mean[mt][1][2], mean[mt][1][3])};
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          // The second half of the window completes the frame that the last hop began.
          mma_m16n8k16<fp16>(spectrum[mt][t], a, dft[1][t][0], dft[1][t][1]);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float re = spectrum[mt][t][2 * half], im = spectrum[mt][t][2 * half + 1];
            float y = fast_sqrt(re * re + im * im);
            if (t == 0) {  // lane 0 of the quad holds the real bins 0 and 16
              ema16[mt][half] = ema16[mt][half] * frame_decay + fabsf(im);
              y = c == 0 ? fabsf(re) : y;
            }
            ema[mt][t][half] = ema[mt][t][half] * frame_decay + y;
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) spectrum[mt][t][i] = 0.0f;
          mma_m16n8k16<fp16>(spectrum[mt][t], a, dft[0][t][0], dft[0][t][1]);
        }
        // The first hop of the window has completed no frame. Forgotten here, once, and not left
        // out above, where it would be a branch for every tile.
        if (row0 == 0) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            ema16[mt][half] = 0.0f;
#pragma unroll
            for (int t = 0; t < 4; ++t) ema[mt][t][half] = 0.0f;
          }
        }
      }
#pragma unroll
      for (int nt = 0; nt < 2; ++nt) {
#pragma unroll
        for (int i = 0; i < 4; ++i) mean[mt][nt][i] = 0.0f;
      }
    }
  }

#pragma unroll
  for (int mt = 0; mt < kMTiles; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + mt * 16 + half * 8 + g;
      const int64_t key = tile.start + row;
      if constexpr (kReceived) {
        float sum = received[mt][half];
        sum += __shfl_xor_sync(kFullMask, sum, 1);
        sum += __shfl_xor_sync(kFullMask, sum, 2);
        if (c == 0 && row < tile.live) out[key] = sum;
      } else if (row < tile.live) {
        const float weight = (1.0f - frame_decay) / static_cast<float>(1 << 15);
        const float* old = state + key * kNumBins;
        float* target = out + key * kNumBins;
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          target[4 * t + c] = weight * ema[mt][t][half] + period_decay * old[4 * t + c];
        }
        if (c == 0) target[16] = weight * ema16[mt][half] + period_decay * old[16];
      }
    }
  }
}

}  // namespace namm_ext::gpu
