// attend_ on tensor cores, bf16 and fp16.
//
// Mapping   prefill: block = 128 packed query rows of one segment (64 for D > 128), 16 per warp;
//           all warps read the same key tiles. decode: block = 16 query rows and one part of a
//           segment's keys, 16 of every 64 keys per warp; parts join in combine_kernel.
//           Queries are the A operand and stay in registers (D > 128: in shared memory), K and V
//           stream through cp.async stages; the accumulator of Q K^T is the A operand of P V.
// Cost      2 * rows * keys * (D + Dv) multiply-adds; prefill reads K and V once per 128 rows,
//           decode once in all.
// Numerics  products of the inputs are exact, sums float; probabilities are rounded to the input
//           type before P V, their sum is not. Visibility is a select, keys nobody sees are zeros.
// Limits    D and Dv multiples of 8 up to kHeadDim; rows and strides in 16-byte steps.
#pragma once

#include "attend.cuh"

namespace namm_ext::gpu {

// Tiles of 16-bit rows in shared memory. 16-byte vectors are permuted inside a row, so that the
// eight rows of an ldmatrix lie in different banks; the pitch is a power of two for that.
template <int kHeadDim>
struct TileLayout {
  static constexpr int kVectors = kHeadDim / 8;
  static constexpr int kPitch = kHeadDim <= 64 ? 128 : kHeadDim <= 128 ? 256 : 512;
  static_assert(kHeadDim % 16 == 0 && kHeadDim * 2 <= kPitch, "a row fits its pitch");

  static NAMM_DEVICE SharedAddress at(SharedAddress tile, int row, int vector) {
    return tile + row * kPitch + ((vector ^ (row & 7)) << 4);
  }
};

template <int kHeadDim>
struct PrefillShape {
  static constexpr int kWarps = kHeadDim > 128 ? 4 : 8;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = 16 * kWarps;
  static constexpr int kKeys = kHeadDim > 128 ? 32 : 64;
  static constexpr int kStages = 2;
  static constexpr bool kQueriesInRegisters = kHeadDim <= 128;
  static constexpr int kQueryBytes = kRows * TileLayout<kHeadDim>::kPitch;
  static constexpr int kTileBytes = kKeys * TileLayout<kHeadDim>::kPitch;
  static constexpr int kSharedBytes = kQueryBytes + 2 * kStages * kTileBytes;
  static_assert(kSharedBytes <= 99 * 1024, "what a block of sm_86 and sm_89 may have");
};

template <int kHeadDim>
struct DecodeShape {
  static constexpr int kWarps = kHeadDim > 128 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kRows = 16;
  static constexpr int kKeys = 16 * kWarps;
  static constexpr int kStages = 3;
  static constexpr int kTileBytes = kKeys * TileLayout<kHeadDim>::kPitch;
  static constexpr int kSharedBytes = 2 * kStages * kTileBytes;
  // Of a row where the warps' results meet: four rows of a fragment begin in different banks.
  static constexpr int kMergePitch = kHeadDim + 8;
  static constexpr int kMergeFloats = kWarps * kRows * (kMergePitch + 2);
  static_assert(kRows * TileLayout<kHeadDim>::kPitch <= 2 * kTileBytes, "queries fit one stage");
  static_assert(kMergeFloats * 4 <= kSharedBytes, "the warps' results fit the stages");
  static_assert(kSharedBytes <= 99 * 1024, "what a block of sm_86 and sm_89 may have");
};

// Starts copies of kRows rows of `dim` elements, row stride dim; rows from `valid` on and columns
// from `dim` on become zeros.
template <class T, int kHeadDim, int kRows, int kThreads>
NAMM_DEVICE void load_rows(SharedAddress tile, const T* source, int32_t valid, int dim) {
  using Layout = TileLayout<kHeadDim>;
  constexpr int kCopies = kRows * Layout::kVectors / kThreads;
  static_assert(kCopies * kThreads == kRows * Layout::kVectors, "every thread has equally many");
  // More would be spilled, or take the registers of another block.
  constexpr int kUnroll = kHeadDim <= 64 || kHeadDim > 128 ? 2 : kCopies;
#pragma unroll kUnroll
  for (int j = 0; j < kCopies; ++j) {
    const int i = j * kThreads + static_cast<int>(threadIdx.x);
    const int row = i / Layout::kVectors, vector = i % Layout::kVectors;
    const bool exists = row < valid && vector * 8 < dim;
    cp_async<16>(Layout::at(tile, row, vector),
                 exists ? source + int64_t{row} * dim + vector * 8 : source, exists);
  }
}

// The same for packed query rows [row_first, row_first + kRows).
template <class T, int kHeadDim, int kRows, int kThreads>
NAMM_DEVICE void load_queries(SharedAddress tile, const AttendParams& p, const QueryRows& rows,
                              int32_t row_first) {
  using Layout = TileLayout<kHeadDim>;
  for (int i = threadIdx.x; i < kRows * Layout::kVectors; i += kThreads) {
    const int row = i / Layout::kVectors, vector = i % Layout::kVectors;
    const bool exists = row_first + row < rows.count && vector * 8 < p.head_dim;
    const T* source = query_row<T>(p, rows, exists ? row_first + row : 0);
    cp_async<16>(Layout::at(tile, row, vector), exists ? source + vector * 8 : source, exists);
  }
}

// A operand of k-step `step`: rows [row, row + 16) of a tile.
template <int kHeadDim>
NAMM_DEVICE void load_a(uint32_t (&a)[4], SharedAddress tile, int row, int step) {
  const int lane = threadIdx.x % kWarpSize;
  ldmatrix_x4(a, TileLayout<kHeadDim>::at(tile, row + lane % 16, 2 * step + lane / 16));
}

// Online softmax of 16 query rows; this thread has columns of rows lane / 4 and lane / 4 + 8.
template <int kHeadDim>
struct RowState {
  float max[2], sum[2];  // sum: of this thread's columns only
  float out[kHeadDim / 8][4];

