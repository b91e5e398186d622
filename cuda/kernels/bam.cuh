// bam_scores: backward attention memory as one number per token (spec 6.1).
//
// Algebra. q, k, v and the attention output never exist. With z_i = (x_i Wq + bq) Wk^T log2(e) /
// sqrt(32), g_i and c_i below, and p_ij = 2^(z_i.x_j - z_i.x_i),
//     score_i = sum_{j >= i} p_ij (c_i + g_i.x_j) / sum_{j >= i} p_ij.
// b_k cancels in the softmax; W2 and w3 act on the average of v = x Wv + bv, which is linear in
// the average of x. The self logit is the anchor: the denominator is at least 1 and no running
// maximum is needed; rows whose sums leave the range of float are done again exactly.
//
// Mapping    bam_fold_kernel   one warp per row of the folded matrices, for each batch row
//            bam_prep_kernel   one thread per token: x, z, g as fp16 [32], c, anchor
//            bam_pairs_kernel  block = 4 warps x 64 rows, and a part of the tokens they see; x
//                              tiles of 64 tokens through four cp.async stages; z.x and g.x by
//                              mma.m16n8k16 (fp16), p in float
//            bam_rows_kernel   adds up the parts, in order; then, or instead, one warp per row in
//                              float: rows out of range, or all
// Cost       K^2 / 2 exponentials per segment; 256 flop per pair on tensor cores.
// Balance    old rows see more than new ones. Parts are a sixth of the segment long, the whole ones
//            start first, and all share the anchor, so that their sums just add.
// Numerics   x, z, g rounded to fp16 (the mantissa of TF32, which the original uses), sums and p in
//            float: a relative 1e-3 of the scores' scale at unit weights. The row kernel is float.
// Limits     none: features beyond fp16 make infinities, and those rows are redone in float.
#pragma once

#include "bam_fold.cuh"
#include "features.cuh"
#include "platform.cuh"

namespace namm_ext::gpu {

constexpr int kPadded = 32;  // features of a token in fp16, 25 used
constexpr int kBamThreads = 128;
constexpr int kBamWarps = kBamThreads / kWarpSize;
constexpr int kBamMTiles = 4;  // 16 rows each, per warp
constexpr int kBamWarpRows = 16 * kBamMTiles;
constexpr int kBamRows = kBamWarps * kBamWarpRows;
constexpr int kBamKeys = 64;  // tokens of an x tile
constexpr int kBamStages = 4;
constexpr int kBamTileBytes = kBamKeys * kPadded * 2;
constexpr int kBamSharedBytes = kBamStages * kBamTileBytes;
constexpr int kRowsPerBlock = 128;        // of the row kernel
constexpr int kBamParts = 6;              // at most, of the tokens that a block of rows sees
constexpr int kBamTurns = kBamParts + 2;  // of their blocks to start
constexpr int kMinPart = 256;
constexpr float kMaxDenominator = 1e18f;
static_assert(kBamRows % kBamKeys == 0, "x tiles start at a row block");
static_assert(kBamKeys * 4 % kBamThreads == 0, "every thread copies equally many chunks");

// Scratch memory, one part after the other.
struct BamWorkspace {
  Folded* folded;  // [B]
  uint32_t* x;     // [C][16] pairs of fp16
  uint32_t* z;
  uint32_t* g;
  float* c;          // [C]
  float* anchor;     // [C] z.x of the row itself, from the rounded numbers
  float2* sums;      // [kBamParts][C] numerator, denominator
  int64_t capacity;  // C
};

// Tokens of a part. It depends on the segment's own length only, so a result does not change with
// the batch around it.
NAMM_DEVICE int32_t part_tokens(int32_t live) {
  return max(kMinPart, (live + kBamParts * kBamKeys - 1) / (kBamParts * kBamKeys) * kBamKeys);
}
static_assert(kMinPart % kBamKeys == 0, "parts are whole x tiles");

// y = x weight + bias over the padded row.
NAMM_DEVICE void affine(const float (&x)[kNumFeatures], const float (*weight)[Folded::kRow],
                        const float* bias, float (&y)[Folded::kRow]) {
#pragma unroll
  for (int d = 0; d < Folded::kRow; d += 4) {
    const float4 v = *reinterpret_cast<const float4*>(bias + d);
    y[d] = v.x;
    y[d + 1] = v.y;
    y[d + 2] = v.z;
    y[d + 3] = v.w;
  }
#pragma unroll
  for (int e = 0; e < kNumFeatures; ++e) {
#pragma unroll
    for (int d = 0; d < Folded::kRow; d += 4) {
      const float4 v = *reinterpret_cast<const float4*>(&weight[e][d]);
      y[d] += x[e] * v.x;
      y[d + 1] += x[e] * v.y;
      y[d + 2] += x[e] * v.z;
      y[d + 3] += x[e] * v.w;
    }
  }
}

// Rounds to fp16, pads to 32 and stores 64 bytes; y becomes the rounded numbers.
template <int kCount>
NAMM_DEVICE void store_padded(float (&y)[kCount], uint32_t* target) {
  uint32_t words[kPadded / 2];
#pragma unroll
  for (int i = 0; i < kPadded / 2; ++i) {
    const float low = 2 * i < kCount ? y[2 * i] : 0.0f;
    const float high = 2 * i + 1 < kCount ? y[2 * i + 1] : 0.0f;
    words[i] = pack2<fp16>(low, high);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    y[i] = to_float(fp16{static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16))});
  }
