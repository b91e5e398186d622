// select: which rows stay.
//
// Mapping   block = 2,048 rows of a segment. One launch counts the rows that may stay; where a
//           budget or fill can cut them, six find the cut of each group (a segment, or the segments
//           of a batch row that share a budget); one writes keep. A cut is a radix select over one
//           64-bit integer per row (forced, score, position) from the top, eleven bits a launch:
//           every block adds its counts of a digit to the group's, and the blocks of the next
//           launch find the digit in them. Groups that are decided are left alone.
// Cost      8 bytes per row and launch; at random scores three of the six look at rows.
// Numerics  none: the order of the integers is the rule, so every device decides alike. Integer
//           counts only; equal integers go to the earlier segment.
// Limits    positions are not negative and increase inside a segment, cache_size is -1 or at
// least 1.
#include "platform.cuh"

namespace namm_ext::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kTileRows = 2048;
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsPerThread = kBins / kThreads;
constexpr int kLevels = (64 + kDigitBits - 1) / kDigitBits;

// Bits below digit number `level`; the last digit is shorter.
NAMM_DEVICE int shift_of(int level) { return max(64 - kDigitBits * (level + 1), 0); }

// Greater means it stays longer. The newest row of a segment is above all others.
constexpr uint64_t kNewest = ~uint64_t{0};

struct Segment {
  int64_t start;
  int32_t live, newest_pos;
};

NAMM_DEVICE Segment segment_of(const SelectParams& p, int s) {
  const int64_t start = p.seg.cu_seqlens_k[s];
  const int32_t live = p.seg.seqused_k[s];
  return {start, live, live > 0 ? p.pos[start + live - 1] : 0};
}

NAMM_DEVICE bool is_forced(const SelectParams& p, const Segment& seg, int32_t i, int32_t pos) {
  return pos < p.sink_tokens || int64_t{seg.newest_pos} - pos < p.recent_tokens ||
         (p.protect_newest && i == seg.live - 1);
}

NAMM_DEVICE bool is_candidate(const SelectParams& p, const Segment& seg, int32_t i) {
  return p.scores[seg.start + i] >= p.threshold || is_forced(p, seg, i, p.pos[seg.start + i]);
}

// 1 bit forced, 32 bits score, 31 bits position.
NAMM_DEVICE uint64_t key_of(const SelectParams& p, const Segment& seg, int32_t i) {
  if (p.protect_newest && i == seg.live - 1) return kNewest;
  const int32_t pos = p.pos[seg.start + i];
  uint32_t bits = __float_as_uint(p.scores[seg.start + i] + 0.0f);  // -0 becomes +0
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  const uint64_t forced = is_forced(p, seg, i, pos);
  return forced << 63 | uint64_t{bits} << 31 | (static_cast<uint32_t>(pos) & 0x7fffffffu);
}

// Where the cut of a group lies. Rows with key >> shift above `prefix` stay, and of those with
// key >> shift == prefix `remaining`.
enum class Stays : int32_t { kAll, kCandidates, kOpen, kEqual, kFirstEqual };
struct Cut {
  uint64_t prefix;
  int32_t remaining, shift;
  Stays stays;  // kOpen: not found yet. kEqual: all with that prefix; kFirstEqual: the first ones
};

// Scratch memory. counts and histograms begin as zeros.
struct Workspace {
  unsigned long long* counts;  // [S] rows that may stay, and NaN scores from bit 32 on
  int32_t* histograms;         // [groups][kLevels][kBins]
  Cut* cuts;                   // [groups][kLevels], before each level
};

// Rows of a segment that may stay, or -1 if a score is NaN.
NAMM_DEVICE int64_t count_of(const Workspace& work, int s) {
  const unsigned long long count = work.counts[s];
  return count >> 32 ? -1 : static_cast<int64_t>(count);
}

__global__ __launch_bounds__(kThreads) void count_kernel(const __grid_constant__ SelectParams p,
                                                         const Workspace work) {
  const SegmentTile tile = find_tile(p.seg, kTileRows, blockIdx.x);
  if (tile.row == 0 && threadIdx.x == 0) p.num_kept[tile.segment] = 0;
  if (tile.row >= tile.live || !p.active[tile.segment / p.seg.num_kv_heads]) return;
  const Segment seg = segment_of(p, tile.segment);
  unsigned long long count = 0;
  const int32_t end = min(tile.row + kTileRows, tile.live);
  for (int32_t i = tile.row + threadIdx.x; i < end; i += kThreads) {
    const float score = p.scores[seg.start + i];
    count += is_candidate(p, seg, i) + (static_cast<unsigned long long>(score != score) << 32);
  }
  for (int bits = 16; bits > 0; bits /= 2) count += __shfl_xor_sync(kFullMask, count, bits);
  if (threadIdx.x % kWarpSize == 0 && count > 0) atomicAdd(&work.counts[tile.segment], count);
}

// The segments [first, last) that share a budget.
struct Group {
  int index, first, last;
};