  NAMM_DEVICE void clear() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      max[h] = -INFINITY;
      sum[h] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) out[n][j] = 0.0f;
    }
  }

  // The four lanes of a row add their sums.
  NAMM_DEVICE void finish() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(kFullMask, sum[h], 1);
      sum[h] += __shfl_xor_sync(kFullMask, sum[h], 2);
    }
  }
};

// Adds keys [key, key + kKeys) of the tiles k and v to the state of a warp's 16 rows. get_a(a,
// step) provides the queries. limit: number of keys of the tile that each of the two rows sees.
template <bool kCapped, class T, int kHeadDim, int kKeys, class GetA>
NAMM_DEVICE void attend_tile(RowState<kHeadDim>& state, const GetA& get_a, SharedAddress k,
                             SharedAddress v, int key, float scale_log2, SoftCap cap, bool masked,
                             const int32_t (&limit)[2]) {
  using Layout = TileLayout<kHeadDim>;
  static_assert(kKeys % 16 == 0, "an mma takes 16 keys");
  const int lane = threadIdx.x % kWarpSize;

  float s[kKeys / 8][4];
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) s[n][j] = 0.0f;
  }
  // Fully unrolled where get_a indexes registers.
  constexpr int kUnroll = kHeadDim > 128 && kKeys > 16 ? 2 : kHeadDim / 16;
#pragma unroll kUnroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    uint32_t a[4];
    get_a(a, step);
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      // Keys are the rows: matrices (keys, d), (keys, d + 8), (keys + 8, d), (keys + 8, d + 8).
      uint32_t b[4];
      ldmatrix_x4(b,
                  Layout::at(k, key + n * 16 + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
      mma_m16n8k16<T>(s[2 * n], a, b[0], b[1]);
      mma_m16n8k16<T>(s[2 * n + 1], a, b[2], b[3]);
    }
  }

  if constexpr (kCapped) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[n][j] = cap(s[n][j]);
    }
  }
  float tile_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      s[n][j] *= scale_log2;
      if (masked && key + n * 8 + lane % 4 * 2 + j % 2 >= limit[j / 2]) s[n][j] = -INFINITY;
      tile_max[j / 2] = fmaxf(tile_max[j / 2], s[n][j]);
    }
  }
  float base[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    tile_max[h] = fmaxf(tile_max[h], __shfl_xor_sync(kFullMask, tile_max[h], 1));
    tile_max[h] = fmaxf(tile_max[h], __shfl_xor_sync(kFullMask, tile_max[h], 2));
    const float max = fmaxf(state.max[h], tile_max[h]);
    base[h] = safe_max(max);
    const float shrink = ex2(state.max[h] - base[h]);
    state.max[h] = max;
    state.sum[h] *= shrink;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      state.out[n][2 * h] *= shrink;
      state.out[n][2 * h + 1] *= shrink;
    }
  }