#pragma unroll
  for (int i = 0; i < kPadded / 2; i += 4) {
    *reinterpret_cast<uint4*>(target + i) =
        make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
  }
}

// Scores of inactive batch rows are zero. Every kernel below skips them.
NAMM_DEVICE bool row_is_active(const ScoreParams& p, const SegmentTile& tile) {
  return p.active[tile.segment / p.seg.num_kv_heads];
}

__global__ void __launch_bounds__(kBamThreads)
    bam_prep_kernel(const __grid_constant__ ScoreParams p, BamWorkspace work) {
  NAMM_SHARED(Folded, folded, 1);
  NAMM_SHARED(Normalisation, normalisation, 1);
  const SegmentTile tile = find_tile(p.seg, kBamThreads, blockIdx.x);
  if (tile.row >= tile.live) return;
  const int row = tile.row + static_cast<int>(threadIdx.x);
  const int64_t token = tile.start + row;
  if (!row_is_active(p, tile)) {
    if (row < tile.live) p.scores[token] = 0.0f;
    return;
  }
  const float* source =
      reinterpret_cast<const float*>(work.folded + tile.segment / p.seg.num_kv_heads);
  for (int i = static_cast<int>(threadIdx.x); i < static_cast<int>(sizeof(Folded) / 4);
       i += kBamThreads) {
    reinterpret_cast<float*>(folded)[i] = source[i];
  }
  load_normalisation(p, normalisation);
  __syncthreads();
  if (row >= tile.live) return;

  float x[kNumFeatures];
  const int age = p.pos[tile.start + tile.live - 1] - p.pos[token];
  token_features(p, *normalisation, p.state + token * kNumBins, age, x);
  float c = folded->c_bias;
#pragma unroll
  for (int d = 0; d < kNumFeatures; ++d) c += x[d] * folded->c_weight[d];
  work.c[token] = c;

  float y[Folded::kRow];
  affine(x, folded->g_weight, folded->g_bias, y);
  store_padded(y, work.g + token * (kPadded / 2));
  affine(x, folded->z_weight, folded->z_bias, y);
  store_padded(y, work.z + token * (kPadded / 2));
  store_padded(x, work.x + token * (kPadded / 2));
  float anchor = 0.0f;
#pragma unroll
  for (int d = 0; d < kNumFeatures; ++d) anchor += x[d] * y[d];
  work.anchor[token] = anchor;
}

