// What the attention kernels share: which query rows a block has, which keys they see, and the
// parts of a long segment that decoding works on.
//
// The G query heads of a KV head read the same keys, so they are packed: query row r of a segment
// is column first + r / G of head h * G + r % G.
#pragma once

#include "platform.cuh"

namespace namm_ext::gpu {

// Keys of a segment that one block of a split attention reads. It depends on the segment's own
// length only, so a result does not change with the batch around it.
constexpr int kMinChunk = 256;
NAMM_DEVICE int32_t chunk_rows(int32_t live) {
  return live <= 8192 ? kMinChunk : live <= 65536 ? 2 * kMinChunk : 4 * kMinChunk;
}

struct QueryRows {
  int32_t batch, head, first, pos_first;  // head: first query head of the segment
  int32_t count;                          // num_new * G
};

NAMM_DEVICE QueryRows query_rows(const AttendParams& p, int segment) {
  const int b = segment / p.seg.num_kv_heads;
  const int32_t first = p.first[b];
  const int32_t columns = max(0, min(p.num_new[b], p.num_cols - first));
  return {b, segment % p.seg.num_kv_heads * p.num_groups, first, p.pos_first[b],
          columns * p.num_groups};
}

// Number of live rows a query at query_pos sees: those are the oldest ones. New tokens stand at
// consecutive positions at the end of a segment, so the first guess is nearly always right.
NAMM_DEVICE int32_t count_visible(const int32_t* pos, int32_t live, int32_t query_pos) {
  if (live == 0) return 0;
  const int32_t newest = pos[live - 1];
  if (newest <= query_pos) return live;
  const int64_t guess = live - (int64_t{newest} - query_pos);
  if (guess >= 1 && pos[guess - 1] == query_pos) return static_cast<int32_t>(guess);
  int32_t low = 0, high = live - 1;  // row low - 1 is visible, row high is not
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (pos[middle] <= query_pos) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// Where the parts of segments have their place: part i of segment s is tile i of find_tile with
// these arguments.
struct Places {
  int32_t shift, extra;  // 2^shift rows
};
// Ways that give a segment of any length enough places, live / rows + extra of them. The more rows
// to a place, the fewer of them long segments take, and the more are lost on short ones.
constexpr Places kPlaces[] = {{8, 1}, {9, 17}, {10, 65}};
static_assert(kMinChunk == 1 << 8, "the shortest parts have a place each");

// Unnormalised results of the parts of a segment, joined by combine_kernel.
struct Partials {
  float* out;       // [parts, rows_per_part, Dv]
  float2* max_sum;  // [parts, rows_per_part] maximum of the base-2 logits, sum of 2^(logit - max)
  int32_t rows_per_part;  // L * G
  Places places;
};

// Part of a segment: keys [begin, end). `whole` if it is the only one.
struct Chunk {
  int32_t segment, live, begin, end;
  int64_t start;
  bool whole, exists;
};

NAMM_DEVICE Chunk find_chunk(const Segments& seg, const Places& places, int number) {
  const SegmentTile tile = find_tile(seg, 1u << places.shift, number, places.extra);
  const int32_t rows = chunk_rows(tile.live);
  // The first part exists even without keys: it writes the result of a query that sees nothing.
  const int64_t begin = int64_t{tile.row >> places.shift} * rows;
  const bool exists = begin == 0 || begin < tile.live;
  return {tile.segment,
          tile.live,
          exists ? static_cast<int32_t>(begin) : 0,
          exists ? static_cast<int32_t>(min(begin + rows, int64_t{tile.live})) : 0,
          tile.start,
          tile.live <= rows,
          exists};
}

template <class T>
NAMM_DEVICE const T* query_row(const AttendParams& p, const QueryRows& rows, int32_t r) {
  return static_cast<const T*>(p.q) + rows.batch * p.q_strides[0] +
         (rows.head + r % p.num_groups) * p.q_strides[1] +
         (rows.first + r / p.num_groups) * p.q_strides[2];
}

template <class T>
NAMM_DEVICE T* out_row(const AttendParams& p, const QueryRows& rows, int32_t r) {
  return static_cast<T*>(p.out) + rows.batch * p.out_strides[0] +
         (rows.first + r / p.num_groups) * p.out_strides[1] +
         (rows.head + r % p.num_groups) * p.out_strides[2];
}

NAMM_DEVICE float* lse_of_row(const AttendParams& p, const QueryRows& rows, int32_t r) {
  return p.lse + rows.batch * p.lse_strides[0] + (rows.head + r % p.num_groups) * p.lse_strides[1] +
         (rows.first + r / p.num_groups) * p.lse_strides[2];
}

// max: of the base-2 logits; sum: of 2^(logit - max). An empty row has sum 0.
NAMM_DEVICE float natural_lse(float max, float sum) {
  return sum == 0.0f ? -INFINITY : (max + fast_log2(sum)) * kLn2;
}
NAMM_DEVICE float normaliser(float sum) { return sum == 0.0f ? 0.0f : 1.0f / sum; }
// The maximum to subtract: any finite number does where nothing was seen.
NAMM_DEVICE float safe_max(float max) { return max == -INFINITY ? 0.0f : max; }

}  // namespace namm_ext::gpu