template <bool kShared>
NAMM_DEVICE Group group_of(const SelectParams& p, int segment) {
  const int heads = p.seg.num_kv_heads;
  if (!kShared) return {segment, segment, segment + 1};
  return {segment / heads, segment / heads * heads, (segment / heads + 1) * heads};
}

// What the rule says without looking at rows. Segments with a NaN are left out.
NAMM_DEVICE Cut first_cut(const SelectParams& p, const Workspace& work, const Group& group) {
  int64_t candidates = 0, live = 0;
  for (int s = group.first; s < group.last; ++s) {
    const int64_t count = count_of(work, s);
    if (count < 0) continue;
    candidates += count;
    live += p.seg.seqused_k[s];
  }
  int64_t wanted = candidates;
  if (p.cache_size >= 0) {
    wanted = min(wanted, int64_t{p.cache_size} * (group.last - group.first));
  }
  if (p.fill) {  // budget is per head
    const int row = group.first / p.seg.num_kv_heads * p.seg.num_kv_heads;
    for (int s = row; s < row + p.seg.num_kv_heads; ++s) {
      const int64_t other = count_of(work, s);
      wanted = max(wanted, p.cache_size >= 0 ? min(other, int64_t{p.cache_size}) : other);
    }
  }
  if (wanted >= live) return {0, 0, 0, Stays::kAll};
  return {0, static_cast<int32_t>(wanted), 64,
          wanted == candidates ? Stays::kCandidates : Stays::kOpen};
}

// The cut before a level, for every thread of the block: from the one before the level before and
// the counts of that level's digit.
NAMM_DEVICE Cut cut_before(const SelectParams& p, const Workspace& work, const Group& group,
                           int level) {
  NAMM_SHARED(int32_t, sums, kWarps);
  NAMM_SHARED(Cut, found, 1);
  if (level == 0) return first_cut(p, work, group);
  const int64_t place = int64_t{group.index} * kLevels + level - 1;
  const Cut cut = work.cuts[place];
  if (cut.stays != Stays::kOpen) return cut;

  // Thread 0 has the greatest digits.
  const int thread = threadIdx.x, warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int top = kBins - 1 - thread * kBinsPerThread;
  const int32_t* histogram = work.histograms + place * kBins;
  int32_t counts[kBinsPerThread], mine = 0;
#pragma unroll
  for (int j = 0; j < kBinsPerThread; ++j) mine += counts[j] = histogram[top - j];
  int32_t above = mine;
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int32_t other = __shfl_up_sync(kFullMask, above, step);
    if (lane >= step) above += other;
  }
  if (lane == kWarpSize - 1) sums[warp] = above;
  __syncthreads();
  above -= mine;
  for (int w = 0; w < warp; ++w) above += sums[w];
  if (above < cut.remaining && cut.remaining <= above + mine) {
    const int shift = shift_of(level - 1);
#pragma unroll
    for (int j = 0; j < kBinsPerThread; ++j) {
      const int32_t left = cut.remaining - above;
      above += counts[j];
      if (left <= 0 || cut.remaining > above) continue;
      const uint64_t digit = static_cast<uint64_t>(top - j);
      *found = {cut.prefix << (cut.shift - shift) | digit, left, shift,
                left == counts[j] ? Stays::kEqual
                : shift == 0      ? Stays::kFirstEqual
                                  : Stays::kOpen};
    }
  }
  __syncthreads();
  return *found;
}

