// select: which rows stay.
//
// Mapping   counting: one block per segment. Deciding: one block per segment, or per batch row
//           where its segments share the budget. A cut is a radix select over one 64-bit integer
//           per row (forced, score, position), eight bits at a time from the top, that stops as
//           soon as a whole bucket stays.
// Cost      8 bytes per row and pass: one pass to count, one to write, up to eight more only in
//           segments that a budget or fill really cuts.
// Numerics  none: the order of the integers is the rule, so every device decides alike. Integer
//           counts only; equal integers go to the earlier segment, then to the earlier row.
// Limits    positions are not negative, cache_size is -1 or at least 1. A segment is one block's
//           work, however long.
#include "platform.cuh"

namespace namm_ext::gpu {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kDigitBits = 8;
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsPerLane = kBins / kWarpSize;
static_assert(kWarps == kWarpSize, "one warp adds up the warps' sums");
static_assert(64 % kDigitBits == 0, "the passes cover the key");

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

// Sum over the block, for every thread. shared: kWarps + 1 numbers.
NAMM_DEVICE int64_t block_sum(int64_t value, int64_t* shared) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(kFullMask, value, bits);
  if (lane == 0) shared[warp] = value;
  __syncthreads();
  if (warp == 0) {
    int64_t sum = shared[lane];
    for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(kFullMask, sum, bits);
    if (lane == 0) shared[kWarps] = sum;
  }
  __syncthreads();
  const int64_t sum = shared[kWarps];
  __syncthreads();  // the next call may write
  return sum;
}

// Rows that may stay, or -1 if a score is NaN; inactive batch rows keep everything.
__global__ __launch_bounds__(kThreads) void count_kernel(const __grid_constant__ SelectParams p,
                                                         int32_t* counts) {
  NAMM_SHARED(int64_t, sums, kWarps + 1);
  const int s = blockIdx.x;
  const Segment seg = segment_of(p, s);
  const bool active = p.active[s / p.seg.num_kv_heads] != 0;
  int64_t count = 0;  // candidates, and NaN scores from bit 32 on
  for (int32_t i = threadIdx.x; i < seg.live; i += kThreads) {
    if (active) {
      const float score = p.scores[seg.start + i];
      count += is_candidate(p, seg, i);
      count += static_cast<int64_t>(score != score) << 32;
    } else {
      p.keep[seg.start + i] = 1;
    }
  }
  count = block_sum(count, sums);
  if (threadIdx.x == 0) {
    counts[s] = count >> 32 ? -1 : static_cast<int32_t>(count);
    if (!active) p.num_kept[s] = seg.live;
  }
}

// Where the cut lies: rows with key > bound stay, and of those with key == bound (after dropping
// the low `shift` bits of both) the first `equal` ones.
struct Cut {
  uint64_t bound;
  int shift;
  int64_t equal;
  bool all_equal;  // every row with key == bound stays
};

struct SelectShared {
  int32_t* histogram;    // kBins
  int64_t* sums;         // kWarps + 1
  int32_t* warp_counts;  // kWarps
  int32_t* digit;        // chosen bin
  int64_t* found;        // rows above the bin, rows inside the bin
};

// The `wanted` greatest keys of the segments [first, last), those with a NaN left out.
NAMM_DEVICE Cut find_cut(const SelectParams& p, const int32_t* counts, int first, int last,
                         int64_t wanted, const SelectShared& shared) {
  uint64_t prefix = 0;
  int64_t remaining = wanted;
  for (int shift = 64 - kDigitBits;; shift -= kDigitBits) {
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared.histogram[i] = 0;
    __syncthreads();
    for (int s = first; s < last; ++s) {
      if (counts[s] < 0) continue;
      const Segment seg = segment_of(p, s);
      for (int32_t i = threadIdx.x; i < seg.live; i += kThreads) {
        const uint64_t key = key_of(p, seg, i) >> shift;
        if (shift == 64 - kDigitBits || key >> kDigitBits == prefix) {
          atomicAdd(&shared.histogram[key & (kBins - 1)], 1);
        }
      }
    }
    __syncthreads();
    if (threadIdx.x < kWarpSize) {
      // Lane 0 has the greatest digits.
      const int lane = threadIdx.x, top = kBins - 1 - lane * kBinsPerLane;
      int64_t mine = 0;
      for (int j = 0; j < kBinsPerLane; ++j) mine += shared.histogram[top - j];
      int64_t above = mine;
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int64_t other = __shfl_up_sync(kFullMask, above, step);
        if (lane >= step) above += other;
      }
      above -= mine;
      if (above < remaining && remaining <= above + mine) {
        for (int j = 0; j < kBinsPerLane; ++j) {
          const int32_t inside = shared.histogram[top - j];
          if (remaining <= above + inside) {
            *shared.digit = top - j;
            shared.found[0] = above;
            shared.found[1] = inside;
            break;
          }
          above += inside;
        }
      }
    }
    __syncthreads();
    prefix = prefix << kDigitBits | static_cast<uint64_t>(*shared.digit);
    remaining -= shared.found[0];
    const bool all_equal = remaining == shared.found[1];
    __syncthreads();  // digit and found are read, the histogram may be cleared
    if (all_equal || shift == 0) return {prefix, shift, remaining, all_equal};
  }
}