#pragma unroll
  for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      s[n][j] = ex2(s[n][j] - base[j / 2]);
      state.sum[j / 2] += s[n][j];
    }
  }

#pragma unroll
  for (int step = 0; step < kKeys / 16; ++step) {
    const uint32_t a[4] = {pack2<T>(s[2 * step][0], s[2 * step][1]),
                           pack2<T>(s[2 * step][2], s[2 * step][3]),
                           pack2<T>(s[2 * step + 1][0], s[2 * step + 1][1]),
                           pack2<T>(s[2 * step + 1][2], s[2 * step + 1][3])};
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      // Keys are the rows, read transposed: (keys, d), (keys + 8, d), (keys, d + 8), (both + 8).
      uint32_t b[4];
      ldmatrix_x4_trans(b, Layout::at(v, key + step * 16 + lane % 16, 2 * n + lane / 16));
      mma_m16n8k16<T>(state.out[2 * n], a, b[0], b[1]);
      mma_m16n8k16<T>(state.out[2 * n + 1], a, b[2], b[3]);
    }
  }
}

template <class T, int kHeadDim, bool kCapped>
__global__ __launch_bounds__(PrefillShape<kHeadDim>::kThreads) void attend_prefill_kernel(
    const __grid_constant__ AttendParams p, int row_tiles) {
  using Shape = PrefillShape<kHeadDim>;
  NAMM_DYNAMIC_SHARED(shared);

  // Late rows first: they see the most keys.
  const int segment = blockIdx.x / row_tiles;
  const int32_t row_first = (row_tiles - 1 - blockIdx.x % row_tiles) * Shape::kRows;
  const QueryRows rows = query_rows(p, segment);
  if (row_first >= rows.count) return;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t start = p.seg.cu_seqlens_k[segment];
  const int32_t live = p.seg.seqused_k[segment];
  const int32_t* pos = p.pos + start;
  const T* k = static_cast<const T*>(p.k) + start * p.head_dim;
  const T* v = static_cast<const T*>(p.v) + start * p.head_dim_v;

  // Keys that all rows of the block see, that some row sees, and that this thread's rows see.
  const int32_t row_last = min(row_first + Shape::kRows, rows.count) - 1;
  const int32_t seen_by_all = count_visible(pos, live, rows.pos_first + row_first / p.num_groups);
  const int32_t seen = count_visible(pos, live, rows.pos_first + row_last / p.num_groups);
  int32_t row_seen[2];
  for (int h = 0; h < 2; ++h) {
    const int32_t row = min(row_first + warp * 16 + lane / 4 + 8 * h, row_last);
    row_seen[h] = count_visible(pos, live, rows.pos_first + row / p.num_groups);
  }

  const SharedAddress q_tile = shared_address(shared);
  const SharedAddress kv_tiles = q_tile + Shape::kQueryBytes;
  const auto load_tile = [&](int32_t tile) {
    const SharedAddress k_tile = kv_tiles + tile % Shape::kStages * 2 * Shape::kTileBytes;
    const int32_t key = tile * Shape::kKeys;
    load_rows<T, kHeadDim, Shape::kKeys, Shape::kThreads>(k_tile, k + int64_t{key} * p.head_dim,
                                                          seen - key, p.head_dim);
    load_rows<T, kHeadDim, Shape::kKeys, Shape::kThreads>(
        k_tile + Shape::kTileBytes, v + int64_t{key} * p.head_dim_v, seen - key, p.head_dim_v);
  };

  load_queries<T, kHeadDim, Shape::kRows, Shape::kThreads>(q_tile, p, rows, row_first);
  cp_async_commit();
  const int32_t num_tiles = (seen + Shape::kKeys - 1) / Shape::kKeys;
  if (num_tiles > 0) load_tile(0);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();  // the queries are there

  uint32_t q[Shape::kQueriesInRegisters ? kHeadDim / 16 : 1][4];
  if constexpr (Shape::kQueriesInRegisters) {
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      load_a<kHeadDim>(q[step], q_tile, warp * 16, step);
    }
  }
  const auto get_a = [&](uint32_t (&a)[4], int step) {
    if constexpr (Shape::kQueriesInRegisters) {
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = q[step][j];
    } else {
      load_a<kHeadDim>(a, q_tile, warp * 16, step);
    }
  };

  RowState<kHeadDim> state;
  state.clear();
  const float scale_log2 = p.softmax_scale * kLog2E;
  const SoftCap cap(p.softcap, p.softmax_scale);
  for (int32_t tile = 0; tile < num_tiles; ++tile) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there for all, and nobody reads the other stage any more
    if (tile + 1 < num_tiles) load_tile(tile + 1);
    cp_async_commit();
    const SharedAddress k_tile = kv_tiles + tile % Shape::kStages * 2 * Shape::kTileBytes;
    const int32_t key = tile * Shape::kKeys;
    const int32_t limit[2] = {row_seen[0] - key, row_seen[1] - key};
    attend_tile<kCapped, T, kHeadDim, Shape::kKeys>(state, get_a, k_tile,
                                                    k_tile + Shape::kTileBytes, 0, scale_log2, cap,
                                                    key + Shape::kKeys > seen_by_all, limit);
  }
  state.finish();

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t row = row_first + warp * 16 + lane / 4 + 8 * h;
    if (row >= rows.count) continue;
    const float factor = normaliser(state.sum[h]);
    T* out = out_row<T>(p, rows, row);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      if (n * 8 >= p.head_dim_v) continue;
      *reinterpret_cast<uint32_t*>(out + n * 8 + lane % 4 * 2) =
          pack2<T>(state.out[n][2 * h] * factor, state.out[n][2 * h + 1] * factor);
    }
    if (lane % 4 == 0) *lse_of_row(p, rows, row) = natural_lse(state.max[h], state.sum[h]);
  }
}

