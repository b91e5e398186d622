// Backward attention memory: the plan. bam_isa.inc has the arithmetic.
//
// Mapping   three steps, each in parallel: every candidate in use is folded once; the features of
//           every segment are computed once; blocks of kBamRows rows are scored, oldest (longest)
//           first within a segment, handed out one by one.
// Cost      workspace: 100 bytes per live token, 5 kB per candidate in use.
// Numerics  how a segment is cut depends on its own length alone.
// Limits    none.
#include <cstring>
#include <vector>

#include "bam_isa.h"
#include "dispatch.h"
#include "kernels.h"
#include "scratch.h"

namespace namm_ext::cpu {
namespace {

// By Isa.
constexpr const BamIsa* kVersions[] = {
    &base::kBam,
#if defined(__x86_64__)
    &avx2::kBam, &avx512::kBam, nullptr, &amx::kBam,
#endif
};

thread_local Scratch scratch;
thread_local Scratch folded_memory;
thread_local Scratch features_memory;

// A piece of a segment whose features start at `features` in the workspace.
struct Task {
  int32_t segment, begin, end;
  int64_t features;
};

}  // namespace

void bam_scores(const ScoreParams& p, Parallel parallel) {
  const BamIsa& isa = *version_in_force(kVersions);
  std::vector<int32_t> slot(static_cast<size_t>(p.num_candidates), -1);  // of a folded candidate
  std::vector<int32_t> used;
  std::vector<Task> token_tasks, row_tasks;
  int64_t bytes = 0;
  for (int32_t b = 0; b < p.seg.batch_size; ++b) {
    for (int32_t h = 0; h < p.seg.num_kv_heads; ++h) {
      const int32_t s = b * p.seg.num_kv_heads + h, length = p.seg.seqused_k[s];
      if (length == 0) continue;
      if (!p.active[b]) {
        std::memset(p.scores + p.seg.cu_seqlens_k[s], 0, sizeof(float) * length);
        continue;
      }
      int32_t& index = slot[p.param_index[b]];
      if (index < 0) {
        index = static_cast<int32_t>(used.size());
        used.push_back(p.param_index[b]);
      }
      for (int32_t i = 0; i < length; i += kBamTokens) {
        token_tasks.push_back({s, i, length - i < kBamTokens ? length : i + kBamTokens, bytes});
      }
      for (int32_t i = 0; i < length; i += kBamRows) row_tasks.push_back({s, i, length, bytes});
      bytes += isa.features_bytes(length);
    }
  }
  if (row_tasks.empty()) return;

  char* const folded = folded_memory.reserve(static_cast<int64_t>(used.size()) * isa.folded_bytes);
  char* const features = features_memory.reserve(bytes);
  parallel.each(static_cast<int64_t>(used.size()), [&](int64_t i) {
    isa.fold(p.params + used[i] * p.num_params, folded + i * isa.folded_bytes);
  });
  parallel.each(static_cast<int64_t>(token_tasks.size()), [&](int64_t i) {
    const Task& task = token_tasks[i];
    isa.features(p, task.segment, task.begin, task.end, features + task.features);
  });
  parallel.each(static_cast<int64_t>(row_tasks.size()), [&](int64_t i) {
    const Task& task = row_tasks[i];
    const int32_t candidate = slot[p.param_index[task.segment / p.seg.num_kv_heads]];
    isa.scores(p, task.segment, task.begin, folded + candidate * isa.folded_bytes,
               features + task.features, scratch.reserve(isa.scratch_bytes));
  });
}

}  // namespace namm_ext::cpu
