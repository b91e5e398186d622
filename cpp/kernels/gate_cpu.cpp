// Linear gate: tasks for gate_isa.inc.
//
// Mapping   one task per kGateTokens new tokens of a batch row.
// Cost      see gate_isa.inc.
// Numerics  see gate_isa.inc.
// Limits    the caller has checked that the heads of a batch row hold the same tokens.
#include "dispatch.h"
#include "gate_isa.h"
#include "kernels.h"
#include "scratch.h"

namespace namm_ext::cpu {
namespace {

thread_local Scratch scratch;

// By Isa.
constexpr const GateRows* kVersions[] = {
    &base::kGateRows,
#if defined(__x86_64__)
    &avx2::kGateRows,
    &avx512::kGateRows,
#endif
};

}  // namespace

void gate(const GateParams& p, Parallel parallel) {
  const GateRows rows = *version_in_force(kVersions);
  const int64_t stride = (p.num_inputs + kGateMaxLanes - 1) / kGateMaxLanes * kGateMaxLanes;
  const int64_t tasks_per_row = (int64_t{p.num_new} + kGateTokens - 1) / kGateTokens;
  // One thread per 2^17 multiply-adds or so: below that, waking one costs more.
  const int64_t grain = 1 + (int64_t{1} << 17) / (kGateTokens * p.seg.num_kv_heads * p.num_inputs);
  parallel(p.seg.batch_size * tasks_per_row, grain, [&](int64_t begin, int64_t end) {
    const int64_t bytes = kGateTokens * stride * static_cast<int64_t>(sizeof(float));
    float* x = reinterpret_cast<float*>(scratch.reserve(bytes));
    for (int64_t task = begin; task < end; ++task) {
      const int32_t b = static_cast<int32_t>(task / tasks_per_row);
      if (!p.active[b]) continue;
      const int64_t first = task % tasks_per_row * kGateTokens;
      const int64_t behind = first + kGateTokens < p.num_new ? first + kGateTokens : p.num_new;
      rows(p, b, static_cast<int32_t>(first), static_cast<int32_t>(behind), stride, x);
    }
  });
}

}  // namespace namm_ext::cpu