__global__ void __launch_bounds__(kBamThreads, 2)
    bam_pairs_kernel(const __grid_constant__ ScoreParams p, BamWorkspace work) {
  NAMM_DYNAMIC_SHARED(shared);
  const SegmentTile tile = find_tile(p.seg, kBamRows, blockIdx.x);
  if (tile.row >= tile.live || !row_is_active(p, tile)) return;
  // Long blocks first: whole parts, remainders of more than half a part, the other remainders.
  const int32_t length = part_tokens(tile.live), num_whole = (tile.live - tile.row) / length;
  const int32_t remainder = (tile.live - tile.row) % length, turn = static_cast<int>(blockIdx.y);
  const int32_t part = min(turn, num_whole);
  const bool mine = turn < kBamParts
                        ? turn < num_whole
                        : remainder > 0 && (2 * remainder <= length) == turn - kBamParts;
  if (!mine) return;
  const int32_t begin = tile.row + part * length, end = min(begin + length, tile.live);
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int group = lane / 4, c = lane % 4;  // fragment row and column of this lane
  const int warp_row = tile.row + warp * kBamWarpRows;
  const bool warp_live = warp_row < tile.live;

  // A fragments of z and g, and what the accumulators start from.
  uint32_t z[kBamMTiles][2][4], g[kBamMTiles][2][4];
  float start[kBamMTiles][2], constant[kBamMTiles][2];
#pragma unroll
  for (int mt = 0; mt < kBamMTiles; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + mt * 16 + half * 8 + group;
      const bool live = row < tile.live;
      const int64_t token = tile.start + row;
      start[mt][half] = live ? -work.anchor[token] : 0.0f;
      constant[mt][half] = live ? work.c[token] : 0.0f;
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const int64_t word = token * (kPadded / 2) + step * 8 + side * 4 + c;
          z[mt][step][half + 2 * side] = live ? work.z[word] : 0u;
          g[mt][step][half + 2 * side] = live ? work.g[word] : 0u;
        }
      }
    }
  }

  // x tiles: tokens begin, begin + 64, ... Token r of a tile is a row of four 16-byte chunks;
  // chunk i sits at i ^ (r / 2 & 3), so that eight rows of one chunk fall into eight banks.
  const int num_tiles = (end - begin + kBamKeys - 1) / kBamKeys;
  const SharedAddress ring = shared_address(shared);
  auto issue = [&](int t) {
    if (t < num_tiles) {
      const SharedAddress target = ring + t % kBamStages * kBamTileBytes;
#pragma unroll
      for (int j = 0; j < kBamKeys * 4 / kBamThreads; ++j) {
        const int i = j * kBamThreads + thread, row = i / 4, chunk = i % 4;
        const int token = begin + t * kBamKeys + row;
        const bool valid = token < tile.live;
        const uint32_t* source =
            work.x + (tile.start + (valid ? token : tile.row)) * (kPadded / 2) + chunk * 4;
        cp_async<16>(target + row * 64 + ((chunk ^ (row >> 1 & 3)) << 4), source, valid);
      }
    }
    cp_async_commit();
  };

  float numerator[kBamMTiles][2] = {}, denominator[kBamMTiles][2] = {};
  // ldmatrix: lane i points at chunk i / 8 of token i % 8.
  const int x_row = lane & 7, x_chunk = lane >> 3;

  issue(0);
  issue(1);
  issue(2);
  for (int t = 0; t < num_tiles; ++t) {
    cp_async_wait<kBamStages - 2>();
    __syncthreads();
    issue(t + kBamStages - 1);
    const int first = begin + t * kBamKeys;
    // Tiles older than all rows of the warp are masked away entirely.
    if (!warp_live || first + kBamKeys <= warp_row) continue;
    const bool masked = first < warp_row + kBamWarpRows || first + kBamKeys > tile.live;
    const SharedAddress buffer = ring + t % kBamStages * kBamTileBytes;

    auto eight_tokens = [&](int n, auto is_masked) {
      const int row = n * 8 + x_row;
      uint32_t x[4];
      ldmatrix_x4(x, buffer + row * 64 + ((x_chunk ^ (row >> 1 & 3)) << 4));
      const int token = first + n * 8 + 2 * c;
#pragma unroll
      for (int mt = 0; mt < kBamMTiles; ++mt) {
        float s[4] = {start[mt][0], start[mt][0], start[mt][1], start[mt][1]};
        float u[4] = {constant[mt][0], constant[mt][0], constant[mt][1], constant[mt][1]};
        mma_m16n8k16<fp16>(s, z[mt][0], x[0], x[1]);
        mma_m16n8k16<fp16>(s, z[mt][1], x[2], x[3]);
        mma_m16n8k16<fp16>(u, g[mt][0], x[0], x[1]);
        mma_m16n8k16<fp16>(u, g[mt][1], x[2], x[3]);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float e = ex2(s[i]);
          if constexpr (is_masked.value) {
            const int j = token + (i & 1), own = warp_row + mt * 16 + (i >> 1) * 8 + group;
            const bool counts = j >= own && j < tile.live;
            e = counts ? e : 0.0f;
            u[i] = counts ? u[i] : 0.0f;
          }
          denominator[mt][i >> 1] += e;
          numerator[mt][i >> 1] += e * u[i];
        }
      }
    };
    if (masked) {
#pragma unroll 1
      for (int n = 0; n < kBamKeys / 8; ++n) eight_tokens(n, std::true_type());
    } else {
#pragma unroll 2
      for (int n = 0; n < kBamKeys / 8; ++n) eight_tokens(n, std::false_type());
    }
  }

#pragma unroll
  for (int mt = 0; mt < kBamMTiles; ++mt) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float num = numerator[mt][half], den = denominator[mt][half];
      num += __shfl_xor_sync(kFullMask, num, 1);
      den += __shfl_xor_sync(kFullMask, den, 1);
      num += __shfl_xor_sync(kFullMask, num, 2);
      den += __shfl_xor_sync(kFullMask, den, 2);
      const int row = warp_row + mt * 16 + half * 8 + group;
      if (c == 0 && row < tile.live) {
        work.sums[part * work.capacity + tile.start + row] = make_float2(num, den);
      }
    }
  }
}

