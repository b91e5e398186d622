// Attention of new queries over the ragged segments: the plan. attend_isa.inc has the arithmetic.
//
// Mapping   a segment's rows (queries x groups) are cut in tasks of kAttendRowsPerTask; if it has
//           at most kAttendSplitRows rows, its keys are cut in chunks of kAttendChunk as well. Both
//           depend on the segment alone, never on threads or on the rest of the batch.
// Cost      the merge of split segments adds rows * chunks * Dv.
// Numerics  chunks are merged in their order, in float.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "attend_isa.h"
#include "dispatch.h"
#include "kernels.h"
#include "scalar.h"
#include "scratch.h"

namespace namm_ext::cpu {
namespace {

// By Isa.
constexpr const AttendIsa* kVersions[] = {
    &base::kAttend,
#if defined(__x86_64__)
    &avx2::kAttend, &avx512::kAttend, &avx512bf16::kAttend, &amx::kAttend,
#endif
};

thread_local Scratch scratch;

// A segment whose keys are split: its chunks follow each other in the workspace.
struct Split {
  int32_t segment, rows, chunks;
  int64_t offset;
};

template <class T>
void merge(const AttendParams& p, const Split& split, const float* workspace) {
  const int64_t b = split.segment / p.seg.num_kv_heads, h = split.segment % p.seg.num_kv_heads;
  const int64_t width = p.head_dim_v + 2;
  std::vector<float> total(static_cast<size_t>(p.head_dim_v));
  for (int64_t row = 0; row < split.rows; ++row) {
    const int64_t head = h * p.num_groups + row % p.num_groups;
    const int64_t column = p.first[b] + row / p.num_groups;
    const float* parts = workspace + split.offset + row * width;
    float max = kAttendNothing, sum = 0.0f;
    for (int c = 0; c < split.chunks; ++c) {
      max = std::max(max, parts[c * split.rows * width + p.head_dim_v]);
    }
    std::fill(total.begin(), total.end(), 0.0f);
    for (int c = 0; c < split.chunks; ++c) {
      const float* part = parts + c * split.rows * width;
      const float factor = std::exp2(part[p.head_dim_v] - max);
      sum += part[p.head_dim_v + 1] * factor;
      for (int64_t d = 0; d < p.head_dim_v; ++d) total[d] += part[d] * factor;
    }
    const bool seen = max > kAttendNothing;
    T* out = static_cast<T*>(p.out) + b * p.out_strides[0] + column * p.out_strides[1] +
             head * p.out_strides[2];
    for (int64_t d = 0; d < p.head_dim_v; ++d) store(out + d, seen ? total[d] / sum : 0.0f);
    p.lse[b * p.lse_strides[0] + head * p.lse_strides[1] + column * p.lse_strides[2]] =
        seen ? 0.693147180559945309f * (max + std::log2(sum)) : -INFINITY;
  }
}

}  // namespace

void attend(const AttendParams& p, Parallel parallel) {
  const AttendIsa& isa = *version_in_force(kVersions);
  const int64_t num_segments = int64_t{p.seg.batch_size} * p.seg.num_kv_heads;

  std::vector<AttendTask> tasks;
  std::vector<Split> splits;
  std::vector<int64_t> offsets;  // of the partial result in the workspace, or -1
  tasks.reserve(static_cast<size_t>(num_segments));
  int64_t work = 0, workspace_size = 0;
  for (int64_t s = 0; s < num_segments; ++s) {
    const int32_t rows = p.num_new[s / p.seg.num_kv_heads] * p.num_groups,
                  keys = p.seg.seqused_k[s];
    if (rows <= 0) continue;
    work += int64_t{rows} * (keys + 8) * (p.head_dim + p.head_dim_v);
    if (rows <= kAttendSplitRows && keys > kAttendChunk) {
      const int32_t chunks = (keys + kAttendChunk - 1) / kAttendChunk;
      splits.push_back({static_cast<int32_t>(s), rows, chunks, workspace_size});
      for (int32_t c = 0; c < chunks; ++c) {
        tasks.push_back({static_cast<int32_t>(s), 0, rows, c * kAttendChunk,
                         std::min(keys, (c + 1) * kAttendChunk), nullptr});
        offsets.push_back(workspace_size);
        workspace_size += int64_t{rows} * (p.head_dim_v + 2);
      }
    } else {
      for (int32_t row = 0; row < rows; row += kAttendRowsPerTask) {
        tasks.push_back({static_cast<int32_t>(s), row, std::min(rows, row + kAttendRowsPerTask), 0,
                         keys, nullptr});
        offsets.push_back(-1);
      }
    }
  }
  std::unique_ptr<float[]> workspace(workspace_size ? new float[static_cast<size_t>(workspace_size)]
                                                    : nullptr);
  for (size_t i = 0; i < tasks.size(); ++i) {
    if (offsets[i] >= 0) tasks[i].partial = workspace.get() + offsets[i];
  }

  // Waking the other threads costs more than so little work.
  constexpr int64_t kSerialWork = int64_t{1} << 20;
  const Parallel threads = work < kSerialWork ? kSerial : parallel;
  if (threads.num_threads() > 1) {
    // The longest first, so that no thread is left with a long one at the end.
    std::sort(tasks.begin(), tasks.end(), [](const AttendTask& a, const AttendTask& b) {
      const int64_t cost_a = int64_t{a.row_end - a.row_begin} * (a.key_end - a.key_begin);
      const int64_t cost_b = int64_t{b.row_end - b.row_begin} * (b.key_end - b.key_begin);
      return cost_a != cost_b ? cost_a > cost_b
                              : std::tie(a.segment, a.row_begin, a.key_begin) <
                                    std::tie(b.segment, b.row_begin, b.key_begin);
    });
  }
  const int64_t scratch_bytes = isa.scratch_bytes(p);
  threads.each(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
    isa.run(p, tasks[static_cast<size_t>(i)], scratch.reserve(scratch_bytes));
  });
  if (splits.empty()) return;
  with_type(p.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    threads.each(static_cast<int64_t>(splits.size()),
                 [&](int64_t i) { merge<T>(p, splits[static_cast<size_t>(i)], workspace.get()); });
  });
}

}  // namespace namm_ext::cpu