template <bool kShared>
__global__ __launch_bounds__(kThreads) void histogram_kernel(const __grid_constant__ SelectParams p,
                                                             const Workspace work, int level) {
  NAMM_SHARED(int32_t, histogram, kBins);
  const SegmentTile tile = find_tile(p.seg, kTileRows, blockIdx.x);
  if (!p.active[tile.segment / p.seg.num_kv_heads]) return;
  const Group group = group_of<kShared>(p, tile.segment);
  const bool writes = tile.segment == group.first && tile.row == 0;
  if (!writes && tile.row >= tile.live) return;
  const Cut cut = cut_before(p, work, group, level);
  const int64_t place = int64_t{group.index} * kLevels + level;
  if (writes && threadIdx.x == 0) work.cuts[place] = cut;
  if (cut.stays != Stays::kOpen || count_of(work, tile.segment) < 0) return;

  for (int i = threadIdx.x; i < kBins; i += kThreads) histogram[i] = 0;
  __syncthreads();
  const Segment seg = segment_of(p, tile.segment);
  const int32_t end = min(tile.row + kTileRows, tile.live);
  const int shift = shift_of(level), bits = cut.shift - shift;
  for (int32_t i = tile.row + threadIdx.x; i < end; i += kThreads) {
    const uint64_t key = key_of(p, seg, i) >> shift;
    if (level == 0 || key >> bits == cut.prefix) {
      atomicAdd(&histogram[key & ((1u << bits) - 1u)], 1);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kBins; i += kThreads) {
    if (histogram[i] > 0) atomicAdd(&work.histograms[place * kBins + i], histogram[i]);
  }
}

// Whether a segment has a row with that key. There is one at most: positions differ. Not for
// kNewest: a shared budget holds the newest row of every segment.
NAMM_DEVICE bool has_key(const SelectParams& p, const Segment& seg, uint64_t key) {
  const auto pos = static_cast<int32_t>(key & 0x7fffffffu);
  int32_t low = 0, high = seg.live;
  while (low < high) {
    const int32_t middle = (low + high) / 2;
    if (p.pos[seg.start + middle] < pos) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < seg.live && key_of(p, seg, low) == key;
}

// levels: that have run, 0 or kLevels.
template <bool kShared>
__global__ __launch_bounds__(kThreads) void keep_kernel(const __grid_constant__ SelectParams p,
                                                        const Workspace work, int levels) {
  const SegmentTile tile = find_tile(p.seg, kTileRows, blockIdx.x);
  if (tile.row >= tile.live) return;
  const Segment seg = segment_of(p, tile.segment);
  const int32_t end = min(tile.row + kTileRows, tile.live);
  const bool active = p.active[tile.segment / p.seg.num_kv_heads];
  if (!active || count_of(work, tile.segment) < 0) {
    for (int32_t i = tile.row + threadIdx.x; i < end; i += kThreads) {
      p.keep[seg.start + i] = !active;
    }
    if (tile.row == 0 && threadIdx.x == 0) p.num_kept[tile.segment] = active ? -1 : tile.live;
    return;
  }
  const Group group = group_of<kShared>(p, tile.segment);
  const Cut cut = cut_before(p, work, group, levels);
  int32_t kept = 0;
  for (int32_t i = tile.row + threadIdx.x; i < end; i += kThreads) {
    bool stays = true;
    if (cut.stays == Stays::kCandidates) {
      stays = is_candidate(p, seg, i);
    } else if (cut.stays != Stays::kAll) {
      const uint64_t full = key_of(p, seg, i), key = full >> cut.shift;
      stays = key > cut.prefix || (key == cut.prefix && cut.stays == Stays::kEqual);
      if (key == cut.prefix && cut.stays == Stays::kFirstEqual) {
        int32_t earlier = 0;
        for (int s = group.first; s < tile.segment; ++s) {
          earlier += count_of(work, s) >= 0 && has_key(p, segment_of(p, s), full);
        }
        stays = earlier < cut.remaining;
      }
    }
    p.keep[seg.start + i] = stays;
    kept += stays;
  }
  for (int bits = 16; bits > 0; bits /= 2) kept += __shfl_xor_sync(kFullMask, kept, bits);
  if (threadIdx.x % kWarpSize == 0 && kept > 0) atomicAdd(&p.num_kept[tile.segment], kept);
}

bool is_shared(const SelectParams& p) { return p.budget == Budget::kPerLayer && p.cache_size >= 0; }
// Whether a cut may be needed.
bool may_cut(const SelectParams& p) { return p.cache_size >= 0 || p.fill; }

// The parts of the workspace, and where each ends. Sizes of the first two are multiples of 8 bytes.
struct Layout {
  size_t counts, histograms, cuts;
  explicit Layout(const SelectParams& p) {
    const auto segments = static_cast<size_t>(p.seg.batch_size) * p.seg.num_kv_heads;
    const size_t groups = !may_cut(p) ? 0 : is_shared(p) ? p.seg.batch_size : segments;
    counts = segments * sizeof(unsigned long long);
    histograms = counts + groups * kLevels * kBins * sizeof(int32_t);
    cuts = histograms + groups * kLevels * sizeof(Cut);
  }
};

template <bool kShared>
Status launch_typed(const SelectParams& p, const Launch& config, const Workspace& work) {
  const dim3 grid(num_tiles(p.seg, config.capacity, kTileRows));
  const auto run = [&](auto* kernel, auto... args) {
    return launch(kernel, grid, dim3(kThreads), 0, config.stream, p, work, args...);
  };
  Status status = run(count_kernel);
  const int levels = may_cut(p) ? kLevels : 0;
  for (int level = 0; status == 0 && level < levels; ++level) {
    status = run(histogram_kernel<kShared>, level);
  }
  return status != 0 ? status : run(keep_kernel<kShared>, levels);
}

}  // namespace

size_t select_workspace(const SelectParams& p, int64_t) { return Layout(p).cuts; }

Status launch_select(const SelectParams& p, const Launch& config) {
  const Layout layout(p);
  auto* base = static_cast<unsigned char*>(config.workspace);
  const Workspace work{reinterpret_cast<unsigned long long*>(base),
                       reinterpret_cast<int32_t*>(base + layout.counts),
                       reinterpret_cast<Cut*>(base + layout.histograms)};
  const Status status = fill_bytes(base, 0, layout.histograms, config.stream);
  if (status != 0) return status;
  return is_shared(p) ? launch_typed<true>(p, config, work) : launch_typed<false>(p, config, work);
}

}  // namespace namm_ext::gpu