// Running softmax of one lane.
struct RowSums {
  float top, num, den;
};

NAMM_DEVICE void add_pair(RowSums& r, float logit, float value) {
  const float top = fmaxf(r.top, logit);  // drops a NaN, which then reaches p
  const float keep = r.top == top ? 1.0f : exp2f(r.top - top), p = exp2f(logit - top);
  r.num = r.num * keep + p * value;
  r.den = r.den * keep + p;
  r.top = top;
}

template <bool kAllRows>
__global__ void __launch_bounds__(kBamThreads)
    bam_rows_kernel(const __grid_constant__ ScoreParams p, BamWorkspace work) {
  NAMM_SHARED(Normalisation, normalisation, 1);
  NAMM_SHARED(float, row_vectors, kBamWarps * 2 * kPadded);  // z and g of each warp's row
  const SegmentTile tile = find_tile(p.seg, kRowsPerBlock, blockIdx.x);
  if (tile.row >= tile.live) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int warp_row = tile.row + warp * kWarpSize;
  const bool active = row_is_active(p, tile);
  if (!active) {
    if (kAllRows && warp_row + lane < tile.live) {
      p.scores[tile.start + warp_row + lane] = 0.0f;
    }
    return;
  }
  load_normalisation(p, normalisation);
  __syncthreads();

  const Folded& folded = work.folded[tile.segment / p.seg.num_kv_heads];
  float* z = row_vectors + warp * 2 * kPadded;
  float* g = z + kPadded;
  bool todo = warp_row + lane < tile.live;
  if (!kAllRows && todo) {
    const int row = warp_row + lane, seen = tile.live - row / kBamRows * kBamRows;
    const int64_t token = tile.start + row;
    float num = 0.0f, den = 0.0f;
    for (int part = 0; part * part_tokens(tile.live) < seen; ++part) {
      const float2 sums = work.sums[part * work.capacity + token];
      num += sums.x;
      den += sums.y;
    }
    const float score = num / den;
    // The comparisons are false for NaN.
    todo = !(den <= kMaxDenominator && fabsf(score) <= 1e30f);
    p.scores[token] = score;
  }
  unsigned rows = __ballot_sync(kFullMask, todo);
  const int newest = p.pos[tile.start + tile.live - 1];

  while (rows != 0) {
    const int row = warp_row + __ffs(static_cast<int>(rows)) - 1;
    rows &= rows - 1;
    float x[kNumFeatures];
    const int64_t token = tile.start + row;
    token_features(p, *normalisation, p.state + token * kNumBins, newest - p.pos[token], x);
    float c = folded.c_bias;
#pragma unroll
    for (int d = 0; d < kNumFeatures; ++d) c += x[d] * folded.c_weight[d];
    __syncwarp();  // the vectors of the row before have been read
    if (lane < kNumFeatures) {
      float zd = folded.z_bias[lane], gd = folded.g_bias[lane];
#pragma unroll
      for (int e = 0; e < kNumFeatures; ++e) {
        zd += x[e] * folded.z_weight[e][lane];
        gd += x[e] * folded.g_weight[e][lane];
      }
      z[lane] = zd;
      g[lane] = gd;
    }
    __syncwarp();

    RowSums sums = {-INFINITY, 0.0f, 0.0f};
    for (int j = row + lane; j < tile.live; j += kWarpSize) {
      const int64_t other = tile.start + j;
      token_features(p, *normalisation, p.state + other * kNumBins, newest - p.pos[other], x);
      float logit = 0.0f, value = c;
#pragma unroll
      for (int d = 0; d < kNumFeatures; ++d) {
        logit += z[d] * x[d];
        value += g[d] * x[d];
      }
      add_pair(sums, logit, value);
    }
#pragma unroll
    for (int bits = 16; bits > 0; bits >>= 1) {
      const RowSums other = {__shfl_xor_sync(kFullMask, sums.top, bits),
                             __shfl_xor_sync(kFullMask, sums.num, bits),
                             __shfl_xor_sync(kFullMask, sums.den, bits)};
      const float top = fmaxf(sums.top, other.top);
      // Equal tops need no factor, and two lanes without a token have equal tops -inf.
      const float mine = sums.top == top ? 1.0f : exp2f(sums.top - top);
      const float theirs = other.top == top ? 1.0f : exp2f(other.top - top);
      sums = {top, sums.num * mine + other.num * theirs, sums.den * mine + other.den * theirs};
    }
    if (lane == 0) p.scores[token] = sums.num / sums.den;
  }
}

}  // namespace namm_ext::gpu
