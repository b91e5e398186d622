// compact: the kept rows of every segment, in order, into a new store.
//
// Mapping   block = 256 to 1024 rows of one segment. It counts the kept rows of its segment before
//           its own, lists its own in shared memory, then moves them with all threads side by side
//           over (row, vector), four vectors in flight per thread.
// Cost      2 * kept * row bytes, plus one byte per earlier row and block (from L2).
// Numerics  bytes are copied; the order is that of the rows, whatever the order of the blocks.
// Limits    num_kept is not read: the ranks come from keep. No write leaves its new slot.
#include "platform.cuh"

namespace namm_ext::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kMaxTileRows = 1024;
constexpr int kMaxGroups = kMaxTileRows / kThreads * kWarps;  // groups of 32 rows in a tile
constexpr int kUnroll = 4;
static_assert(kMaxGroups == kWarpSize, "one lane per group in the scan below");

// Bytes of x that are not 0.
NAMM_DEVICE int nonzero_bytes(uint32_t x) {
  x |= x >> 4;
  x |= x >> 2;
  x |= x >> 1;
  return __popc(x & 0x01010101u);
}

// This thread's share of the ones in keep[0, n).
NAMM_DEVICE int32_t count_share(const uint8_t* keep, int32_t n) {
  const auto misaligned = static_cast<int32_t>(reinterpret_cast<uintptr_t>(keep) % 16);
  const int32_t head = min(n, (16 - misaligned) % 16);
  const int32_t vectors = (n - head) / 16;
  const int32_t tail = head + vectors * 16;
  const auto* body = reinterpret_cast<const uint4*>(keep + head);
  const int32_t t = threadIdx.x;
  int32_t count = 0;
  if (t < head) count += keep[t] != 0;
  for (int32_t i = t; i < vectors; i += kThreads) {
    const uint4 x = body[i];
    count += nonzero_bytes(x.x) + nonzero_bytes(x.y) + nonzero_bytes(x.z) + nonzero_bytes(x.w);
  }
  if (t < n - tail) count += keep[tail + t] != 0;
  return count;
}

// Moves n rows of `units` Units: source row list[i] goes to row i of target.
template <class Unit>
NAMM_DEVICE void move_rows(void* target, const void* source, const int32_t* list, int32_t n,
                           int32_t units) {
  auto* to = static_cast<Unit*>(target);
  const auto* from = static_cast<const Unit*>(source);
  const int64_t total = int64_t{n} * units;
  for (int64_t first = threadIdx.x; first < total; first += kThreads * kUnroll) {
    Unit unit[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int64_t i = first + j * kThreads;
      if (i < total) {
        const auto row =
            static_cast<int32_t>(static_cast<uint32_t>(i) / static_cast<uint32_t>(units));
        unit[j] = from[int64_t{list[row]} * units + (i - int64_t{row} * units)];
      }
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      const int64_t i = first + j * kThreads;
      if (i < total) to[i] = unit[j];
    }
  }
}

template <class Unit>
__global__ __launch_bounds__(kThreads) void compact_kernel(const __grid_constant__ CompactParams p,
                                                           int tile_rows) {
  NAMM_SHARED(int32_t, list, kMaxTileRows);
  NAMM_SHARED(int32_t, before, kWarps);
  NAMM_SHARED(int32_t, group_count, kMaxGroups);

  const SegmentTile tile = find_tile(p.seg, tile_rows, blockIdx.x);
  if (tile.row >= tile.live) return;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const uint8_t* keep = p.keep + tile.start;

  int32_t earlier = count_share(keep, tile.row);
  for (int bits = 16; bits > 0; bits /= 2) earlier += __shfl_xor_sync(kFullMask, earlier, bits);
  if (lane == 0) before[warp] = earlier;

  // Ranks: within 32 rows by a ballot, then over the groups of 32 rows by a sum.
  unsigned ballots[kMaxTileRows / kThreads];
#pragma unroll
  for (int j = 0; j < kMaxTileRows / kThreads; ++j) {
    const int32_t in_tile = j * kThreads + threadIdx.x, row = tile.row + in_tile;
    const bool stays = in_tile < tile_rows && row < tile.live && keep[row] != 0;
    ballots[j] = __ballot_sync(kFullMask, stays);
    if (lane == 0) group_count[j * kWarps + warp] = __popc(ballots[j]);
  }
  __syncthreads();
  int32_t rank_before = 0;
  for (int w = 0; w < kWarps; ++w) rank_before += before[w];
  int32_t count = 0;
#pragma unroll
  for (int j = 0; j < kMaxTileRows / kThreads; ++j) {
    int32_t group_first = 0;
    for (int i = 0; i < j * kWarps + warp; ++i) group_first += group_count[i];
    if (ballots[j] >> lane & 1u) {
      list[group_first + __popc(ballots[j] & ((1u << lane) - 1u))] =
          static_cast<int32_t>(j * kThreads + threadIdx.x);
    }
  }
  for (int i = 0; i < kMaxGroups; ++i) count += group_count[i];
  __syncthreads();  // the list is complete

  const int64_t from = tile.start + tile.row;
  const int64_t to = int64_t{p.cu_seqlens_new[tile.segment]} + rank_before;
  const int64_t room = p.cu_seqlens_new[tile.segment + 1] - to;
  const auto n = static_cast<int32_t>(max(int64_t{0}, min(int64_t{count}, room)));
  move_rows<Unit>(static_cast<char*>(p.k_out) + to * p.k_row_bytes,
                  static_cast<const char*>(p.k) + from * p.k_row_bytes, list, n,
                  static_cast<int32_t>(p.k_row_bytes / static_cast<int64_t>(sizeof(Unit))));
  move_rows<Unit>(static_cast<char*>(p.v_out) + to * p.v_row_bytes,
                  static_cast<const char*>(p.v) + from * p.v_row_bytes, list, n,
                  static_cast<int32_t>(p.v_row_bytes / static_cast<int64_t>(sizeof(Unit))));
  move_rows<int32_t>(p.pos_out + to, p.pos + from, list, n, 1);
  if (p.num_state > 0) {
    move_rows<float>(p.state_out + to * p.num_state, p.state + from * p.num_state, list, n,
                     p.num_state);
  }
}

}  // namespace

Status launch_compact(const CompactParams& p, const Launch& config) {
  // Longer tiles where the store is long: a block reads every keep byte before its own.
  const int64_t wanted = config.capacity / 1024 / kThreads * kThreads;
  const int tile_rows = static_cast<int>(wanted < kThreads       ? kThreads
                                         : wanted > kMaxTileRows ? kMaxTileRows
                                                                 : wanted);
  const uintptr_t bits =
      reinterpret_cast<uintptr_t>(p.k) | reinterpret_cast<uintptr_t>(p.v) |
      reinterpret_cast<uintptr_t>(p.k_out) | reinterpret_cast<uintptr_t>(p.v_out) |
      static_cast<uintptr_t>(p.k_row_bytes) | static_cast<uintptr_t>(p.v_row_bytes);
  auto* kernel = bits % 16 == 0  ? compact_kernel<uint4>
                 : bits % 4 == 0 ? compact_kernel<uint32_t>
                                 : compact_kernel<uint16_t>;
  return launch(kernel, dim3(num_tiles(p.seg, config.capacity, tile_rows)), dim3(kThreads), 0,
                config.stream, p, tile_rows);
}

}  // namespace namm_ext::gpu