template <class T, int kHeadDim, bool kCapped>
__global__ __launch_bounds__(DecodeShape<kHeadDim>::kThreads) void attend_decode_kernel(
    const __grid_constant__ AttendParams p, const Partials partials) {
  using Shape = DecodeShape<kHeadDim>;
  NAMM_DYNAMIC_SHARED(shared);

  const Chunk chunk = find_chunk(p.seg, partials.places, blockIdx.x);
  const QueryRows rows = query_rows(p, chunk.segment);
  const int32_t row_first = blockIdx.y * Shape::kRows;
  if (!chunk.exists || row_first >= rows.count) return;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int32_t* pos = p.pos + chunk.start;
  const T* k = static_cast<const T*>(p.k) + chunk.start * p.head_dim;
  const T* v = static_cast<const T*>(p.v) + chunk.start * p.head_dim_v;

  const int32_t row_last = min(row_first + Shape::kRows, rows.count) - 1;
  const int32_t seen_by_all =
      count_visible(pos, chunk.live, rows.pos_first + row_first / p.num_groups);
  const int32_t end =
      min(chunk.end, count_visible(pos, chunk.live, rows.pos_first + row_last / p.num_groups));
  int32_t row_seen[2];
  for (int h = 0; h < 2; ++h) {
    const int32_t row = min(row_first + lane / 4 + 8 * h, row_last);
    row_seen[h] =
        min(chunk.end, count_visible(pos, chunk.live, rows.pos_first + row / p.num_groups));
  }

  const SharedAddress stages = shared_address(shared);
  const auto stage_of = [&](int32_t tile) {
    return stages + tile % Shape::kStages * 2 * Shape::kTileBytes;
  };
  const int32_t num_tiles = (max(0, end - chunk.begin) + Shape::kKeys - 1) / Shape::kKeys;
  const auto load_tile = [&](int32_t tile) {
    const int32_t key = chunk.begin + tile * Shape::kKeys;
    load_rows<T, kHeadDim, Shape::kKeys, Shape::kThreads>(
        stage_of(tile), k + int64_t{key} * p.head_dim, end - key, p.head_dim);
    load_rows<T, kHeadDim, Shape::kKeys, Shape::kThreads>(stage_of(tile) + Shape::kTileBytes,
                                                          v + int64_t{key} * p.head_dim_v,
                                                          end - key, p.head_dim_v);
  };

  // The queries pass through the last stage, which the loop fills only after its first barrier.
  const SharedAddress q_tile = stage_of(Shape::kStages - 1);
  load_queries<T, kHeadDim, Shape::kRows, Shape::kThreads>(q_tile, p, rows, row_first);
  cp_async_commit();
#pragma unroll
  for (int tile = 0; tile < Shape::kStages - 1; ++tile) {
    if (tile < num_tiles) load_tile(tile);
    cp_async_commit();
  }
  cp_async_wait<Shape::kStages - 1>();
  __syncthreads();  // the queries are there
  uint32_t q[kHeadDim / 16][4];
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) load_a<kHeadDim>(q[step], q_tile, 0, step);
  const auto get_a = [&](uint32_t (&a)[4], int step) {
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] = q[step][j];
  };

  RowState<kHeadDim> state;
  state.clear();
  const float scale_log2 = p.softmax_scale * kLog2E;
  const SoftCap cap(p.softcap, p.softmax_scale);
  for (int32_t tile = 0; tile < num_tiles; ++tile) {
    cp_async_wait<Shape::kStages - 2>();
    __syncthreads();  // the tile is there for all, and nobody reads the stage to fill any more
    if (tile + Shape::kStages - 1 < num_tiles) load_tile(tile + Shape::kStages - 1);
    cp_async_commit();
    const int32_t key = chunk.begin + tile * Shape::kKeys;
    const int32_t limit[2] = {row_seen[0] - key, row_seen[1] - key};
    attend_tile<kCapped, T, kHeadDim, 16>(
        state, get_a, stage_of(tile), stage_of(tile) + Shape::kTileBytes, warp * 16, scale_log2,
        cap, key + Shape::kKeys > min(seen_by_all, chunk.end), limit);
  }
  state.finish();

  // The warps' results meet in shared memory and are added in the order of the warps.
  cp_async_wait<0>();
  __syncthreads();                                    // nobody reads the stages any more
  auto* warp_out = reinterpret_cast<float*>(shared);  // [kWarps][kRows][kMergePitch]
  float* warp_max =
      warp_out + Shape::kWarps * Shape::kRows * Shape::kMergePitch;  // [kWarps][kRows]
  float* warp_sum = warp_max + Shape::kWarps * Shape::kRows;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp * Shape::kRows + lane / 4 + 8 * h;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(warp_out + row * Shape::kMergePitch + n * 8 + lane % 4 * 2) =
          make_float2(state.out[n][2 * h], state.out[n][2 * h + 1]);
    }
    if (lane % 4 == 0) {
      warp_max[row] = state.max[h];
      warp_sum[row] = state.sum[h];
    }
  }
  __syncthreads();
  for (int32_t i = warp; i <= row_last - row_first; i += Shape::kWarps) {
    float max = -INFINITY;
    for (int w = 0; w < Shape::kWarps; ++w) max = fmaxf(max, warp_max[w * Shape::kRows + i]);
    float weight[Shape::kWarps], sum = 0.0f;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      weight[w] = ex2(warp_max[w * Shape::kRows + i] - safe_max(max));
      sum += weight[w] * warp_sum[w * Shape::kRows + i];
    }
    const int32_t row = row_first + i;
    const int64_t part = int64_t{blockIdx.x} * partials.rows_per_part + row;
    const float factor = chunk.whole ? normaliser(sum) : 1.0f;
    for (int d = lane; d < p.head_dim_v; d += kWarpSize) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < Shape::kWarps; ++w) {
        total += weight[w] * warp_out[(w * Shape::kRows + i) * Shape::kMergePitch + d];
      }
      if (chunk.whole) {
        out_row<T>(p, rows, row)[d] = from_float<T>(total * factor);
      } else {
        partials.out[part * p.head_dim_v + d] = total;
      }
    }
    if (lane == 0) {
      if (chunk.whole) {
        *lse_of_row(p, rows, row) = natural_lse(max, sum);
      } else {
        partials.max_sum[part] = make_float2(max, sum);
      }
    }
  }
}

}  // namespace namm_ext::gpu
