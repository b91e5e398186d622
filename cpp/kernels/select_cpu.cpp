// Which rows stay.
//
// Mapping   counting: one task per segment. Cutting at a budget: one task per segment, or per batch
//           row where its segments share the budget.
// Cost      linear: two passes over scores and positions, and an nth_element over 8-byte keys of
//           the segments that a budget really cuts.
// Numerics  none: a row becomes one integer (forced, score, position) whose order is the rule, so
//           every device decides alike.
// Limits    positions are not negative and differ inside a segment.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "kernels.h"

namespace namm_ext::cpu {
namespace {

// Greater means it stays longer. The newest row of a segment is above all others.
constexpr uint64_t kNewest = ~uint64_t{0};

struct Segment {
  int64_t begin, length;
  int32_t newest_pos;
};

Segment segment(const SelectParams& p, int64_t s) {
  const int64_t begin = p.seg.cu_seqlens_k[s], length = p.seg.seqused_k[s];
  return {begin, length, length ? p.pos[begin + length - 1] : 0};
}

bool forced(const SelectParams& p, const Segment& seg, int64_t i) {
  const int64_t pos = p.pos[seg.begin + i];
  return pos < p.sink_tokens || seg.newest_pos - pos < p.recent_tokens ||
         (p.protect_newest && i == seg.length - 1);
}

// 1 bit forced, 32 bits score, 31 bits position.
uint64_t key(const SelectParams& p, const Segment& seg, int64_t i) {
  if (p.protect_newest && i == seg.length - 1) return kNewest;
  const float score = p.scores[seg.begin + i] + 0.0f;  // -0 becomes +0
  uint32_t bits;
  std::memcpy(&bits, &score, sizeof bits);
  bits = bits >> 31 ? ~bits : bits | 0x80000000u;
  const uint64_t pos = static_cast<uint32_t>(p.pos[seg.begin + i]) & 0x7fffffffu;
  return uint64_t{forced(p, seg, i)} << 63 | uint64_t{bits} << 31 | pos;
}

// Rows that may stay, or -1 if a score is NaN.
int32_t count_candidates(const SelectParams& p, const Segment& seg) {
  int32_t count = 0, nan = 0;
  for (int64_t i = 0; i < seg.length; ++i) {
    const float score = p.scores[seg.begin + i];
    nan |= score != score;
    count += (score >= p.threshold) | forced(p, seg, i);
  }
  return nan ? -1 : count;
}

int32_t keep_candidates(const SelectParams& p, const Segment& seg) {
  int32_t kept = 0;
  for (int64_t i = 0; i < seg.length; ++i) {
    const bool stays = p.scores[seg.begin + i] >= p.threshold || forced(p, seg, i);
    p.keep[seg.begin + i] = stays;
    kept += stays;
  }
  return kept;
}

void keep_all(const SelectParams& p, const Segment& seg, uint8_t value) {
  std::memset(p.keep + seg.begin, value, static_cast<size_t>(seg.length));
}

// Keeps the budget greatest rows of the segments [first, last) together; equal keys go to the
// earlier segment, then to the earlier row. Rows with a score below the threshold take part only
// if fill is set.
void keep_best(const SelectParams& p, int64_t first, int64_t last, int64_t budget,
               std::vector<uint64_t>* keys) {
  keys->clear();
  for (int64_t s = first; s < last; ++s) {
    if (p.num_kept[s] < 0) continue;  // NaN
    const Segment seg = segment(p, s);
    for (int64_t i = 0; i < seg.length; ++i) {
      const bool stays = p.fill || p.scores[seg.begin + i] >= p.threshold || forced(p, seg, i);
      if (stays) keys->push_back(key(p, seg, i));
    }
  }
  const bool cut = budget < static_cast<int64_t>(keys->size());
  uint64_t last_key = 0;
  int64_t equal_left = 0;
  if (cut && budget > 0) {
    const auto nth = keys->begin() + (budget - 1);
    std::nth_element(keys->begin(), nth, keys->end(), std::greater<uint64_t>());
    last_key = *nth;
    const auto above = std::count_if(keys->begin(), nth, [&](uint64_t k) { return k > last_key; });
    equal_left = budget - above;
  }
  for (int64_t s = first; s < last; ++s) {
    if (p.num_kept[s] < 0) continue;
    const Segment seg = segment(p, s);
    int32_t kept = 0;
    for (int64_t i = 0; i < seg.length; ++i) {
      bool stays = p.fill || p.scores[seg.begin + i] >= p.threshold || forced(p, seg, i);
      if (stays && cut) {
        const uint64_t k = key(p, seg, i);
        stays = budget > 0 && (k > last_key || (k == last_key && equal_left-- > 0));
      }
      p.keep[seg.begin + i] = stays;
      kept += stays;
    }
    p.num_kept[s] = kept;
  }
}

}  // namespace

void select(const SelectParams& p, Parallel parallel) {
  const int64_t heads = p.seg.num_kv_heads, num_segments = p.seg.batch_size * heads;
  const bool shared = p.cache_size >= 0 && p.budget == Budget::kPerLayer;
  const int64_t budget = p.cache_size < 0 ? int64_t{1} << 40 : p.cache_size;
  constexpr int64_t kRows = 1 << 14;  // below this many rows a second thread does not pay
  const int64_t capacity = num_segments ? p.seg.cu_seqlens_k[num_segments] : 0;
  const int64_t grain = 1 + kRows * num_segments / (capacity + 1);

  // num_kept holds the number of candidates, -1 for NaN.
  parallel(num_segments, grain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const Segment seg = segment(p, s);
      if (p.active[s / heads]) {
        p.num_kept[s] = count_candidates(p, seg);
        if (p.num_kept[s] < 0) keep_all(p, seg, 0);
      } else {
        p.num_kept[s] = static_cast<int32_t>(seg.length);
        keep_all(p, seg, 1);
      }
    }
  });

  if (shared) {
    parallel.each(p.seg.batch_size, [&](int64_t b) {
      std::vector<uint64_t> keys;
      if (p.active[b]) keep_best(p, b * heads, (b + 1) * heads, budget * heads, &keys);
    });
    return;
  }

  std::vector<int64_t> target(static_cast<size_t>(num_segments));
  for (int64_t b = 0; b < p.seg.batch_size; ++b) {
    int64_t most = 0;
    for (int64_t s = b * heads; s < (b + 1) * heads; ++s) {
      target[s] = std::min<int64_t>(p.num_kept[s], budget);
      most = std::max(most, target[s]);
    }
    if (p.fill) std::fill_n(target.begin() + b * heads, heads, most);
  }
  parallel(num_segments, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys;
    for (int64_t s = begin; s < end; ++s) {
      if (p.num_kept[s] < 0 || !p.active[s / heads]) continue;
      const Segment seg = segment(p, s);
      if (target[s] == p.num_kept[s]) {
        p.num_kept[s] = keep_candidates(p, seg);
      } else if (target[s] >= seg.length) {
        keep_all(p, seg, 1);
        p.num_kept[s] = static_cast<int32_t>(seg.length);
      } else {
        keep_best(p, s, s + 1, target[s], &keys);
      }
    }
  });
}

}  // namespace namm_ext::cpu