// Writes keep and num_kept of the segments [first, last) after a cut.
NAMM_DEVICE void apply_cut(const SelectParams& p, const int32_t* counts, int first, int last,
                           const Cut& cut, const SelectShared& shared) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  int64_t equal_left = cut.equal;
  for (int s = first; s < last; ++s) {
    if (counts[s] < 0) continue;
    const Segment seg = segment_of(p, s);
    int64_t kept = 0;
    for (int32_t base = 0; base < seg.live; base += kThreads) {
      const int32_t i = base + threadIdx.x;
      const bool exists = i < seg.live;
      const uint64_t key = exists ? key_of(p, seg, i) >> cut.shift : 0;
      bool stays = exists && (key > cut.bound || (key == cut.bound && cut.all_equal));
      if (!cut.all_equal) {
        // The first equal rows in order of segment and row.
        const bool equal = exists && key == cut.bound;
        const unsigned ballot = __ballot_sync(kFullMask, equal);
        if (lane == 0) shared.warp_counts[warp] = __popc(ballot);
        __syncthreads();
        int64_t rank = __popc(ballot & ((1u << lane) - 1u)), total = 0;
        for (int w = 0; w < kWarps; ++w) {
          if (w < warp) rank += shared.warp_counts[w];
          total += shared.warp_counts[w];
        }
        __syncthreads();
        stays = stays || (equal && rank < equal_left);
        equal_left = max(int64_t{0}, equal_left - total);
      }
      if (exists) p.keep[seg.start + i] = stays;
      kept += stays;
    }
    kept = block_sum(kept, shared.sums);
    if (threadIdx.x == 0) p.num_kept[s] = static_cast<int32_t>(kept);
  }
}

// kShared: a block decides for all segments of a batch row.
template <bool kShared>
__global__ __launch_bounds__(kThreads) void decide_kernel(const __grid_constant__ SelectParams p,
                                                          const int32_t* counts) {
  NAMM_SHARED(int32_t, histogram, kBins);
  NAMM_SHARED(int64_t, sums, kWarps + 1);
  NAMM_SHARED(int32_t, warp_counts, kWarps);
  NAMM_SHARED(int32_t, digit, 1);
  NAMM_SHARED(int64_t, found, 2);
  const SelectShared shared{histogram, sums, warp_counts, digit, found};

  const int heads = p.seg.num_kv_heads;
  const int b = kShared ? blockIdx.x : blockIdx.x / heads;
  if (p.active[b] == 0) return;
  const int first = kShared ? b * heads : blockIdx.x;
  const int last = kShared ? first + heads : first + 1;

  int64_t candidates = 0, live = 0;
  for (int s = first; s < last; ++s) {
    if (counts[s] < 0) {
      for (int32_t i = threadIdx.x; i < p.seg.seqused_k[s]; i += kThreads) {
        p.keep[p.seg.cu_seqlens_k[s] + i] = 0;
      }
      if (threadIdx.x == 0) p.num_kept[s] = -1;
    } else {
      candidates += counts[s];
      live += p.seg.seqused_k[s];
    }
  }
  int64_t wanted = candidates;
  if (p.cache_size >= 0) {
    wanted = min(wanted, int64_t{p.cache_size} * (last - first));
  }
  if (p.fill && counts[blockIdx.x] >= 0) {  // budget is per head
    for (int s = b * heads; s < (b + 1) * heads; ++s) {
      const int64_t other = counts[s];
      wanted = max(wanted, p.cache_size >= 0 ? min(other, int64_t{p.cache_size}) : other);
    }
  }

  if (wanted == candidates || wanted >= live) {
    const bool all = wanted >= live;
    for (int s = first; s < last; ++s) {
      if (counts[s] < 0) continue;
      const Segment seg = segment_of(p, s);
      for (int32_t i = threadIdx.x; i < seg.live; i += kThreads) {
        p.keep[seg.start + i] = all || is_candidate(p, seg, i);
      }
      if (threadIdx.x == 0) p.num_kept[s] = all ? seg.live : counts[s];
    }
    return;
  }
  const Cut cut = find_cut(p, counts, first, last, wanted, shared);
  apply_cut(p, counts, first, last, cut, shared);
}

}  // namespace

size_t select_workspace(const SelectParams& p, int64_t) {
  return sizeof(int32_t) * static_cast<size_t>(p.seg.batch_size) * p.seg.num_kv_heads;
}

Status launch_select(const SelectParams& p, const Launch& config) {
  const auto segments = static_cast<unsigned>(p.seg.batch_size * p.seg.num_kv_heads);
  auto* counts = static_cast<int32_t*>(config.workspace);
  const Status status =
      launch(count_kernel, dim3(segments), dim3(kThreads), 0, config.stream, p, counts);
  if (status != 0) return status;
  if (p.budget == Budget::kPerLayer && p.cache_size >= 0) {
    return launch(decide_kernel<true>, dim3(static_cast<unsigned>(p.seg.batch_size)),
                  dim3(kThreads), 0, config.stream, p, static_cast<const int32_t*>(counts));
  }
  return launch(decide_kernel<false>, dim3(segments), dim3(kThreads), 0, config.stream, p,
                static_cast<const int32_t*>(counts));
}

}  // namespace namm_ext::gpu
